// Floats and Doubles in 256-bit vectors.

struct EightFloats {
  static constexpr int kLanes = 8;
  using Vec = __m256;
  using Bits = __m256i;

  static Vec load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* y, Vec v) { _mm256_storeu_ps(y, v); }
  static __m256i first(size_t count) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  static Vec load_some(const float* x, size_t count) { return _mm256_maskload_ps(x, first(count)); }
  static void store_some(float* y, Vec v, size_t count) { _mm256_maskstore_ps(y, first(count), v); }
  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec larger(Vec v, Vec m) { return _mm256_max_ps(v, m); }
  static Vec prelu(Vec v, Vec slope) {
    return _mm256_blendv_ps(mul(slope, v), v, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GE_OQ));
  }
  static Vec signs(Vec x, Vec threshold) {
    return _mm256_blendv_ps(set(-1), set(1), _mm256_cmp_ps(x, threshold, _CMP_GE_OQ));
  }
  static Vec from_ints(const int32_t* x) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }

  static void transpose(Vec (&r)[8]) {
    Vec pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
        fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xEE);
      }
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }

  static Bits no_bits() { return _mm256_setzero_si256(); }
  static Bits append(Bits bits, Vec x, Vec threshold) {
    const __m256i minus_bit = _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GE_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(bits, bits), minus_bit);
  }
  static Bits tally(Bits counts, Vec x, Vec bound) {
    return _mm256_sub_epi32(counts, _mm256_castps_si256(_mm256_cmp_ps(x, bound, _CMP_LE_OQ)));
  }
  static void words(Bits low, Bits high, uint64_t* words) {
    const __m256i a = _mm256_unpacklo_epi32(low, high), b = _mm256_unpackhi_epi32(low, high);
    auto* out = reinterpret_cast<__m128i*>(words);
    _mm_storeu_si128(out, _mm256_castsi256_si128(a));
    _mm_storeu_si128(out + 1, _mm256_castsi256_si128(b));
    _mm_storeu_si128(out + 2, _mm256_extracti128_si256(a, 1));
    _mm_storeu_si128(out + 3, _mm256_extracti128_si256(b, 1));
  }

  static Bits steps(Vec x, Vec scale, Vec lowest, Vec highest) {
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_div_ps(x, scale), lowest), highest));
  }
  template <int Width>
  static Bits shift_in(Bits bits, Bits d) {
    return _mm256_add_epi32(_mm256_slli_epi32(bits, Width), d);
  }
  static Bits offset(Bits bits, uint32_t add, uint32_t flip) {
    const Bits sum = _mm256_add_epi32(bits, _mm256_set1_epi32(static_cast<int>(add)));
    return _mm256_xor_si256(sum, _mm256_set1_epi32(static_cast<int>(flip)));
  }
};

struct FourDoubles {
  static constexpr int kLanes = 4;
  using Vec = __m256d;

  static Vec zero() { return _mm256_setzero_pd(); }
  static Vec add(Vec a, Vec b) { return _mm256_add_pd(a, b); }
  static Vec widen(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
  static void store(double* out, Vec v) { _mm256_storeu_pd(out, v); }
};
