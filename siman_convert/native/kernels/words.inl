// Ops for kernels that xor words and count bits: a unit is a word, a vector holds the same word of kLanes filters. What
// lies in memory is little-endian, as every machine is that we build for.

template <int Lanes, class Word>
struct WordLayout : PlainWords {
  static constexpr int kLanes = Lanes;
  static constexpr int kUnitPixels = 1, kStepUnits = 1;
  static constexpr int kUnitBytes = sizeof(Word), kUnitChannels = 8 * kUnitBytes, kVectorBytes = kUnitBytes * Lanes;

  static void place(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride) {
    uint8_t* at = vector + kUnitBytes * lane;
    for (size_t b = 0; b < tap_bytes; ++b) at[b / kUnitBytes * unit_stride + b % kUnitBytes] = tap[b];
  }
};
