// The step of the variants that have VPOPCNTDQ: xor, count and add for 512 bits, that is 32 channels of 16 filters.

struct Ops : SixteenInts, WordLayout<16, uint32_t> {
  static constexpr int64_t kUnitsPerFlush = kMostUnits, kFlushes = 1;

  template <class Value>
  static Value opaque(Value value) {
    __asm__ volatile("" : "+v"(value));
    return value;
  }
  static void count(Part& part, Weights w, Activation a) {
    part = _mm512_add_epi32(part, _mm512_popcnt_epi32(_mm512_xor_si512(w, a)));
  }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    const __m512i twice = _mm512_add_epi32(wide.sum, wide.sum);
    _mm512_storeu_si512(acc, _mm512_sub_epi32(_mm512_loadu_si512(base), twice));
  }
};
