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

// One axis of the convolution: output position `at` and tap k meet input position at*stride - pad + k*dilation.
struct Axis {
  int64_t in, out, kernel, stride, pad, dilation;
};

// Rows [row_begin, row_end) of the output planes of one block of filters, for one sample.
struct ConvTask {
  Axis rows, columns;
  int64_t channels;        // of the group
  int64_t units;           // of one tap: see Variant
  const uint8_t* packed;   // of the group: H*W pixels, then one more that is all 0
  size_t pixel_bytes;      // from pixel to pixel
  const uint8_t* weights;  // of the block
  const int32_t* ones;     // ones[(i*(kW+1) + j)*ones_stride + f]: set bits of filter f in the taps above i, left of j
  size_t ones_stride;      // the filters of all blocks
  int vectors;             // of filters in this block: Variant::vectors or Variant::few_vectors
  int64_t filters;         // that are real; the rest of the vectors is filled up with weights of 0
  const float *scale, *bias, *slope;  // of the block
  const float* residual;              // of the block, as y; or one float
  bool residual_is_full;
  float* y;  // the plane of the block's first filter
  int64_t row_begin, row_end;
};

// A unit is the piece of one tap that a kernel takes in one step: `unit_channels` channels, which fill `unit_bytes` in
// a packed pixel, and `vector_bytes` of weights for the `lanes` filters of a vector. Weights lie
// [block][tap][unit][vector of the block][vector_bytes], and a pixel holds the units of whole 64-channel words.
struct Variant {
  const char* name;
  int lanes, vectors, few_vectors;
  int unit_channels, unit_bytes, vector_bytes;
  double (*sum_block)(const float* x, size_t count);
  void (*pack)(const PackTask& task);
  // puts the weights of one tap of one filter into its lane, the units being `unit_stride` bytes apart
  void (*place)(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride);
  void (*convolve)(const ConvTask& task);
  int64_t (*count_registers)(int64_t steps, int32_t* sink);  // see ceiling.inl
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
