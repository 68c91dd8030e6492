// Floats and Doubles of a single lane: the scalar variant, and what is left over in the others.

struct OneFloat {
  static constexpr int kLanes = 1;
  using Vec = float;
  using Bits = uint64_t;

  static Vec load(const float* x) { return *x; }
  static void store(float* y, Vec v) { *y = v; }
  static Vec load_some(const float*, size_t) { return 0; }  // there are none between 0 and 1
  static void store_some(float*, Vec, size_t) {}
  static Vec set(float x) { return x; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec larger(Vec v, Vec m) { return v > m ? v : m; }
  static Vec prelu(Vec v, Vec slope) { return v >= 0 ? v : slope * v; }
  static Vec signs(Vec x, Vec threshold) { return x >= threshold ? 1.0f : -1.0f; }
  static Vec from_ints(const int32_t* x) { return static_cast<float>(*x); }
  static void transpose(Vec (&)[1]) {}

  static Bits no_bits() { return 0; }
  static Bits append(Bits bits, Vec x, Vec threshold) { return 2 * bits + (x >= threshold); }
  static Bits tally(Bits counts, Vec x, Vec bound) { return counts + (x <= bound); }
  static void words(Bits low, Bits high, uint64_t* words) { *words = low | high << 32; }

  static Bits steps(Vec x, Vec scale, Vec lowest, Vec highest) {
    constexpr float kNoFraction = 12582912.0f;  // 1.5*2^23: a float of this size is an integer
    const float from = x / scale >= lowest ? x / scale : lowest, d = from <= highest ? from : highest;
    return static_cast<Bits>(static_cast<int32_t>((d + kNoFraction) - kNoFraction));
  }
  template <int Width>
  static Bits shift_in(Bits bits, Bits d) {
    return (bits << Width) + d;
  }
  static Bits offset(Bits bits, uint32_t add, uint32_t flip) { return (static_cast<uint32_t>(bits) + add) ^ flip; }
};

struct OneDouble {
  static constexpr int kLanes = 1;
  using Vec = double;

  static Vec zero() { return 0; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec widen(const float* x) { return *x; }
  static void store(double* out, Vec v) { *out = v; }
};
