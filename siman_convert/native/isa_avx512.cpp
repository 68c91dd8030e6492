// AVX-512 with VPOPCNTDQ and VNNI.
//
// Measured on a Sapphire Rapids, one core, G one-bit MAC/s: these three instructions on registers 953, counting 64-bit
// lanes or bytes (with VNNI to add them) the same; look-up tables of one pixel, of 16 bytes 676, of 64 bytes (VPERMB)
// 1000 but for 6 channels a step, of 128 bytes 571. AVX2's tables of two pixels, not measured there, take as many
// instructions as these three for as many bits.
#include <immintrin.h>

#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/one_lane.inl"
#include "kernels/words.inl"
#include "kernels/codes.inl"
#include "kernels/avx512.inl"
#include "kernels/vpopcnt.inl"

}  // namespace

extern const Variant kAvx512;
const Variant kAvx512 = variant<Ops, SixteenFloats, OneFloat, EightDoubles>(
    "avx512", quantized<QuantizedOps, SixteenFloats>(convolve_quantized<QuantizedRow, QuantizedOps, SixteenFloats>));

}  // namespace siman
