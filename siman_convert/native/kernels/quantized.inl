// The quantized convolution: X to codes, and rows of the output that know no edge.
//
//   d = clip(round_half_even(X / scale), lowest, lowest + 255),   acc = the sum of d*w,   |acc| < 2^24
// A code is d itself, or d + zero point, which is d - lowest, where an instruction wants 8 bits without a sign:
//   acc = base + the sum of code*w,   base = -zero_point * (the sum of w), or 0
// The codes lie as an image with its padding, so that each tap is inside, [row][column][channel]: the taps of a kernel
// row follow one another, and are one long tap of kW*channels. Its last unit may reach into what follows; the weights
// there are 0.
//
// d is clipped first and rounded then, which is the same between bounds that are integers; a NaN becomes `lowest`.
//
// Floats (besides what pack.inl and epilogue.inl name): steps(Vec x, Vec scale, Vec lowest, Vec highest), which is d in
// Bits; shift_in<Width>(Bits, Bits), which is the first shifted left by Width bits, plus the second;
// offset(Bits, uint32_t add, uint32_t flip), which is (Bits + add) ^ flip. Ops: Code.

// What one run shares: how d is made, and how it becomes a code.
template <class Floats>
struct Steps {
  typename Floats::Vec scale, lowest, highest;
  uint32_t add, flip;
};

// Horner's rule over integers puts several d into one word. The borrows of those below 0 go away as every one is made
// 0 or more, by adding the zero point or half of the range; to undo the latter is to flip the sign.
template <class Floats, class Code>
SIMAN_INLINE Steps<Floats> steps_of(const QuantizeTask& t) {
  const auto zero_point = static_cast<uint32_t>(-t.lowest);
  const uint32_t half = 0x80008000u, add = sizeof(Code) == 1 ? zero_point * 0x01010101u : half;
  return {Floats::set(t.scale), Floats::set(t.lowest), Floats::set(t.lowest + 255), add, sizeof(Code) == 1 ? 0 : half};
}

// `count` pixels, `step` floats apart.
template <class Floats>
SIMAN_INLINE typename Floats::Vec load_pixels(const float* x, size_t step, size_t count) {
  if (step == 1) return load_up_to<Floats>(x, count);
  float pixels[Floats::kLanes] = {};
  for (size_t k = 0; k < count; ++k) pixels[k] = x[k * step];
  return Floats::load(pixels);
}

// The codes of up to 32 bits of channels from x on, the first in the lowest bits.
template <class Floats, class Code>
SIMAN_INLINE typename Floats::Bits code_channels(const QuantizeTask& t, const Steps<Floats>& steps, const float* x,
                                                 size_t channels, size_t count) {
  auto bits = Floats::no_bits();
  for (size_t c = channels; c-- > 0;) {
    const auto pixels = load_pixels<Floats>(x + c * t.plane, t.step, count);
    const auto d = Floats::steps(pixels, steps.scale, steps.lowest, steps.highest);
    bits = Floats::template shift_in<8 * sizeof(Code)>(bits, d);
  }
  return Floats::offset(bits, steps.add, steps.flip);
}

// One word a pixel. Where a word is longer than what is left of its pixel it runs into the next one, which is written
// afterwards; at the end there is none.
inline void store_words(const uint64_t* words, size_t count, size_t pixel_bytes, uint8_t* at, const uint8_t* end) {
  size_t k = 0;
  for (; k < count && end - at >= 8; ++k, at += pixel_bytes) __builtin_memcpy(at, words + k, 8);
  for (; k < count; ++k, at += pixel_bytes) __builtin_memcpy(at, words + k, static_cast<size_t>(end - at));
}

// `count` <= kLanes pixels from `pixel` on. The last channels come first: they may run into the next pixel's first.
template <class Floats, class Code>
SIMAN_INLINE void quantize_lanes(const QuantizeTask& t, const Steps<Floats>& steps, size_t pixel, size_t count) {
  constexpr size_t kHalf = 4 / sizeof(Code), kWord = 2 * kHalf;
  const size_t pixel_bytes = t.channels * sizeof(Code);
  const uint8_t* end = t.codes + t.pixels * pixel_bytes;
  for (size_t c = round_up_div(t.channels, kWord) * kWord; c > 0; c -= kWord) {
    const size_t first = c - kWord, left = t.channels - first;
    const size_t in_low = left < kHalf ? left : kHalf, in_both = left < kWord ? left : kWord;
    const float *low = t.x + pixel * t.step + first * t.plane, *high = low + kHalf * t.plane;
    uint64_t words[Floats::kLanes];
    Floats::words(code_channels<Floats, Code>(t, steps, low, in_low, count),
                  code_channels<Floats, Code>(t, steps, high, in_both - in_low, count), words);
    store_words(words, count, pixel_bytes, t.codes + pixel * pixel_bytes + first * sizeof(Code), end);
  }
}

template <class Floats, class Ops>
void quantize(const QuantizeTask& task) {
  const QuantizeTask t = task;  // a store of codes could change `task` for all the compiler knows
  const auto steps = steps_of<Floats, typename Ops::Code>(t);
  size_t pixel = 0;
  for (; pixel + Floats::kLanes <= t.pixels; pixel += Floats::kLanes)
    quantize_lanes<Floats, typename Ops::Code>(t, steps, pixel, Floats::kLanes);
  if (pixel < t.pixels) quantize_lanes<Floats, typename Ops::Code>(t, steps, pixel, t.pixels - pixel);
}

template <class Ops, int F>
struct QuantizedRow {
  static constexpr bool kAlwaysWhole = false;

  const ConvTask& t;
  int64_t y;

  explicit QuantizedRow(const ConvTask& task) : t(task) {}
  void start(int64_t at) { y = at; }

  template <int P>
  void tile(int64_t x, int32_t* acc) const {
    const int32_t* from[P];
    for (auto& pixel : from) pixel = t.base;
    tile_inside<Ops, F, P>(t, {0, t.rows.kernel}, y, x, from, acc);
  }
};
