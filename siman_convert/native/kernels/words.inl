// Ops for kernels that xor 64-bit words and count bits: a unit is a word of 64 channels, a vector holds the same word
// of kLanes filters. What lies in memory is little-endian, as every machine is that we build for.

template <int Lanes>
struct WordLayout {
  static constexpr int kLanes = Lanes;
  static constexpr int kUnitChannels = 64, kUnitBytes = 8, kWordBytes = 8, kVectorBytes = 8 * Lanes;

  static void store_word(uint8_t* out, uint64_t word) { __builtin_memcpy(out, &word, 8); }

  static void place(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride) {
    for (size_t b = 0; b < tap_bytes; ++b) vector[b / 8 * unit_stride + 8 * static_cast<size_t>(lane) + b % 8] = tap[b];
  }
};
