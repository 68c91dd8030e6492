// AVX2 has no instruction that counts bits: nibbles are looked up, see kernels/nibbles.inl.
#include <immintrin.h>

#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/one_lane.inl"
#include "kernels/avx2.inl"
#include "kernels/codes.inl"
#include "kernels/nibbles.inl"

struct Bytes32 {
  static constexpr int kBytes = 32;
  using Vec = __m256i;

  static Vec load(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
  static Vec table(const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static Vec set(uint16_t lane) { return _mm256_set1_epi16(static_cast<int16_t>(lane)); }
  static Vec look_up(Vec table, Vec indices) { return _mm256_shuffle_epi8(table, indices); }
  static Vec add_bytes(Vec a, Vec b) { return _mm256_add_epi8(a, b); }
  static Vec add(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
  static Vec subtract(Vec a, Vec b) { return _mm256_sub_epi16(a, b); }
  static Vec both(Vec a, Vec b) { return _mm256_and_si256(a, b); }
  template <int Bits>
  static Vec shifted_right(Vec a) {
    return _mm256_srli_epi16(a, Bits);
  }
};

// 2 vectors x 6 pixels are 12 sums, 2 of which GCC keeps in memory: still 2 % faster than 4 pixels on a Cascade Lake.
struct Ops : NibbleOps<Bytes32> {
  static constexpr int kVectors = 2, kFewVectors = 1, kPixels = 6;

  static Vec opaque(Vec value) {
    __asm__ volatile("" : "+x"(value));
    return value;
  }
  static Part opaque(Part part) { return {opaque(part.first), opaque(part.second)}; }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    store_8(_mm256_castsi256_si128(wide.low), base, acc);
    store_8(_mm256_extracti128_si256(wide.low, 1), base + 8, acc + 8);
    store_8(_mm256_castsi256_si128(wide.high), base + 16, acc + 16);
    store_8(_mm256_extracti128_si256(wide.high, 1), base + 24, acc + 24);
  }
  static void store_8(__m128i counts, const int32_t* base, int32_t* acc) {
    const __m256i twice = _mm256_slli_epi32(_mm256_cvtepu16_epi32(counts), 1);
    const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), _mm256_sub_epi32(from, twice));
  }
};

// 8 bits times 8 bits in pairs would saturate at 16, so codes and weights are 16 bits wide: 2 vectors x 6 pixels are 12
// sums, 2 weights, an activation and a product.
struct QuantizedOps : CodeLayout<8, 2, int16_t, int16_t> {
  static constexpr int kVectors = 2, kFewVectors = 1, kPixels = 6;
  using Weights = __m256i;
  using Activation = __m256i;
  using Part = __m256i;  // 8 x 32 bits
  struct Wide {
    __m256i sum;
  };

  static Weights load(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
  static Activation broadcast(const uint8_t* unit) {
    int32_t codes;
    __builtin_memcpy(&codes, unit, 4);
    return _mm256_set1_epi32(codes);
  }
  static void zero(Part& part) { part = _mm256_setzero_si256(); }
  static void zero(Wide& wide) { wide.sum = _mm256_setzero_si256(); }
  static void count(Part& part, Weights w, Activation a) { part = _mm256_add_epi32(part, _mm256_madd_epi16(w, a)); }
  static void flush(Part& part, Wide& wide) { wide.sum = part; }  // nothing was there before
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), _mm256_add_epi32(from, wide.sum));
  }
};

}  // namespace

extern const Variant kAvx2;
const Variant kAvx2 = variant<Ops, EightFloats, OneFloat, FourDoubles>(
    "avx2", quantized<QuantizedOps, EightFloats>(convolve_quantized<QuantizedRow, QuantizedOps, EightFloats>));

}  // namespace siman
