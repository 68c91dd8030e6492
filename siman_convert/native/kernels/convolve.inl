// The integer convolution.
//
// Where the bits of activation and weight agree the product is +1, where they differ it is -1: over the taps inside the
// image, acc = channels*taps_inside - 2*differing_inside. Rows of taps outside the image are left out. A tap left or
// right of the image reads a pixel of zeros, so that neighbouring pixels can share the loop over the taps; it then
// counts the ones of its weights as differing. Hence, over the rows of taps inside,
//   acc = base - 2*differing,   base = channels*taps_inside + 2*(ones in the weights of the taps beside the image)
// which is |acc| <= 2^24, exact in float32.
//
// A tile is F vectors of filters x P neighbouring pixels, whose counts stay in registers. Ops says what one step is:
//   kLanes, kVectors, kFewVectors, kPixels    filters in a vector; F of a full block, of a small one; the largest P
//   kUnitBytes, kVectorBytes                  see Variant
//   Weights, Activation, Part, Wide           a vector of weights; one unit of one pixel; counts, narrow and wide
//   load(const uint8_t*), broadcast(const uint8_t*), zero(Part&), zero(Wide&)
//   count(Part&, Weights, Activation)         differing bits are added
//   opaque(value)                             the value, in a register, that the compiler knows nothing of
//   kUnitsPerFlush, flush(Part&, Wide&)       after so many units a Part may be full: add it to the Wide, clear it
//   kFlushes, store(Wide, base, acc)          after so many flushes a Wide may be full: acc = base - 2*Wide

constexpr int64_t kMostUnits = 1 << 24;  // of a pixel: taps times channels are at most that many

// The counts of one tile on their way to acc. All of it has to end up in registers, hence always inlined.
template <class Ops, int F, int P>
struct Tile {
  typename Ops::Part part[F][P];
  typename Ops::Wide wide[F][P];
  int64_t room = Ops::kUnitsPerFlush, flushes = 0;
  const int32_t* base[P];  // of acc, or acc itself after a first store
  int32_t* acc;

  SIMAN_INLINE Tile(const int32_t* const* base_of, int32_t* to) : acc(to) {
    for (int p = 0; p < P; ++p) base[p] = base_of[p];
    for (int f = 0; f < F; ++f)
      for (int p = 0; p < P; ++p) Ops::zero(part[f][p]), Ops::zero(wide[f][p]);
  }

  // So many units of weights and of each pixel, which follow one another in memory; all pointers are moved on.
  SIMAN_INLINE void add(const uint8_t*& weights, const uint8_t* (&pixels)[P], int64_t units) {
    while (units > 0) {
      const int64_t now = units < room ? units : room;
      add_some(weights, pixels, now);
      weights += static_cast<size_t>(now) * F * Ops::kVectorBytes;
      for (auto& pixel : pixels) pixel += now * Ops::kUnitBytes;
      units -= now;
      room -= now;
      if (room == 0) flush();
    }
  }

  SIMAN_INLINE void finish() {
    for (int f = 0; f < F; ++f)
      for (int p = 0; p < P; ++p) Ops::flush(part[f][p], wide[f][p]);
    store();
  }

 private:
  SIMAN_INLINE void add_some(const uint8_t* weights, const uint8_t* const (&pixels)[P], int64_t units) {
    for (int64_t u = 0; u < units; ++u, weights += F * Ops::kVectorBytes) {
      typename Ops::Weights w[F];
      for (int f = 0; f < F; ++f) w[f] = Ops::load(weights + f * Ops::kVectorBytes);
      for (int p = 0; p < P; ++p) {
        const auto a = Ops::broadcast(pixels[p] + u * Ops::kUnitBytes);
        for (int f = 0; f < F; ++f) Ops::count(part[f][p], w[f], a);
      }
    }
  }

  SIMAN_INLINE void flush() {
    for (int f = 0; f < F; ++f)
      for (int p = 0; p < P; ++p) Ops::flush(part[f][p], wide[f][p]);
    room = Ops::kUnitsPerFlush;
    if (++flushes < Ops::kFlushes) return;
    store();
    for (int p = 0; p < P; ++p) base[p] = acc + p * F * Ops::kLanes;
    flushes = 0;
  }

  // acc = base - 2*counts, and the counts are 0 again
  SIMAN_INLINE void store() {
    for (int p = 0; p < P; ++p) {
      for (int f = 0; f < F; ++f) {
        const int at = f * Ops::kLanes;
        Ops::store(wide[f][p], base[p] + at, acc + p * F * Ops::kLanes + at);
        Ops::zero(wide[f][p]);
      }
    }
  }
};

// Taps [first, last) of one axis that fall inside the image.
struct Taps {
  int64_t first, last;
};

inline int64_t round_up_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// acc of output pixels (y, x) .. (y, x + P - 1) where no tap is left or right of the image. Where the taps of a row
// follow one another in memory, activations and weights alike, they are one long tap.
template <class Ops, int F, int P>
SIMAN_NOINLINE void tile_inside(const ConvTask& t, Taps rows, int64_t y, int64_t x, const int32_t* const* base,
                                int32_t* acc) {
  const size_t unit_bytes = F * Ops::kVectorBytes, step = static_cast<size_t>(t.columns.stride) * t.pixel_bytes;
  const bool one_tap = t.columns.dilation == 1 && t.pixel_bytes == static_cast<size_t>(t.units) * Ops::kUnitBytes;
  const int64_t taps = one_tap ? 1 : t.columns.kernel, units = one_tap ? t.units * t.columns.kernel : t.units;
  const int64_t in_y = y * t.rows.stride - t.rows.pad + rows.first * t.rows.dilation;
  const int64_t in_x = x * t.columns.stride - t.columns.pad;
  const uint8_t* row = t.packed + (in_y * t.columns.in + in_x) * static_cast<int64_t>(t.pixel_bytes);
  const uint8_t* weights = t.weights + static_cast<size_t>(rows.first * t.columns.kernel * t.units) * unit_bytes;
  Tile<Ops, F, P> tile(base, acc);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const uint8_t* at = row;
    for (int64_t j = 0; j < taps; ++j) {
      const uint8_t* pixels[P];
      for (int p = 0; p < P; ++p) pixels[p] = at + static_cast<size_t>(p) * step;
      tile.add(weights, pixels, units);
      at += static_cast<size_t>(t.columns.dilation) * t.pixel_bytes;
    }
    row += static_cast<size_t>(t.rows.dilation * t.columns.in) * t.pixel_bytes;
  }
  tile.finish();
}

// The same for pixels some of whose taps are beside the image: these read zeros.
template <class Ops, int F, int P>
SIMAN_NOINLINE void tile_clipped(const ConvTask& t, Taps rows, int64_t y, int64_t x, const int32_t* const* base,
                                 int32_t* acc) {
  const size_t tap_bytes = static_cast<size_t>(t.units) * F * Ops::kVectorBytes;
  const uint8_t* zeros = t.packed + static_cast<size_t>(t.rows.in * t.columns.in) * t.pixel_bytes;
  Tile<Ops, F, P> tile(base, acc);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const int64_t in_y = y * t.rows.stride - t.rows.pad + i * t.rows.dilation;
    const uint8_t* row = t.packed + static_cast<size_t>(in_y * t.columns.in) * t.pixel_bytes;
    const uint8_t* weights = t.weights + static_cast<size_t>(i * t.columns.kernel) * tap_bytes;
    for (int64_t j = 0; j < t.columns.kernel; ++j) {
      const uint8_t* pixels[P];
      for (int p = 0; p < P; ++p) {
        const int64_t in_x = (x + p) * t.columns.stride - t.columns.pad + j * t.columns.dilation;
        pixels[p] = in_x >= 0 && in_x < t.columns.in ? row + static_cast<size_t>(in_x) * t.pixel_bytes : zeros;
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

// A row of the output: the taps inside the image, the columns that have all of theirs inside, and the base of those.
template <int Filters>
struct Row {
  int64_t y;
  Taps rows, columns;
  int32_t base[Filters];
};

// Chooses the tile that fits: P of `width` pixels, 1 <= width <= P. Few pixels have a base of their own.
template <class Ops, int F, int P>
void convolve_pixels(const ConvTask& t, const Row<F * Ops::kLanes>& row, int64_t x, int64_t width, int32_t* acc) {
  constexpr int kFilters = F * Ops::kLanes;
  if constexpr (P > 1) {
    if (width < P) return convolve_pixels<Ops, F, P - 1>(t, row, x, width, acc);
  }
  const int32_t* base[P];
  for (auto& from : base) from = row.base;
  if (x >= row.columns.first && x + P <= row.columns.last)
    return tile_inside<Ops, F, P>(t, row.rows, row.y, x, base, acc);
  int32_t clipped[P][kFilters];
  for (int p = 0; p < P; ++p) {
    if (x + p >= row.columns.first && x + p < row.columns.last) continue;
    base[p] = clipped[p];
    base_of_pixel(t, row.rows, taps_inside(t.columns, x + p), kFilters, clipped[p]);
  }
  tile_clipped<Ops, F, P>(t, row.rows, row.y, x, base, acc);
}

// Segments of at most 64 pixels, whole rows where they are short: their acc stays in the first-level cache until Y is
// written. A row is cut into tiles of nearly the same width (7 pixels are 4 + 3, not 6 + 1).
template <class Ops, class Floats, int F>
void convolve_block(const ConvTask& t) {
  constexpr int64_t kPixels = 64, kFilters = F * Ops::kLanes;
  static_assert(kFilters % Floats::kLanes == 0 && kPixels % Floats::kLanes == 0);
  int32_t acc[kPixels * kFilters] = {};
  Row<kFilters> row;
  row.columns = columns_inside(t.columns);
  const int64_t chunks = round_up_div(t.columns.out, kPixels);
  const int64_t rows_at_once = chunks > 1 ? 1 : kPixels / t.columns.out;
  for (int64_t y = t.row_begin; y < t.row_end; y += rows_at_once) {
    const int64_t rows = t.row_end - y < rows_at_once ? t.row_end - y : rows_at_once;
    for (int64_t k = 0; k < chunks; ++k) {
      const int64_t begin = k * t.columns.out / chunks, width = (k + 1) * t.columns.out / chunks - begin;
      const int64_t tiles = round_up_div(width, Ops::kPixels);
      const auto pixel = static_cast<size_t>(y * t.columns.out + begin), count = static_cast<size_t>(rows * width);
      for (int64_t r = 0; r < rows; ++r) {
        row.y = y + r;
        row.rows = taps_inside(t.rows, y + r);
        const auto all = static_cast<int32_t>(t.channels * (row.rows.last - row.rows.first) * t.columns.kernel);
        for (auto& value : row.base) value = all;
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t x = i * width / tiles, end = (i + 1) * width / tiles;
          convolve_pixels<Ops, F, Ops::kPixels>(t, row, begin + x, end - x, acc + (r * width + x) * kFilters);
        }
      }
      epilogue<Floats>(t, acc, kFilters, pixel, count);
    }
  }
}

template <class Ops, class Floats>
void convolve(const ConvTask& t) {
  if (t.vectors == Ops::kVectors) return convolve_block<Ops, Floats, Ops::kVectors>(t);
  convolve_block<Ops, Floats, Ops::kFewVectors>(t);
}
