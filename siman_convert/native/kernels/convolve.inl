// The integer convolution: tiles of the output, and how a block of filters is cut into them.
//
// A tile is F vectors of filters x P neighbouring pixels. Ops says what one step is:
//   kLanes, kVectors, kFewVectors, kPixels    filters in a vector; F of a full block, of a small one; the largest P
//   kUnitBytes, kVectorBytes                  see Kernel
//   kUnitPixels, kStepUnits                   neighbouring output pixels that a unit is of; units that a step takes
//   Weights, Activation, Part, Wide           a vector of weights; one unit; sums, narrow and wide
//   load(const uint8_t*), broadcast(const uint8_t*), zero(Part&), zero(Wide&)
//   count(Part&, Weights, Activation)         what weights and activation come to is added; of several units:
//   differing(Weights, Activation), plus(a, b), count(Part&, sum)
//   kUnitsPerFlush, flush(Part&, Wide&)       after so many units a Part may be full: add it to the Wide, clear it;
//   flush(Part&, Wide&, Wide&)                a Part of two pixels to the Wide of each
//   kFlushes, store(Wide, base, acc)          after so many flushes a Wide may be full: acc = base and what it comes to
//
// A Row<Ops, F> says what the two kinds of convolution, binary.inl and quantized.inl, do not share:
//   Row(const ConvTask&), start(int64_t y)    before the first tile of an output row
//   tile<P>(int64_t x, int32_t* acc)          acc of output pixels (y, x) .. (y, x + P - 1), whatever base they need
//   kAlwaysWhole                              whether P is always kPixels

// More than a pixel has, whose taps times channels are at most 2^24: such a Part is flushed once, at the end.
constexpr int64_t kMostUnits = (1 << 24) + 1;

// The sums of one tile on their way to acc. The Parts have to end up in registers, hence always inlined.
template <class Ops, int F, int P>
struct Tile {
  static constexpr int kGroups = (P + Ops::kUnitPixels - 1) / Ops::kUnitPixels;  // of pixels that share their units
  static_assert(Ops::kUnitPixels <= 2);

  typename Ops::Part part[F][kGroups];
  typename Ops::Wide wide[F][kGroups * Ops::kUnitPixels];
  int64_t room = Ops::kUnitsPerFlush, flushes = 0;
  const int32_t* base[P];  // of acc, or acc itself after a first store
  int32_t* acc;

  SIMAN_INLINE Tile(const int32_t* const* base_of, int32_t* to) : acc(to) {
    for (int p = 0; p < P; ++p) base[p] = base_of[p];
    for (int f = 0; f < F; ++f) {
      for (auto& sums : part[f]) Ops::zero(sums);
      for (auto& sums : wide[f]) Ops::zero(sums);
    }
  }

  // So many units of weights and of each pixel, which follow one another in memory; all pointers are moved on.
  // What fits into an empty Part is not cut in two.
  SIMAN_INLINE void add(const uint8_t*& weights, const uint8_t* (&pixels)[kGroups], int64_t units) {
    while (units > 0) {
      if (room < units && (room < Ops::kStepUnits || units <= Ops::kUnitsPerFlush)) flush();
      const int64_t now = units <= room ? units : room / Ops::kStepUnits * Ops::kStepUnits;
      add_some(weights, pixels, now);
      weights += static_cast<size_t>(now) * F * Ops::kVectorBytes;
      for (auto& pixel : pixels) pixel += now * Ops::kUnitBytes;
      units -= now;
      room -= now;
    }
  }

  SIMAN_INLINE void finish() {
    widen();
    store();
  }

  // Filter after filter would keep all activations in registers.
  template <int Units>
  SIMAN_INLINE void count(int g, const typename Ops::Weights (&w)[Units][F],
                          const typename Ops::Activation (&a)[Units]) {
    if constexpr (Ops::kStepUnits == 1) {
      for (int f = 0; f < F; ++f) Ops::count(part[f][g], w[0][f], a[0]);
    } else {
      decltype(Ops::differing(w[0][0], a[0])) sums[F];
      for (int f = 0; f < F; ++f) sums[f] = Ops::differing(w[0][f], a[0]);
      for (int i = 1; i < Units; ++i)
        for (int f = 0; f < F; ++f) sums[f] = Ops::plus(sums[f], Ops::differing(w[i][f], a[i]));
      for (int f = 0; f < F; ++f) Ops::count(part[f][g], sums[f]);
    }
  }

 private:
  SIMAN_INLINE void add_some(const uint8_t* weights, const uint8_t* const (&pixels)[kGroups], int64_t units) {
    constexpr int kStep = Ops::kStepUnits;
    int64_t u = 0;
    for (; u + kStep <= units; u += kStep, weights += kStep * F * Ops::kVectorBytes) step<kStep>(weights, pixels, u);
    if constexpr (kStep > 1)
      for (; u < units; ++u, weights += F * Ops::kVectorBytes) step<1>(weights, pixels, u);
  }

  template <int Units>
  SIMAN_INLINE void step(const uint8_t* weights, const uint8_t* const (&pixels)[kGroups], int64_t u) {
    typename Ops::Weights w[Units][F];
    for (int i = 0; i < Units; ++i)
      for (int f = 0; f < F; ++f) w[i][f] = Ops::load(weights + (i * F + f) * Ops::kVectorBytes);
    for (int g = 0; g < kGroups; ++g) {
      typename Ops::Activation a[Units];
      for (int i = 0; i < Units; ++i) a[i] = Ops::broadcast(pixels[g] + (u + i) * Ops::kUnitBytes);
      count<Units>(g, w, a);
    }
  }

  SIMAN_INLINE void widen() {
    for (int f = 0; f < F; ++f) {
      for (int g = 0; g < kGroups; ++g) {
        if constexpr (Ops::kUnitPixels > 1) {
          Ops::flush(part[f][g], wide[f][2 * g], wide[f][2 * g + 1]);
        } else {
          Ops::flush(part[f][g], wide[f][g]);
        }
      }
    }
  }

  SIMAN_INLINE void flush() {
    widen();
    room = Ops::kUnitsPerFlush;
    if (++flushes < Ops::kFlushes) return;
    store();
    for (int p = 0; p < P; ++p) base[p] = acc + p * F * Ops::kLanes;
    flushes = 0;
  }

  // to acc, and the sums are 0 again
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

// Taps [first, last) of one axis.
struct Taps {
  int64_t first, last;
};

inline int64_t round_up_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  const uint8_t* row = t.packed + static_cast<size_t>(in_y) * t.row_bytes + static_cast<size_t>(in_x) * t.pixel_bytes;
  const uint8_t* weights = t.weights + static_cast<size_t>(rows.first * t.columns.kernel * t.units) * unit_bytes;
  Tile<Ops, F, P> tile(base, acc);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const uint8_t* at = row;
    for (int64_t j = 0; j < taps; ++j) {
      const uint8_t* pixels[tile.kGroups];
      for (int g = 0; g < tile.kGroups; ++g) pixels[g] = at + static_cast<size_t>(g * Ops::kUnitPixels) * step;
      tile.add(weights, pixels, units);
      at += static_cast<size_t>(t.columns.dilation) * t.pixel_bytes;
    }
    row += static_cast<size_t>(t.rows.dilation) * t.row_bytes;
  }
  tile.finish();
}

// Chooses the tile that fits: P of `width` pixels, 1 <= width <= P. A Row may always take P: see Acc.
template <int P, class Row>
void convolve_pixels(const Row& row, int64_t x, int64_t width, int32_t* acc) {
  if constexpr (P > 1 && !Row::kAlwaysWhole) {
    if (width < P) return convolve_pixels<P - 1>(row, x, width, acc);
  }
  row.template tile<P>(x, acc);
}

// Has the lines of `count` pixels of Y brought in, and of the residual, for filters [first, last). Of a plane that
// begins within a line the last one is left out.
inline void fetch_lines(const ConvTask& t, size_t pixel, size_t count, int64_t first, int64_t last) {
  constexpr size_t kLine = 64 / sizeof(float);
  const size_t plane = static_cast<size_t>(t.rows.out * t.columns.out);
  size_t at = static_cast<size_t>(first) * plane + pixel;
  for (int64_t f = first; f < last; ++f, at += plane) {
    for (size_t i = 0; i < count; i += kLine) {
      __builtin_prefetch(t.y + at + i, 1);
      if (t.residual_is_full) __builtin_prefetch(t.residual + at + i);
    }
  }
}

constexpr int64_t kSegment = 64;  // pixels

// The acc of a segment. All 0 at first: what is left over of a vector is read before it is written. Pixels of a whole
// tile that are none of the segment's are written behind it, or where the next ones are written afterwards.
template <class Ops, int F>
struct Acc {
  alignas(64) int32_t sums[(kSegment + Ops::kPixels) * F * Ops::kLanes] = {};
};

// Where piece i of n begins: pieces of `whole`, and what is left, or all of nearly the same length (7 pixels are 4 + 3,
// not 6 + 1), with so many pixels kept together.
template <bool kWhole, int kTogether>
int64_t cut(int64_t length, int64_t whole, int64_t i, int64_t n) {
  const int64_t at = kWhole ? i * whole : round_up_div(i * length / n, kTogether) * kTogether;
  return at < length ? at : length;
}

// Rows [row_begin, row_end) in segments of at most kSegment pixels, whole rows where they are short: their acc stays in
// the first-level cache until finish(pixel, count) takes `count` pixels from flat position `pixel` on.
template <class Row, class Ops, int F, class Finish>
void convolve_rows(const ConvTask& t, int64_t row_begin, int64_t row_end, Acc<Ops, F>& segment, const Finish& finish) {
  constexpr int64_t kFilters = F * Ops::kLanes, kPixels = Ops::kPixels;
  constexpr auto kCut = cut<Row::kAlwaysWhole, Ops::kUnitPixels>;
  static_assert(kPixels % Ops::kUnitPixels == 0);
  int32_t* acc = segment.sums;
  Row row(t);
  const int64_t columns = t.columns.out, chunks = round_up_div(columns, kSegment);
  const int64_t rows_at_once = chunks > 1 ? 1 : kSegment / columns;
  for (int64_t y = row_begin; y < row_end; y += rows_at_once) {
    const int64_t rows = row_end - y < rows_at_once ? row_end - y : rows_at_once;
    for (int64_t k = 0; k < chunks; ++k) {
      const int64_t begin = kCut(columns, kSegment, k, chunks), width = kCut(columns, kSegment, k + 1, chunks) - begin;
      const int64_t tiles = round_up_div(width, kPixels);
      const auto pixel = static_cast<size_t>(y * columns + begin), count = static_cast<size_t>(rows * width);
      for (int64_t r = 0; r < rows; ++r) {
        row.start(y + r);
        for (int64_t i = 0; i < tiles; ++i) {
          // A few lines a tile: that many can be on their way at once.
          const int64_t tile = r * tiles + i, all = rows * tiles;
          if (t.fetches) fetch_lines(t, pixel, count, tile * t.filters / all, (tile + 1) * t.filters / all);
          const int64_t x = kCut(width, kPixels, i, tiles), end = kCut(width, kPixels, i + 1, tiles);
          convolve_pixels<Ops::kPixels>(row, begin + x, end - x, acc + (r * width + x) * kFilters);
        }
      }
      finish(pixel, count);
    }
  }
}

template <class Row, class Ops, class Floats, int F>
void convolve_block(const ConvTask& t) {
  constexpr int kFilters = F * Ops::kLanes;
  static_assert(kFilters % Floats::kLanes == 0 && kSegment % Floats::kLanes == 0);
  Acc<Ops, F> acc;
  convolve_rows<Row, Ops, F>(t, t.row_begin, t.row_end, acc, [&](size_t pixel, size_t count) {
    epilogue<Floats>(t, acc.sums, kFilters, pixel, count);
  });
}

template <template <class, int> class Row, class Ops, class Floats>
void convolve(const ConvTask& t) {
  constexpr int kMany = Ops::kVectors, kFew = Ops::kFewVectors;
  if (t.vectors == kMany) return convolve_block<Row<Ops, kMany>, Ops, Floats, kMany>(t);
  convolve_block<Row<Ops, kFew>, Ops, Floats, kFew>(t);
}
