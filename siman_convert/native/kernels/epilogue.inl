// From acc to Y, in float32, each operation rounded:
//   v = scale*acc + bias + residual;   Y = v >= 0 ? v : slope*v       (a NaN compares false and stays NaN)
//
// acc lies [pixel][filter], Y lies [filter][pixel]: blocks of kLanes x kLanes are transposed on the way.
//
// Floats: kLanes, Vec, load, store, load_some(const float*, count), store_some(float*, Vec, count), set, mul, add,
// prelu(v, slope), from_ints(const int32_t*), transpose(Vec
// (&)[kLanes]).

template <class Floats>
SIMAN_INLINE typename Floats::Vec load_up_to(const float* x, size_t count) {
  return count == Floats::kLanes ? Floats::load(x) : Floats::load_some(x, count);
}

template <class Floats>
SIMAN_INLINE void store_up_to(float* y, typename Floats::Vec v, size_t count) {
  count == Floats::kLanes ? Floats::store(y, v) : Floats::store_some(y, v, count);
}

// What differs from filter to filter before the transposition, for kLanes of them, or as many as are left.
template <class Floats>
struct Filters {
  size_t first, count;
  typename Floats::Vec scale, bias;

  SIMAN_INLINE Filters(const ConvTask& t, size_t filter) : first(filter) {
    const size_t left = static_cast<size_t>(t.filters) - filter;
    count = left < Floats::kLanes ? left : Floats::kLanes;
    scale = load_up_to<Floats>(t.scale + filter, count);
    bias = load_up_to<Floats>(t.bias + filter, count);
  }
};

// These filters x `count` <= kLanes pixels from flat output position `pixel` on.
template <class Floats>
SIMAN_INLINE void finish_block(const ConvTask& t, const Filters<Floats>& filters, const int32_t* acc, size_t stride,
                               size_t pixel, size_t count) {
  constexpr size_t kLanes = Floats::kLanes;
  typename Floats::Vec block[kLanes];
  for (size_t k = 0; k < kLanes; ++k)
    block[k] = Floats::add(Floats::mul(filters.scale, Floats::from_ints(acc + k * stride)), filters.bias);
  Floats::transpose(block);
  // Copies, as a store of a vector could change t for all the compiler knows.
  const size_t plane = static_cast<size_t>(t.rows.out * t.columns.out), first = filters.first * plane + pixel;
  const bool residual_is_full = t.residual_is_full;
  const float *slope = t.slope + filters.first, *residual = residual_is_full ? t.residual + first : t.residual;
  float* y = t.y + first;
  for (size_t k = 0; k < filters.count; ++k, y += plane) {
    const auto added = residual_is_full ? load_up_to<Floats>(residual + k * plane, count) : Floats::set(*residual);
    store_up_to<Floats>(y, Floats::prelu(Floats::add(block[k], added), Floats::set(slope[k])), count);
  }
}

// `count` pixels from `pixel` on; the rows of acc, one a pixel, are `stride` filters apart and filled up to whole
// vectors.
template <class Floats>
void epilogue(const ConvTask& t, const int32_t* acc, size_t stride, size_t pixel, size_t count) {
  constexpr size_t kLanes = Floats::kLanes;
  for (size_t filter = 0; filter < static_cast<size_t>(t.filters); filter += kLanes) {
    const Filters<Floats> filters(t, filter);
    size_t p = 0;
    for (; p + kLanes <= count; p += kLanes)
      finish_block<Floats>(t, filters, acc + p * stride + filter, stride, pixel + p, kLanes);
    if (p < count) finish_block<Floats>(t, filters, acc + p * stride + filter, stride, pixel + p, count - p);
  }
}
