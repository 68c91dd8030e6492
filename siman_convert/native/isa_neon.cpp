// NEON: xor, count bits in bytes, add, for 128 bits; bytes are added in pairs into 16 bits before they are full.
#include <arm_neon.h>

#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/one_lane.inl"
#include "kernels/words.inl"

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
  static Vec prelu(Vec v, Vec slope) { return vbslq_f32(vcgezq_f32(v), v, mul(slope, v)); }
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
  static void words(Bits low, Bits high, uint64_t* words) {
    const uint32x4x2_t both = vzipq_u32(low, high);
    vst1q_u64(words, vreinterpretq_u64_u32(both.val[0]));
    vst1q_u64(words + 2, vreinterpretq_u64_u32(both.val[1]));
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

// 4 vectors x 5 pixels: 20 sums, 4 weights, an activation and scratch of the 32 registers.
struct Ops : WordLayout<2, uint64_t> {
  static constexpr int kVectors = 4, kFewVectors = 2, kPixels = 5;
  static constexpr int64_t kUnitsPerFlush = 31, kFlushes = 132;  // 31*8 < 2^8, 132*31*16 < 2^16
  using Weights = uint8x16_t;
  using Activation = uint8x16_t;
  using Part = uint8x16_t;
  struct Wide {
    uint16x8_t sum;
  };

  static Weights load(const uint8_t* bytes) { return vld1q_u8(bytes); }
  static Activation broadcast(const uint8_t* bytes) {
    uint64_t word;
    __builtin_memcpy(&word, bytes, 8);
    return vreinterpretq_u8_u64(vdupq_n_u64(word));
  }
  template <class Value>
  static Value opaque(Value value) {
    __asm__ volatile("" : "+w"(value));
    return value;
  }
  static void zero(Part& part) { part = vdupq_n_u8(0); }
  static void zero(Wide& wide) { wide.sum = vdupq_n_u16(0); }
  static void count(Part& part, Weights w, Activation a) { part = vaddq_u8(part, vcntq_u8(veorq_u8(w, a))); }
  static void flush(Part& part, Wide& wide) {
    wide.sum = vpadalq_u8(wide.sum, part);
    zero(part);
  }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    const uint64x2_t counts = vpaddlq_u32(vpaddlq_u16(wide.sum));
    const int32x2_t twice = vreinterpret_s32_u32(vshl_n_u32(vmovn_u64(counts), 1));
    vst1_s32(acc, vsub_s32(vld1_s32(base), twice));
  }
};

}  // namespace

extern const Variant kNeon;
const Variant kNeon = variant<Ops, FourFloats, OneFloat, TwoDoubles>("neon");

}  // namespace siman
