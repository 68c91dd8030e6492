// AVX-512 with VPOPCNTDQ: xor, count and add for 512 bits. Everything but the counting is AVX2's, which these
// processors have too; what is here has only been compiled and run with emulated intrinsics, not on such a processor.
#include <immintrin.h>

#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/one_lane.inl"
#include "kernels/avx2.inl"
#include "kernels/words.inl"

// 4 vectors x 6 pixels: 24 sums, 4 weights, an activation and a scratch register of the 32 there are.
struct Ops : WordLayout<8> {
  static constexpr int kVectors = 4, kFewVectors = 1, kPixels = 6;
  static constexpr int64_t kUnitsPerFlush = 1 << 24, kFlushes = 2;  // never in between: at most 2^24 units
  using Weights = __m512i;
  using Activation = __m512i;
  using Part = __m512i;  // 8 x 64 bits
  struct Wide {
    __m512i sum;
  };

  static Weights load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Activation broadcast(const uint8_t* bytes) {
    int64_t word;
    __builtin_memcpy(&word, bytes, 8);
    return _mm512_set1_epi64(word);
  }
  template <class Value>
  static Value opaque(Value value) {
    __asm__ volatile("" : "+v"(value));
    return value;
  }
  static void zero(Part& part) { part = _mm512_setzero_si512(); }
  static void zero(Wide& wide) { wide.sum = _mm512_setzero_si512(); }
  static void count(Part& part, Weights w, Activation a) {
    part = _mm512_add_epi64(part, _mm512_popcnt_epi64(_mm512_xor_si512(w, a)));
  }
  static void flush(Part& part, Wide& wide) {
    wide.sum = _mm512_add_epi64(wide.sum, part);
    zero(part);
  }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    const __m256i counts = _mm512_maskz_cvtepi64_epi32(0xFF, wide.sum);  // GCC 12 warns of the unmasked one
    const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), _mm256_sub_epi32(from, _mm256_slli_epi32(counts, 1)));
  }
};

}  // namespace

extern const Variant kAvx512;
const Variant kAvx512 = variant<Ops, EightFloats, OneFloat, FourDoubles>("avx512");

}  // namespace siman
