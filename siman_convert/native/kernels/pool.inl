// A quantized convolution with a max pool behind it: its values are kept by pixels, as acc is, for as many rows as a
// window has, and only what comes out of the pool is transposed and written.
//
//   Y = the largest value of a window's taps that are inside the image; a NaN compares false and is never it
//
// Floats, besides what epilogue.inl names: larger(Vec v, Vec m), which is v > m ? v : m.

// As the epilogue, for `count` pixels of one row: prelu(scale*acc + bias, slope), and no residual. Lanes that are no
// filter become 0.
template <class Floats, size_t kFilters>
void keep_values(const ConvTask& t, const int32_t* acc, size_t pixel, size_t count) {
  const auto columns = static_cast<size_t>(t.columns.out), filters = static_cast<size_t>(t.filters);
  const size_t row = pixel / columns % static_cast<size_t>(t.kept_rows);
  float* kept = t.kept + (row * columns + pixel % columns) * kFilters;
  for (size_t f = 0; f < kFilters; f += Floats::kLanes) {
    const size_t left = f < filters ? filters - f : 0, lanes = left < Floats::kLanes ? left : Floats::kLanes;
    const auto of_filters = [&](const float* x) { return lanes ? load_up_to<Floats>(x + f, lanes) : Floats::set(0); };
    const auto scale = of_filters(t.scale), bias = of_filters(t.bias), slope = of_filters(t.slope);
    for (size_t p = 0; p < count; ++p) {
      const auto v = Floats::add(Floats::mul(scale, Floats::from_ints(acc + p * kFilters + f)), bias);
      Floats::store(kept + p * kFilters + f, Floats::prelu(v, slope));
    }
  }
}

// All filters of output pixel x, from the rows of taps that are inside.
template <class Floats, size_t kFilters>
SIMAN_INLINE void largest(const ConvTask& t, Taps rows, int64_t x,
                          typename Floats::Vec (&m)[kFilters / Floats::kLanes]) {
  const Axis& axis = t.pool_columns;
  const Taps taps = taps_inside(axis, x);
  const size_t left = static_cast<size_t>(x * axis.stride - axis.pad + taps.first) * kFilters;
  for (auto& vector : m) vector = Floats::set(-__builtin_inff());
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const float* kept = t.kept + static_cast<size_t>(row % t.kept_rows * t.columns.out) * kFilters + left;
    for (int64_t i = taps.first; i < taps.last; ++i, kept += kFilters)
      for (size_t k = 0; k < kFilters / Floats::kLanes; ++k)
        m[k] = Floats::larger(Floats::load(kept + k * Floats::kLanes), m[k]);
  }
}

// Row y of Y; `rows` are rows of the convolution.
template <class Floats, size_t kFilters>
void pool_row(const ConvTask& t, Taps rows, int64_t y) {
  constexpr size_t kLanes = Floats::kLanes, kVectors = kFilters / kLanes;
  const auto filters = static_cast<size_t>(t.filters), columns = static_cast<size_t>(t.pool_columns.out);
  const size_t plane = static_cast<size_t>(t.pool_rows.out) * columns;
  for (size_t x = 0; x < columns; x += kLanes) {
    const size_t count = columns - x < kLanes ? columns - x : kLanes;
    typename Floats::Vec blocks[kVectors][kLanes] = {};
    for (size_t p = 0; p < count; ++p) {
      typename Floats::Vec m[kVectors];
      largest<Floats, kFilters>(t, rows, static_cast<int64_t>(x + p), m);
      for (size_t k = 0; k < kVectors; ++k) blocks[k][p] = m[k];
    }
    for (size_t f = 0; f < filters; f += kLanes) {
      auto& block = blocks[f / kLanes];
      Floats::transpose(block);
      float* to = t.y + f * plane + static_cast<size_t>(y) * columns + x;
      for (size_t k = 0; k < kLanes && f + k < filters; ++k) store_up_to<Floats>(to + k * plane, block[k], count);
    }
  }
}

// A row of the convolution is computed once, when the first window needs it.
template <class Row, class Ops, class Floats, int F>
void convolve_and_pool_block(const ConvTask& t) {
  static_assert(F * Ops::kLanes % Floats::kLanes == 0);
  constexpr size_t kFilters = F * Ops::kLanes;
  Acc<Ops, F> acc;
  const auto keep = [&](size_t pixel, size_t count) { keep_values<Floats, kFilters>(t, acc.sums, pixel, count); };
  int64_t next = 0;
  for (int64_t y = t.row_begin; y < t.row_end; ++y) {
    const int64_t top = y * t.pool_rows.stride - t.pool_rows.pad;
    const Taps taps = taps_inside(t.pool_rows, y), rows{top + taps.first, top + taps.last};
    next = next < rows.first ? rows.first : next;
    for (; next < rows.last; ++next) convolve_rows<Row, Ops, F>(t, next, next + 1, acc, keep);
    pool_row<Floats, kFilters>(t, rows, y);
  }
}

template <template <class, int> class Row, class Ops, class Floats>
void convolve_quantized(const ConvTask& t) {
  constexpr int kMany = Ops::kVectors, kFew = Ops::kFewVectors;
  if (!t.kept) return convolve<Row, Ops, Floats>(t);
  if (t.vectors == kMany) return convolve_and_pool_block<Row<Ops, kMany>, Ops, Floats, kMany>(t);
  convolve_and_pool_block<Row<Ops, kFew>, Ops, Floats, kFew>(t);
}
