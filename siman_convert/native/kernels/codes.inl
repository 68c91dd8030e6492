// Ops for kernels that multiply codes: a unit is `Codes` of them, a vector holds the weights of the same unit of kLanes
// filters, filter by filter.

template <int Lanes, int Codes, class CodeType, class Weight>
struct CodeLayout {
  using Code = CodeType;
  static constexpr int kLanes = Lanes;
  static constexpr int kUnitPixels = 1, kStepUnits = 1;
  static constexpr int kUnitChannels = Codes, kUnitBytes = Codes * sizeof(Code), kVectorBytes = kUnitBytes * Lanes;
  static constexpr int64_t kUnitsPerFlush = kMostUnits, kFlushes = 1;  // 32 bits are enough: see quantized.inl

  static void place(const int8_t* tap, size_t channels, int lane, uint8_t* vector, size_t unit_stride) {
    for (size_t c = 0; c < channels; ++c) {
      const Weight weight = tap[c];
      uint8_t* unit = vector + c / Codes * unit_stride + kUnitBytes * lane;
      __builtin_memcpy(unit + c % Codes * sizeof(Weight), &weight, sizeof(Weight));
    }
  }
};
