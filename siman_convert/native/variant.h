// A variant: the kernels compiled for one instruction set, and the memory layout they want.
//
// Plain data and function pointers only. Files built for a wider instruction set include this and nothing that could
// leave inline code behind: the linker would keep one copy of it, possibly theirs, for every caller.
#pragma once

#include <stddef.h>
#include <stdint.h>

// For the small steps of a hot loop: GCC otherwise calls some of them, with their vectors passed through memory.
#define SIMAN_INLINE inline __attribute__((always_inline))
// For a loop that needs all registers: inlined into its caller it runs at half the speed.
#define SIMAN_NOINLINE __attribute__((noinline))

namespace siman {

constexpr size_t kSumBlock = 4096;  // elements that are summed together: part of the operator's meaning, see mean.inl

// Compare with the threshold and pack: pixels [begin, end) of one group of one sample.
struct PackTask {
  const float* x;  // the group's first plane
  size_t plane;    // floats in a plane, H*W
  size_t channels;
  float threshold;
  uint8_t* packed;     // pixel 0 of the group
  size_t pixel_bytes;  // from pixel to pixel
  size_t begin, end;
};

// Rows of bits to units of two pixels each: of a pixel, and of its partner `distance` columns further on, which is 0
// where there is no such column. See kernels/nibbles.inl.
struct PairTask {
  const uint8_t* bits;  // whole 64-channel words, by rows and pixels
  size_t words;         // of a pixel
  size_t rows, columns;
  size_t distance;
  size_t partners;  // so many first columns come once more before their row, as partners of pixels of zeros
  uint8_t* units;   // [row][partners + columns]
};

// Bits to bytes, +1 and -1, for pixels that follow one another; the channels are filled up to whole words with 0.
struct SpreadTask {
  const uint8_t* bits;  // whole 64-channel words
  size_t channels, pixels;
  uint8_t* packed;    // the first pixel; 64 bytes each
  size_t unit_bytes;  // from unit to unit of `packed`
};

// Quantize pixels that follow one another in the codes: see kernels/quantized.inl.
struct QuantizeTask {
  const float* x;  // the first pixel in the first plane
  size_t plane;    // floats in a plane, H*W
  size_t channels;
  size_t step;    // floats from pixel to pixel
  size_t pixels;  // at least 1
  float scale;    // a step of d
  float lowest;   // d, -zero point
  uint8_t* codes;
};

// One axis of the convolution: output position `at` and tap k meet input position at*stride - pad + k*dilation.
struct Axis {
  int64_t in, out, kernel, stride, pad, dilation;
};

// Rows [row_begin, row_end) of the output planes of one block of filters, for one sample.
struct ConvTask {
  Axis rows, columns;      // quantized: without padding, and a row of the kernel is one tap; matrix: see matrix.inl
  int64_t channels;        // of one tap
  int64_t units;           // of one tap: see Kernel
  const uint8_t* packed;   // of the group, by rows and pixels: the first pixel
  size_t pixel_bytes;      // from pixel to pixel
  size_t row_bytes;        // from row to row; not of a matrix
  int64_t partners;        // binary: pixels before each row, see PairTask
  const uint8_t* zeros;    // binary: a pixel of zeros
  size_t unit_bytes;       // matrix: from unit to unit
  const uint8_t* weights;  // of the block
  const int32_t* ones;     // binary: ones[(i*(kW+1) + j)*ones_stride + f]: set bits of filter f in the taps above i,
                           // left of j
  size_t ones_stride;      // the filters of all blocks
  const int32_t* base;     // quantized: of acc, for each filter
  int vectors;             // of filters in this block: Kernel::vectors or Kernel::few_vectors
  int64_t filters;         // that are real; the rest of the vectors is filled up with weights of 0
  const float *scale, *bias, *slope;  // of the block
  const float* residual;              // of the block, as y; or one float
  bool residual_is_full;
  float* y;      // the plane of the block's first filter
  bool fetches;  // Y and residual, ahead of their use: they are not in the second-level cache
  int64_t row_begin, row_end;
  // Quantized, with a max pool behind it; rows and planes of Y are the pool's then.
  Axis pool_rows, pool_columns;
  float* kept;  // null: no pool. Values still to be pooled, by rows, columns and filters of the block; row r of the
                // convolution is row r % kept_rows
  int64_t kept_rows;
};

// A unit is the piece of one tap that one vector of weights is for: `unit_channels` channels, which fill `unit_bytes`
// in a packed pixel, whether or not that is of two pixels, and `vector_bytes` of weights for the `lanes` filters of a
// vector. Weights lie [block][tap][unit][vector of the block][vector_bytes].
struct Kernel {
  int lanes, vectors, few_vectors;
  int unit_channels, unit_bytes, vector_bytes;
  void (*convolve)(const ConvTask& task);
};

// siman.BinaryConv2d: a pixel holds the units of whole 64-channel words.
struct BinaryKernels {
  Kernel kernel;
  double (*sum_block)(const float* x, size_t count);
  void (*pack)(const PackTask& task);
  void (*pair)(const PairTask& task);  // null: a unit is of one pixel, and what was packed stays as it is
  // puts the weights of one tap of one filter into its lane, the units being `unit_stride` bytes apart
  void (*place)(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride);
  int64_t (*count_registers)(int64_t steps, int32_t* sink);  // see ceiling.inl
};

// siman.QuantizedConv2d: a code is d + zero point where it has one byte, d where it has two.
struct QuantizedKernels {
  Kernel kernel;
  int code_bytes;
  void (*quantize)(const QuantizeTask& task);
  void (*place)(const int8_t* tap, size_t channels, int lane, uint8_t* vector, size_t unit_stride);
};

// siman.BinaryConv2d by a kernel that multiplies matrices of bytes: see kernels/matrix.inl. A unit of weights is bits.
struct MatrixKernels {
  Kernel kernel;       // without `convolve`: there is none
  int most_positions;  // that are computed together, whether or not so many are left
  void (*place)(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride);
  void (*spread)(const SpreadTask& task);
  int64_t (*count_registers)(int64_t steps, int32_t* sink);
};

// Training: see kernels/surrogate.inl.
struct SignTask {
  const float *x, *grad;  // grad: of the signs, null for the signs themselves
  size_t count;
  float mean;
  bool centred;
  float* out;
};

// One filter's latent weights: see kernels/latents.inl.
struct LatentTask {
  const float *w, *grad;  // grad: of the bits, null for the bits themselves
  size_t count;           // at least 1
  float* out;
};

struct TrainingKernels {
  void (*signs)(const SignTask& task);
  void (*sign_backward)(const SignTask& task);
  void (*binarize)(const LatentTask& task);
  void (*binarize_backward)(const LatentTask& task);
  void (*centre)(float* w, size_t count);
  uint32_t (*select)(const float* x, size_t count, size_t rank, uint32_t low, uint32_t high);
  void (*clamp)(float* w, size_t count, float low, float high);
};

struct Variant {
  const char* name;
  BinaryKernels binary;
  QuantizedKernels quantized;
  MatrixKernels matrix;
  TrainingKernels training;
};

struct NamedVariant {
  const Variant* kernels;
  bool (*supported)();
};

// The fastest first; ends with a null entry. `scalar` is always the last.
extern const NamedVariant kVariants[];

// The variant of this name; null `name` means the first supported one. Null where there is none.
const NamedVariant* find_variant(const char* name);

}  // namespace siman
