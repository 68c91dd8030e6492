// X >= threshold, packed: bit c of a pixel's words is channel c. A NaN compares false.
//
// A lane is a pixel. Going down from the last channel, each lane doubles what it has and adds the new bit: three
// instructions for a vector of comparisons, and no transposition.
//
// Floats: kLanes, Vec, Bits (unsigned 32-bit lanes), load(const float*), set(float), no_bits(),
// append(Bits, Vec x, Vec threshold), words(Bits low, Bits high, uint64_t*). Ops: kWordBytes, store_word(uint8_t*,
// uint64_t).

template <class Floats>
typename Floats::Bits compare_channels(const float* x, size_t plane, size_t channels, typename Floats::Vec threshold) {
  auto bits = Floats::no_bits();
  for (size_t c = channels; c-- > 0;) bits = Floats::append(bits, Floats::load(x + c * plane), threshold);
  return bits;
}

template <class Floats, class Ops>
void pack_lanes(const PackTask& t, size_t pixel) {
  const auto threshold = Floats::set(t.threshold);
  uint8_t* out = t.packed + pixel * t.pixel_bytes;
  for (size_t c = 0; c < t.channels; c += 64, out += Ops::kWordBytes) {
    const size_t channels = t.channels - c < 64 ? t.channels - c : 64;
    const size_t in_low = channels < 32 ? channels : 32;
    const float* x = t.x + c * t.plane + pixel;
    const auto low = compare_channels<Floats>(x, t.plane, in_low, threshold);
    const auto high = compare_channels<Floats>(x + 32 * t.plane, t.plane, channels - in_low, threshold);
    uint64_t words[Floats::kLanes];
    Floats::words(low, high, words);
    for (int k = 0; k < Floats::kLanes; ++k) Ops::store_word(out + k * t.pixel_bytes, words[k]);
  }
}

// `One` is Floats of a single lane, for what does not fill a vector.
template <class Floats, class One, class Ops>
void pack(const PackTask& t) {
  size_t pixel = t.begin;
  for (; pixel + Floats::kLanes <= t.end; pixel += Floats::kLanes) pack_lanes<Floats, Ops>(t, pixel);
  for (; pixel < t.end; ++pixel) pack_lanes<One, Ops>(t, pixel);
}
