// X >= threshold, packed: bit c of a pixel's words is channel c. A NaN compares false.
//
// A lane is a pixel. Going down from the last channel, each lane doubles what it has and adds the new bit: three
// instructions for a vector of comparisons, and no transposition.
//
// Floats: kLanes, Vec, Bits (unsigned 32-bit lanes), load(const float*), set(float), no_bits(),
// append(Bits, Vec x, Vec threshold), words(Bits low, Bits high, uint64_t*). Ops: kWordBytes, store_word(uint8_t*,
// uint64_t).

// Of Ops that take words as they are.
struct PlainWords {
  static constexpr int kWordBytes = 8;

  static void store_word(uint8_t* out, uint64_t word) { __builtin_memcpy(out, &word, kWordBytes); }
};

// Of V vectors of pixels: as many planes as there are channels are read in turns, in pieces of a few cache lines, which
// is more than a processor foresees. So where there are several vectors, those after them are asked for.
template <class Floats, int V>
SIMAN_INLINE void compare_channels(const float* x, size_t plane, size_t channels, typename Floats::Vec threshold,
                                   typename Floats::Bits (&bits)[V]) {
  for (auto& vector : bits) vector = Floats::no_bits();
  constexpr int kPixels = V * Floats::kLanes, kLine = 64 / sizeof(float);
  for (size_t c = channels; c-- > 0;) {
    const float* row = x + c * plane;
    for (int i = 0; V > 1 && i < kPixels; i += kLine) __builtin_prefetch(row + kPixels + i);
    for (int v = 0; v < V; ++v) bits[v] = Floats::append(bits[v], Floats::load(row + v * Floats::kLanes), threshold);
  }
}

template <class Floats, class Ops, int V>
void pack_lanes(const PackTask& t, size_t pixel) {
  const auto threshold = Floats::set(t.threshold);
  uint8_t* out = t.packed + pixel * t.pixel_bytes;
  for (size_t c = 0; c < t.channels; c += 64, out += Ops::kWordBytes) {
    const size_t channels = t.channels - c < 64 ? t.channels - c : 64;
    const size_t in_low = channels < 32 ? channels : 32;
    const float* x = t.x + c * t.plane + pixel;
    typename Floats::Bits low[V], high[V];
    compare_channels<Floats>(x, t.plane, in_low, threshold, low);
    compare_channels<Floats>(x + 32 * t.plane, t.plane, channels - in_low, threshold, high);
    for (int v = 0; v < V; ++v) {
      uint64_t words[Floats::kLanes];
      Floats::words(low[v], high[v], words);
      for (int k = 0; k < Floats::kLanes; ++k)
        Ops::store_word(out + (v * Floats::kLanes + k) * t.pixel_bytes, words[k]);
    }
  }
}

// What is left over of the vectors is packed by one that begins before it, whose other pixels are the same a second
// time. `One` is Floats of a single lane, for fewer pixels than a vector has.
template <class Floats, class One, class Ops>
void pack(const PackTask& t) {
  constexpr int kMany = 4;
  size_t pixel = t.begin;
  for (; pixel + kMany * Floats::kLanes <= t.end; pixel += kMany * Floats::kLanes)
    pack_lanes<Floats, Ops, kMany>(t, pixel);
  for (; pixel + Floats::kLanes <= t.end; pixel += Floats::kLanes) pack_lanes<Floats, Ops, 1>(t, pixel);
  if (pixel == t.end) return;
  if (t.end - t.begin >= Floats::kLanes) return pack_lanes<Floats, Ops, 1>(t, t.end - Floats::kLanes);
  for (; pixel < t.end; ++pixel) pack_lanes<One, Ops, 1>(t, pixel);
}
