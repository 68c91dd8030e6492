// NEON: xor, count bits in bytes, add, for 128 bits; bytes are added in pairs into 16 bits before they are full.
//
// Two pipes count: 1.5 cycles for 128 bits at best. Predicted by llvm-mca (tests/native/mca.py): 1.50 on Cortex-A72
// and, by LLVM 19's model, Neoverse N1. With words duplicated on loading and 5 pixels, so that a sum was
// spilled: 1.63, 1.68. Carry-save adders save nothing: for 3 vectors they take as many instructions, 9, and more
// beyond.
#include <arm_neon.h>

#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/one_lane.inl"
#include "kernels/words.inl"
#include "kernels/codes.inl"

struct FourFloats {
  static constexpr int kLanes = 4;
  using Vec = float32x4_t;
  using Bits = uint32x4_t;

  static Vec load(const float* x) { return vld1q_f32(x); }
  static void store(float* y, Vec v) { vst1q_f32(y, v); }
  static Vec load_some(const float* x, size_t count) {
    float some[kLanes] = {};
    for (size_t k = 0; k < count; ++k) some[k] = x[k];
    return load(some);
  }
  static void store_some(float* y, Vec v, size_t count) {
    float some[kLanes];
    store(some, v);
    for (size_t k = 0; k < count; ++k) y[k] = some[k];
  }
  static Vec set(float x) { return vdupq_n_f32(x); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec larger(Vec v, Vec m) { return vbslq_f32(vcgtq_f32(v, m), v, m); }
  static Vec prelu(Vec v, Vec slope) { return vbslq_f32(vcgezq_f32(v), v, mul(slope, v)); }
  static Vec signs(Vec x, Vec threshold) { return vbslq_f32(vcgeq_f32(x, threshold), set(1), set(-1)); }
  static Vec from_ints(const int32_t* x) { return vcvtq_f32_s32(vld1q_s32(x)); }

  static void transpose(Vec (&r)[4]) {
    const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
  }

  static Bits no_bits() { return vdupq_n_u32(0); }
  static Bits append(Bits bits, Vec x, Vec threshold) {
    return vsubq_u32(vaddq_u32(bits, bits), vcgeq_f32(x, threshold));
  }
  static Bits tally(Bits counts, Vec x, Vec bound) { return vsubq_u32(counts, vcleq_f32(x, bound)); }
  static void words(Bits low, Bits high, uint64_t* words) {
    const uint32x4x2_t both = vzipq_u32(low, high);
    vst1q_u64(words, vreinterpretq_u64_u32(both.val[0]));
    vst1q_u64(words + 2, vreinterpretq_u64_u32(both.val[1]));
  }

  static Bits steps(Vec x, Vec scale, Vec lowest, Vec highest) {
    const Vec d = vminq_f32(vmaxnmq_f32(vdivq_f32(x, scale), lowest), highest);  // of a NaN and a number: the number
    return vreinterpretq_u32_s32(vcvtnq_s32_f32(d));
  }
  template <int Width>
  static Bits shift_in(Bits bits, Bits d) {
    return vaddq_u32(vshlq_n_u32(bits, Width), d);
  }
  static Bits offset(Bits bits, uint32_t add, uint32_t flip) {
    return veorq_u32(vaddq_u32(bits, vdupq_n_u32(add)), vdupq_n_u32(flip));
  }
};

struct TwoDoubles {
  static constexpr int kLanes = 2;
  using Vec = float64x2_t;

  static Vec zero() { return vdupq_n_f64(0); }
  static Vec add(Vec a, Vec b) { return vaddq_f64(a, b); }
  static Vec widen(const float* x) { return vcvt_f64_f32(vld1_f32(x)); }
  static void store(double* out, Vec v) { vst1q_f64(out, v); }
};

// A vector is 2 registers of 2 filters: 8 registers of filters x 4 pixels are 16 sums, 4 weights and 12 left for the
// steps in between. A packed pixel holds each word twice, so that it is loaded as it is xored: to duplicate a word is
// one more instruction for the pipes that count.
struct Ops : WordLayout<4, uint64_t> {
  static constexpr int kVectors = 2, kFewVectors = 1, kPixels = 4;
  static constexpr int kUnitBytes = 16, kWordBytes = 16;
  static constexpr int64_t kUnitsPerFlush = 31, kFlushes = 66;  // 31*8 < 2^8, 66*31*16*2 < 2^16
  struct Weights {
    uint8x16_t low, high;  // filters 0 and 1, 2 and 3
  };
  using Activation = uint8x16_t;
  struct Part {
    uint8x16_t low, high;
  };
  struct Wide {
    uint16x8_t low, high;
  };

  static Weights load(const uint8_t* bytes) { return {vld1q_u8(bytes), vld1q_u8(bytes + 16)}; }
  static Activation broadcast(const uint8_t* bytes) { return vld1q_u8(bytes); }
  static Activation opaque(Activation value) {
    __asm__ volatile("" : "+w"(value));
    return value;
  }
  static Weights opaque(Weights value) { return {opaque(value.low), opaque(value.high)}; }
  static Part opaque(Part value) { return value; }  // GCC would copy it, and keeps to the order as it is
  static void zero(Part& part) { part.low = part.high = vdupq_n_u8(0); }
  static void zero(Wide& wide) { wide.low = wide.high = vdupq_n_u16(0); }
  static void count(Part& part, Weights w, Activation a) {
    part.low = vaddq_u8(part.low, vcntq_u8(veorq_u8(w.low, a)));
    part.high = vaddq_u8(part.high, vcntq_u8(veorq_u8(w.high, a)));
  }
  static void flush(Part& part, Wide& wide) {
    wide.low = vpadalq_u8(wide.low, part.low);
    wide.high = vpadalq_u8(wide.high, part.high);
    zero(part);
  }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    const uint32x4_t counts = vpaddlq_u16(vpaddq_u16(wide.low, wide.high));
    const int32x4_t twice = vreinterpretq_s32_u32(vshlq_n_u32(counts, 1));
    vst1q_s32(acc, vsubq_s32(vld1q_s32(base), twice));
  }

  static void store_word(uint8_t* out, uint64_t word) { vst1q_u8(out, vreinterpretq_u8_u64(vdupq_n_u64(word))); }
};

// ARMv8.0 multiplies 16 bits into 32, 4 filters an instruction: 2 vectors x 5 pixels are 20 sums, 2 weights and 5
// activations of the 32 registers there are.
struct QuantizedOps : CodeLayout<8, 1, int16_t, int16_t> {
  static constexpr int kVectors = 2, kFewVectors = 1, kPixels = 5;
  using Weights = int16x8_t;
  using Activation = int16x4_t;  // the code, and what follows it: to load a single one takes another instruction
  struct Part {
    int32x4_t low, high;
  };
  using Wide = Part;

  static Weights load(const uint8_t* bytes) { return vreinterpretq_s16_u8(vld1q_u8(bytes)); }
  static Activation broadcast(const uint8_t* unit) { return vreinterpret_s16_u8(vld1_u8(unit)); }
  static void zero(Part& part) { part.low = part.high = vdupq_n_s32(0); }
  static void count(Part& part, Weights w, Activation a) {
    part.low = vmlal_lane_s16(part.low, vget_low_s16(w), a, 0);
    part.high = vmlal_high_lane_s16(part.high, w, a, 0);
  }
  static void flush(Part& part, Wide& wide) { wide = part; }  // nothing was there before
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    vst1q_s32(acc, vaddq_s32(vld1q_s32(base), wide.low));
    vst1q_s32(acc + 4, vaddq_s32(vld1q_s32(base + 4), wide.high));
  }
};

}  // namespace

extern const Variant kNeon;
const Variant kNeon = variant<Ops, FourFloats, OneFloat, TwoDoubles>(
    "neon", quantized<QuantizedOps, FourFloats>(convolve_quantized<QuantizedRow, QuantizedOps, FourFloats>));

}  // namespace siman
