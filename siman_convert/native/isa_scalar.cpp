// Portable: one filter at a time, 64 channels a step. At the x86-64 floor there is no POPCNT instruction; the compiler
// then calls a table look-up, so that this variant says that results are right, not how fast a processor can be.
#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/one_lane.inl"
#include "kernels/words.inl"
#include "kernels/codes.inl"

struct Ops : WordLayout<1, uint64_t> {
  static constexpr int kVectors = 4, kFewVectors = 1, kPixels = 2;
  static constexpr int64_t kUnitsPerFlush = kMostUnits, kFlushes = 1;
  using Weights = uint64_t;
  using Activation = uint64_t;
  using Part = int64_t;
  struct Wide {
    int64_t sum;
  };

  static uint64_t load(const uint8_t* bytes) {
    uint64_t word;
    __builtin_memcpy(&word, bytes, 8);
    return word;
  }
  static uint64_t broadcast(const uint8_t* bytes) { return load(bytes); }
  template <class Value>
  static Value opaque(Value value) {
    __asm__ volatile("" : "+r"(value));
    return value;
  }
  static void zero(Part& part) { part = 0; }
  static void zero(Wide& wide) { wide.sum = 0; }
  static void count(Part& part, uint64_t w, uint64_t a) { part += __builtin_popcountll(w ^ a); }
  static void flush(Part& part, Wide& wide) {
    wide.sum += part;
    part = 0;
  }
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) {
    *acc = *base - 2 * static_cast<int32_t>(wide.sum);
  }
};

struct QuantizedOps : CodeLayout<1, 1, int16_t, int16_t> {
  static constexpr int kVectors = 4, kFewVectors = 1, kPixels = 2;
  using Weights = int32_t;
  using Activation = int32_t;
  using Part = int32_t;
  struct Wide {
    int32_t sum;
  };

  static int32_t load(const uint8_t* bytes) {
    int16_t value;
    __builtin_memcpy(&value, bytes, 2);
    return value;
  }
  static int32_t broadcast(const uint8_t* unit) { return load(unit); }
  static void zero(Part& part) { part = 0; }
  static void zero(Wide& wide) { wide.sum = 0; }
  static void count(Part& part, int32_t w, int32_t a) { part += w * a; }
  static void flush(Part& part, Wide& wide) { wide.sum = part; }  // nothing was there before
  static void store(const Wide& wide, const int32_t* base, int32_t* acc) { *acc = *base + wide.sum; }
};

}  // namespace

extern const Variant kScalar;
const Variant kScalar = variant<Ops, OneFloat, OneFloat, OneDouble>(
    "scalar", quantized<QuantizedOps, OneFloat>(convolve_quantized<QuantizedRow, QuantizedOps, OneFloat>));

}  // namespace siman
