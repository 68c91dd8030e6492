// AVX-512 with VNNI and without VPOPCNTDQ (Cascade Lake, Cooper Lake): bits are looked up as AVX2 does it, 64 filters
// at a time; codes are multiplied as the variant with VPOPCNTDQ does it.
#include <immintrin.h>

#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/one_lane.inl"
#include "kernels/codes.inl"
#include "kernels/nibbles.inl"
#include "kernels/avx512.inl"

struct Ops : NibbleLayout<64> {
  static constexpr int kVectors = 2, kFewVectors = 1, kPixels = 8;
  using Weights = __m512i;
  using Activation = __m512i;
  using Part = __m512i;  // 64 bytes
  struct Wide {
    __m512i low, high;  // 32 x 16 bits each: filters 0..31 and 32..63
  };

  static Weights load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Activation broadcast(const uint8_t* unit) { return _mm512_maskz_broadcast_i32x4(0xFFFF, table_of(unit)); }
  template <class Value>
  static Value opaque(Value value) {
    __asm__ volatile("" : "+v"(value));
    return value;
  }
  static void zero(Part& part) { part = _mm512_setzero_si512(); }
  static void zero(Wide& wide) { wide.low = wide.high = _mm512_setzero_si512(); }
  static void count(Part& part, Weights w, Activation table) {
    part = _mm512_add_epi8(part, _mm512_shuffle_epi8(table, w));
  }
  static void flush(Part& part, Wide& wide) {
    wide.low = _mm512_add_epi16(wide.low, _mm512_and_si512(part, _mm512_set1_epi16(0xFF)));
    wide.high = _mm512_add_epi16(wide.high, _mm512_srli_epi16(part, 8));
    zero(part);
  }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    store_16(half<0>(wide.low), base, acc);
    store_16(half<1>(wide.low), base + 16, acc + 16);
    store_16(half<0>(wide.high), base + 32, acc + 32);
    store_16(half<1>(wide.high), base + 48, acc + 48);
  }
  template <int Which>
  static __m256i half(__m512i counts) {
    return _mm512_maskz_extracti64x4_epi64(0xF, counts, Which);
  }
  static void store_16(__m256i counts, const int32_t* base, int32_t* acc) {
    const __m512i twice = _mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, counts), 1);
    _mm512_storeu_si512(acc, _mm512_sub_epi32(_mm512_loadu_si512(base), twice));
  }
};

}  // namespace

extern const Variant kAvx512Vnni;
const Variant kAvx512Vnni = variant<Ops, SixteenFloats, OneFloat, EightDoubles>(
    "avx512vnni",
    quantized<QuantizedOps, SixteenFloats>(convolve_quantized<QuantizedRow, QuantizedOps, SixteenFloats>));

}  // namespace siman
