// The binary convolution as a product of matrices of bytes: pixels x channels times channels x filters, +1 and -1,
// added up over the taps. A tap outside the image meets a byte of 0.
//
// Packed is an image with its padding, so that each tap is inside, by [unit][row][column][channel of the unit]. Its
// rows are sorted by their remainder of the stride: neighbouring rows of the output then read neighbouring rows, and a
// position is
//   line*y + x,   line = columns of the image / stride,
// whose taps lie at fixed distances from it. Positions follow one another `stride` pixels apart over the end of a row,
// where line - columns.out of them are none of the output: they are computed, and dropped.
//
// Matrix is T tiles of kPixels positions x kLanes filters, T <= kMostTiles, that are there while the object
// Matrix(task) lives:
//   kUnit, kWeightBits, kWeightBytes              channels a step takes; bytes of its weights, as bits and as bytes
//   expand(bits, valid, uint8_t*)                 64 bits to bytes
//   expand_weights(const uint8_t*, uint8_t*)      kWeightBits to kWeightBytes
//   clear<T>(), add<T>(pixels, step, weights), store<T>(int32_t*)       the sums, by positions and filters
//   place(...), count_registers(...)              see MatrixKernels

template <class Matrix>
void spread(const SpreadTask& t) {
  const size_t words = (t.channels + 63) / 64, last = t.channels % 64;
  const uint8_t* bits = t.bits;
  for (size_t p = 0; p < t.pixels; ++p) {
    uint8_t* to = t.packed + p * 64;
    for (size_t w = 0; w < words; ++w, bits += 8, to += t.unit_bytes) {
      uint64_t word;
      __builtin_memcpy(&word, bits, 8);
      Matrix::expand(word, w + 1 == words && last ? (uint64_t{1} << last) - 1 : ~uint64_t{0}, to);
    }
  }
}

// Pixels of the output that lines of Y and residual are fetched for while their sums are made.
struct Ahead {
  size_t pixel, count;
};

// Sums of one vector of filters by pixels, of which `count` wait for the epilogue. It is done in pieces while other
// sums are made: the unit that multiplies matrices leaves the others idle.
template <class Matrix, class Floats>
struct Waiting {
  static_assert(Matrix::kLanes == Floats::kLanes);
  static constexpr int64_t kLanes = Matrix::kLanes, kMost = Matrix::kMostTiles * Matrix::kPixels;

  alignas(64) int32_t acc[(kMost + kLanes) * kLanes] = {};
  ConvTask task;
  int64_t pixel = 0, count = 0, finished = 0;

  // As many as are due after `done` of `steps`.
  SIMAN_INLINE void finish(int64_t done, int64_t steps) {
    for (; finished < count && finished * steps < count * done; finished += kLanes) {
      const int64_t left = count - finished;
      finish_block<Floats>(task, Filters<Floats>(task, 0), acc + finished * kLanes, kLanes,
                           static_cast<size_t>(pixel + finished), static_cast<size_t>(left < kLanes ? left : kLanes));
    }
  }
};

// The sums of T tiles from `position` on. The weights of a step become bytes while the step before it is multiplied.
template <class Matrix, class Floats, int T>
SIMAN_NOINLINE void multiply(const ConvTask& t, int64_t position, Ahead ahead, Waiting<Matrix, Floats>& waiting,
                             int32_t* sums) {
  alignas(64) uint8_t expanded[2][Matrix::kWeightBytes];
  const int64_t taps = t.rows.kernel * t.columns.kernel, units = t.units, steps = taps * units, stride = t.rows.stride;
  const size_t step = static_cast<size_t>(t.columns.stride) * t.pixel_bytes;
  const uint8_t* weights = t.weights;
  const uint8_t* image = t.packed + static_cast<size_t>(position) * step;
  int64_t done = 0;
  Matrix::template clear<T>();
  Matrix::expand_weights(weights, expanded[0]);
  for (int64_t u = 0; u < units; ++u) {
    const uint8_t* from = image + static_cast<size_t>(u) * t.unit_bytes;
    for (int64_t i = 0; i < t.rows.kernel; ++i) {
      const int64_t below = i * t.rows.dilation, row = below % stride * t.rows.in + below / stride;
      const uint8_t* pixels = from + static_cast<size_t>(row * t.columns.in) * t.pixel_bytes;
      for (int64_t j = 0; j < t.columns.kernel; ++j) {
        const uint8_t* now = expanded[done % 2];
        const int64_t filter = done * t.filters / steps;
        if (++done < steps) Matrix::expand_weights(weights += Matrix::kWeightBits, expanded[done % 2]);
        if (t.fetches) fetch_lines(t, ahead.pixel, ahead.count, filter, done * t.filters / steps);
        Matrix::template add<T>(pixels, step, now);
        waiting.finish(done, steps);
        pixels += static_cast<size_t>(t.columns.dilation) * t.pixel_bytes;
      }
    }
  }
  Matrix::template store<T>(sums);
}

// Chooses T.
template <int T, class Matrix, class Floats>
void multiply_tiles(const ConvTask& t, int64_t position, int64_t tiles, Ahead ahead, Waiting<Matrix, Floats>& waiting,
                    int32_t* sums) {
  if constexpr (T > 1) {
    if (tiles < T) return multiply_tiles<T - 1>(t, position, tiles, ahead, waiting, sums);
  }
  multiply<Matrix, Floats, T>(t, position, ahead, waiting, sums);
}

// Sums of `count` positions, the first in column `column`: those that are pixels of the output are added to what
// waits. Returns the column after them.
template <class Matrix, class Floats>
int64_t keep_pixels(const ConvTask& t, const int32_t* sums, int64_t count, int64_t column,
                    Waiting<Matrix, Floats>& waiting) {
  constexpr int64_t kLanes = Matrix::kLanes;
  const int64_t line = t.columns.in / t.columns.stride;
  for (int64_t p = 0; p < count;) {
    const int64_t rest = line - column, some = count - p < rest ? count - p : rest, inside = t.columns.out - column;
    const int64_t real = inside < some ? inside : some;
    if (real > 0) {
      __builtin_memcpy(waiting.acc + waiting.count * kLanes, sums + p * kLanes,
                       static_cast<size_t>(real * kLanes) * sizeof(int32_t));
      waiting.count += real;
    }
    p += some;
    column = some == rest ? 0 : column + some;
  }
  return column;
}

// All of one vector of filters. What is left at the end waits on; of what waits before the end, whole vectors of
// pixels are finished, and the rest goes to the front.
template <class Matrix, class Floats>
void convolve_vector(const ConvTask& t, Waiting<Matrix, Floats>& waiting) {
  constexpr int64_t kMost = Matrix::kMostTiles * Matrix::kPixels, kLanes = Matrix::kLanes;
  alignas(64) int32_t sums[kMost * kLanes];
  const int64_t line = t.columns.in / t.columns.stride, end = (t.row_end - 1) * line + t.columns.out;
  const int64_t last_pixel = t.row_end * t.columns.out;
  int64_t pixel = t.row_begin * t.columns.out, kept = 0, column = 0;
  for (int64_t at = t.row_begin * line; at < end; at += kMost) {
    const int64_t left = end - at, count = left < kMost ? left : kMost, to_come = last_pixel - pixel;
    const Ahead ahead{static_cast<size_t>(pixel), static_cast<size_t>(to_come < kMost ? to_come : kMost)};
    multiply_tiles<Matrix::kMostTiles>(t, at, round_up_div(count, Matrix::kPixels), ahead, waiting, sums);
    const int64_t finished = waiting.count;
    __builtin_memmove(waiting.acc, waiting.acc + finished * kLanes,
                      static_cast<size_t>(kept * kLanes) * sizeof(int32_t));
    waiting.task = t;
    waiting.pixel = pixel;
    waiting.count = kept;
    waiting.finished = 0;
    column = keep_pixels(t, sums, count, column, waiting);
    const int64_t whole = left <= kMost ? waiting.count : waiting.count / kLanes * kLanes;
    kept = waiting.count - whole;
    waiting.count = whole;
    pixel += whole;
  }
}

template <class Matrix, class Floats>
void convolve_matrix(const ConvTask& t) {
  const Matrix matrix(t);  // to set the tiles up takes as long as some steps
  const size_t plane = static_cast<size_t>(t.rows.out * t.columns.out);
  const size_t weight_bytes = static_cast<size_t>(t.rows.kernel * t.columns.kernel * t.units) * Matrix::kWeightBits;
  Waiting<Matrix, Floats> waiting;
  ConvTask vector = t;
  for (int64_t first = 0; first < t.filters; first += Matrix::kLanes) {
    const int64_t left = t.filters - first;
    const size_t planes = static_cast<size_t>(first) * plane;
    vector.filters = left < Matrix::kLanes ? left : Matrix::kLanes;
    vector.weights = t.weights + static_cast<size_t>(first / Matrix::kLanes) * weight_bytes;
    vector.scale = t.scale + first;
    vector.bias = t.bias + first;
    vector.slope = t.slope + first;
    vector.y = t.y + planes;
    if (t.residual_is_full) vector.residual = t.residual + planes;
    convolve_vector(vector, waiting);
  }
  waiting.finish(1, 1);
}

template <class Matrix, class Floats>
constexpr MatrixKernels matrix() {
  return {{Matrix::kLanes, 4, 1, Matrix::kUnit, Matrix::kUnit, Matrix::kWeightBits, convolve_matrix<Matrix, Floats>},
          Matrix::kMostTiles * Matrix::kPixels,
          Matrix::place,
          spread<Matrix>,
          Matrix::count_registers};
}
