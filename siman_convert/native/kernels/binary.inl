// The binary convolution: rows of the output with all that the edge of the image asks for.
//
// Where the bits of activation and weight agree the product is +1, where they differ it is -1: over the taps inside the
// image, acc = channels*taps_inside - 2*differing_inside. Rows of taps outside the image are left out. A tap left or
// right of the image reads a pixel of zeros, so that neighbouring pixels can share the loop over the taps; it then
// counts the ones of its weights as differing. Hence, over the rows of taps inside,
//   acc = base - 2*differing,   base = channels*taps_inside + 2*(ones in the weights of the taps beside the image)
// which is |acc| <= 2^24, exact in float32. Ops::count adds differing bits, Ops::store subtracts them twice.

// Those that fall inside the image.
inline Taps taps_inside(const Axis& axis, int64_t at) {
  const int64_t start = at * axis.stride - axis.pad;
  if (start >= 0 && start + (axis.kernel - 1) * axis.dilation < axis.in) return {0, axis.kernel};
  int64_t first = start < 0 ? round_up_div(-start, axis.dilation) : 0;
  int64_t last = start < axis.in ? round_up_div(axis.in - start, axis.dilation) : 0;
  last = last < axis.kernel ? last : axis.kernel;
  first = first < last ? first : last;
  return {first, last};
}

// base for one pixel, by sums over rectangles of taps: those of all columns less those inside.
inline void base_of_pixel(const ConvTask& t, Taps rows, Taps columns, int count, int32_t* base) {
  const auto ones = [&](int64_t i, int64_t j) {
    return t.ones + static_cast<size_t>(i * (t.columns.kernel + 1) + j) * t.ones_stride;
  };
  const int32_t *all_above = ones(rows.first, t.columns.kernel), *all = ones(rows.last, t.columns.kernel);
  const int32_t *left_above = ones(rows.first, columns.first), *left = ones(rows.last, columns.first);
  const int32_t *right_above = ones(rows.first, columns.last), *right = ones(rows.last, columns.last);
  const auto inside = static_cast<int32_t>(t.channels * (rows.last - rows.first) * (columns.last - columns.first));
  for (int f = 0; f < count; ++f) {
    const int32_t in_all = all[f] - all_above[f], in_image = right[f] - right_above[f] - left[f] + left_above[f];
    base[f] = inside + 2 * (in_all - in_image);
  }
}

// Column `at` of a row: a pixel of the image, or one left of it whose partner is inside, or one of zeros.
inline const uint8_t* pixel_at(const ConvTask& t, const uint8_t* row, int64_t at) {
  if (at >= 0 && at < t.columns.in) return row + static_cast<size_t>(at) * t.pixel_bytes;
  const int64_t partner = at + t.columns.stride;
  if (partner >= 0 && partner < t.partners) return row - static_cast<size_t>(t.partners - partner) * t.pixel_bytes;
  return t.zeros;
}

// As tile_inside, for pixels some of whose taps are beside the image: these read zeros, in pairs too.
template <class Ops, int F, int P>
SIMAN_NOINLINE void tile_clipped(const ConvTask& t, Taps rows, int64_t y, int64_t x, const int32_t* const* base,
                                 int32_t* acc) {
  const size_t tap_bytes = static_cast<size_t>(t.units) * F * Ops::kVectorBytes;
  Tile<Ops, F, P> tile(base, acc);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const int64_t in_y = y * t.rows.stride - t.rows.pad + i * t.rows.dilation;
    const uint8_t* row = t.packed + static_cast<size_t>(in_y) * t.row_bytes;
    const uint8_t* weights = t.weights + static_cast<size_t>(i * t.columns.kernel) * tap_bytes;
    for (int64_t j = 0; j < t.columns.kernel; ++j) {
      const uint8_t* pixels[tile.kGroups];
      for (int g = 0; g < tile.kGroups; ++g) {
        const int64_t at = (x + g * Ops::kUnitPixels) * t.columns.stride - t.columns.pad + j * t.columns.dilation;
        pixels[g] = pixel_at(t, row, at);
      }
      tile.add(weights, pixels, t.units);
    }
  }
  tile.finish();
}

// Output columns [first, last) whose taps are all inside the image.
inline Taps columns_inside(const Axis& axis) {
  const int64_t room = axis.in - 1 + axis.pad - (axis.kernel - 1) * axis.dilation;
  const int64_t first = round_up_div(axis.pad, axis.stride), last = room < 0 ? 0 : room / axis.stride + 1;
  return {first, last < axis.out ? last : axis.out};
}

// The taps inside the image, the columns that have all of theirs inside, and the base of those.
template <class Ops, int F>
struct BinaryRow {
  static constexpr bool kAlwaysWhole = false;
  static constexpr int kFilters = F * Ops::kLanes;

  const ConvTask& t;
  Taps columns;
  int64_t y;
  Taps rows;
  int32_t base[kFilters];

  explicit BinaryRow(const ConvTask& task) : t(task), columns(columns_inside(task.columns)) {}

  void start(int64_t at) {
    y = at;
    rows = taps_inside(t.rows, at);
    const auto all = static_cast<int32_t>(t.channels * (rows.last - rows.first) * t.columns.kernel);
    for (auto& value : base) value = all;
  }

  // Few pixels have a base of their own. Without a row inside there is no place to start reading at, however far off.
  template <int P>
  void tile(int64_t x, int32_t* acc) const {
    const int32_t* from[P];
    for (auto& pixel : from) pixel = base;
    const bool is_inside = rows.first < rows.last && x >= columns.first && x + P <= columns.last;
    if (is_inside) return tile_inside<Ops, F, P>(t, rows, y, x, from, acc);
    int32_t clipped[P][kFilters];
    for (int p = 0; p < P; ++p) {
      if (x + p >= columns.first && x + p < columns.last) continue;
      from[p] = clipped[p];
      base_of_pixel(t, rows, taps_inside(t.columns, x + p), kFilters, clipped[p]);
    }
    tile_clipped<Ops, F, P>(t, rows, y, x, from, acc);
  }
};
