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

struct Bytes64 {
  static constexpr int kBytes = 64;
  using Vec = __m512i;

  static Vec load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Vec table(const uint8_t* bytes) {
    return _mm512_maskz_broadcast_i32x4(0xFFFF, _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static Vec set(uint16_t lane) { return _mm512_set1_epi16(static_cast<int16_t>(lane)); }
  static Vec look_up(Vec table, Vec indices) { return _mm512_shuffle_epi8(table, indices); }
  static Vec add_bytes(Vec a, Vec b) { return _mm512_add_epi8(a, b); }
  static Vec add(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
  static Vec subtract(Vec a, Vec b) { return _mm512_sub_epi16(a, b); }
  static Vec both(Vec a, Vec b) { return _mm512_and_si512(a, b); }
  template <int Bits>
  static Vec shifted_right(Vec a) {
    return _mm512_srli_epi16(a, Bits);
  }
};

struct Ops : NibbleOps<Bytes64> {
  static constexpr int kVectors = 2, kFewVectors = 1, kPixels = 8;

  static Vec opaque(Vec value) {
    __asm__ volatile("" : "+v"(value));
    return value;
  }
  static Part opaque(Part part) { return {opaque(part.first), opaque(part.second)}; }
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
