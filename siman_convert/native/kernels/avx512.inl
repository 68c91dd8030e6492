// What the variants with AVX-512 share: 16 floats, 8 doubles, and with VNNI the step of the quantized convolution: 4
// codes of 16 filters, multiplied and added.

struct SixteenFloats {
  static constexpr int kLanes = 16;
  using Vec = __m512;
  using Bits = __m512i;

  static Vec load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* y, Vec v) { _mm512_storeu_ps(y, v); }
  static __mmask16 first(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static Vec load_some(const float* x, size_t count) { return _mm512_maskz_loadu_ps(first(count), x); }
  static void store_some(float* y, Vec v, size_t count) { _mm512_mask_storeu_ps(y, first(count), v); }
  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec larger(Vec v, Vec m) { return _mm512_maskz_max_ps(0xFFFF, v, m); }
  static Vec prelu(Vec v, Vec slope) {
    return _mm512_mask_mul_ps(v, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NGE_UQ), slope, v);
  }
  static Vec signs(Vec x, Vec threshold) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, threshold, _CMP_GE_OQ), set(-1), set(1));
  }
  static Vec from_ints(const int32_t* x) { return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_loadu_si512(x)); }

  static void transpose(Vec (&r)[16]) {
    Vec pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_maskz_unpacklo_ps(0xFFFF, r[i], r[i + 1]);
      pairs[i + 1] = _mm512_maskz_unpackhi_ps(0xFFFF, r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int k = 0; k < 2; ++k) {
        fours[i + 2 * k] = _mm512_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
        fours[i + 2 * k + 1] = _mm512_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xEE);
      }
    }
    // Column 4L + k of rows i .. i + 3 is now in the 128-bit lane L of fours[i + k].
    for (int k = 0; k < 4; ++k) {
      const Vec even_low = quarters<0x88>(fours[k], fours[4 + k]), odd_low = quarters<0xDD>(fours[k], fours[4 + k]);
      const Vec even_high = quarters<0x88>(fours[8 + k], fours[12 + k]),
                odd_high = quarters<0xDD>(fours[8 + k], fours[12 + k]);
      r[k] = quarters<0x88>(even_low, even_high);
      r[4 + k] = quarters<0x88>(odd_low, odd_high);
      r[8 + k] = quarters<0xDD>(even_low, even_high);
      r[12 + k] = quarters<0xDD>(odd_low, odd_high);
    }
  }
  template <int Select>
  static Vec quarters(Vec a, Vec b) {
    return _mm512_maskz_shuffle_f32x4(0xFFFF, a, b, Select);
  }

  static Bits no_bits() { return _mm512_setzero_si512(); }
  static Bits append(Bits bits, Vec x, Vec threshold) {
    const Bits twice = _mm512_add_epi32(bits, bits);
    return _mm512_mask_or_epi32(twice, _mm512_cmp_ps_mask(x, threshold, _CMP_GE_OQ), twice, _mm512_set1_epi32(1));
  }
  static Bits tally(Bits counts, Vec x, Vec bound) {
    return _mm512_mask_add_epi32(counts, _mm512_cmp_ps_mask(x, bound, _CMP_LE_OQ), counts, _mm512_set1_epi32(1));
  }
  static void words(Bits low, Bits high, uint64_t* words) {
    const Bits first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(words, _mm512_permutex2var_epi32(low, first, high));
    _mm512_storeu_si512(words + 8, _mm512_permutex2var_epi32(low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high));
  }

  static Bits steps(Vec x, Vec scale, Vec lowest, Vec highest) {
    const Vec from = _mm512_maskz_max_ps(0xFFFF, _mm512_div_ps(x, scale), lowest);
    return _mm512_maskz_cvtps_epi32(0xFFFF, _mm512_maskz_min_ps(0xFFFF, from, highest));
  }
  template <int Width>
  static Bits shift_in(Bits bits, Bits d) {
    return _mm512_add_epi32(_mm512_maskz_slli_epi32(0xFFFF, bits, Width), d);
  }
  static Bits offset(Bits bits, uint32_t add, uint32_t flip) {
    const Bits sum = _mm512_add_epi32(bits, _mm512_set1_epi32(static_cast<int>(add)));
    return _mm512_xor_si512(sum, _mm512_set1_epi32(static_cast<int>(flip)));
  }
};

struct EightDoubles {
  static constexpr int kLanes = 8;
  using Vec = __m512d;

  static Vec zero() { return _mm512_setzero_pd(); }
  static Vec add(Vec a, Vec b) { return _mm512_add_pd(a, b); }
  static Vec widen(const float* x) { return _mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(x)); }
  static void store(double* out, Vec v) { _mm512_storeu_pd(out, v); }
};

// 16 x 32 bits, for both kinds of convolution: 4 vectors x 6 pixels are 24 sums, 4 weights, an activation and a scratch
// register of the 32 there are.
struct SixteenInts {
  static constexpr int kVectors = 4, kFewVectors = 1, kPixels = 6;
  using Weights = __m512i;
  using Activation = __m512i;
  using Part = __m512i;
  struct Wide {
    __m512i sum;
  };

  static Weights load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Activation broadcast(const uint8_t* bytes) {
    int32_t word;
    __builtin_memcpy(&word, bytes, 4);
    return _mm512_set1_epi32(word);
  }
  static void zero(Part& part) { part = _mm512_setzero_si512(); }
  static void zero(Wide& wide) { wide.sum = _mm512_setzero_si512(); }
  static void flush(Part& part, Wide& wide) { wide.sum = part; }  // nothing was there before
};

// 4 codes of 8 bits without a sign times 4 weights with one, added to a sum of 32 bits.
struct QuantizedOps : SixteenInts, CodeLayout<16, 4, uint8_t, int8_t> {
  static void count(Part& part, Weights w, Activation a) { part = _mm512_dpbusd_epi32(part, a, w); }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    _mm512_storeu_si512(acc, _mm512_add_epi32(_mm512_loadu_si512(base), wide.sum));
  }
};
