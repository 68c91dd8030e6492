// A binary convolution: checked geometry, weights in the layout of one variant, and how a run is cut into tasks.
#pragma once

#include <memory>
#include <new>

#include "siman.h"
#include "variant.h"

namespace siman {

using Geometry = siman_geometry;
using Status = siman_status;

constexpr int64_t kMaxElements = 2147483647;  // of X, W and Y, and the largest stride, pad or dilation
constexpr int64_t kMaxTaps = 1 << 24;         // channels*kH*kW: integers up to here are exact in float32

// The pool of the caller; without a function all is done in order on this thread.
struct Pool {
  siman_parallel_for parallel_for;
  void* pool;
};

struct Run {
  const float* x;
  int64_t image[4];  // N, C, H, W
  const float* residual;
  bool residual_is_full;
  float* y;
};

struct AlignedDelete {
  void operator()(uint8_t* bytes) const { ::operator delete (bytes, std::align_val_t{64}); }
};
using Bytes = std::unique_ptr<uint8_t[], AlignedDelete>;

Status check_geometry(const Geometry& geometry);
Status check_weights(const Geometry& geometry, const uint8_t* weights, size_t size);

class Conv {
 public:
  // Geometry and weights are checked before.
  Conv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias, const float* slope,
       const Variant& variant);

  const Variant& variant() const { return variant_; }
  Status output_shape(const int64_t image[4], int64_t output[4]) const;
  Status run(const Run& run, const Pool& pool) const;

 private:
  // Consecutive filters of one group that a task takes together.
  struct Block {
    int64_t group, filter, filters;  // which group, the first filter of the block in it, and how many
    int vectors;
    size_t slot;  // of the first filter, in ones_
    size_t weights;
  };
  struct Job;  // what the phases of one run share

  void make_blocks();
  void lay_out(const Block& block, const uint8_t* weights);
  void count_ones(const Block& block, const uint8_t* weights);
  void sum_samples(const Job& job) const;
  void pack_samples(const Job& job) const;
  void convolve_samples(const Job& job) const;
  ConvTask task_for(const Job& job, int64_t sample, const Block& block) const;
  const uint8_t* tap(const uint8_t* weights, int64_t filter, int64_t at) const;

  Geometry geometry_;
  const Variant& variant_;
  int64_t taps_;        // kH*kW
  size_t tap_bytes_;    // of one tap of one filter, as handed over
  int64_t units_;       // of one tap
  size_t pixel_bytes_;  // of one pixel of one group, packed
  size_t slots_ = 0;    // filters of all blocks with those that fill up vectors
  std::unique_ptr<Block[]> blocks_;
  size_t block_count_ = 0;
  Bytes weights_;
  std::unique_ptr<int32_t[]> ones_;  // see ConvTask::ones; [kH+1][kW+1][slots]
  std::unique_ptr<float[]> scale_, bias_, slope_;
};

}  // namespace siman
