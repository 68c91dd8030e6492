// What both kinds of convolution share: checked geometry, weights in the layout of one variant, and how a run is cut
// into tasks. binary_conv.h and quantized_conv.h say what is packed and what the weights are.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "siman.h"
#include "variant.h"

namespace siman {

using Geometry = siman_geometry;
using Status = siman_status;

constexpr int64_t kMaxElements = 2147483647;  // of X, W and Y, and the largest stride, pad or dilation
constexpr int64_t kMaxTaps = 1 << 24;         // channels*kH*kW: integers up to here are exact in float32
constexpr int64_t kMaxQuantizedTaps = 518;    // 518*255*127 < 2^24

constexpr siman_pool kNoPool{{1, 1}, {1, 1}, {0, 0, 0, 0}};

// The pool of the caller; without a function all is done in order on this thread.
struct Pool {
  siman_parallel_for parallel_for;
  void* pool;
};

template <class Task>
void for_each(const Pool& pool, size_t count, const Task& task) {
  if (!pool.parallel_for || count < 2) {
    for (size_t i = 0; i < count; ++i) task(i);
    return;
  }
  const auto call = [](void* context, size_t i) { (*static_cast<const Task*>(context))(i); };
  pool.parallel_for(pool.pool, call, const_cast<Task*>(&task), count);
}

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

inline size_t round_up_div(size_t a, size_t b) { return (a + b - 1) / b; }

// Where the weights of one tap of one filter go.
struct Place {
  int64_t filter, tap;
  size_t slot;  // of the filter
  int lane;
  uint8_t* vector;  // of the first unit
  size_t unit_stride;
};

class Conv {
 public:
  virtual ~Conv() = default;

  const Variant& variant() const { return variant_; }
  Status output_shape(const int64_t image[4], int64_t output[4]) const;
  Status run(const Run& run, const Pool& pool) const;

 protected:
  // Consecutive filters of one group that a task takes together.
  struct Block {
    int64_t group, filter, filters;  // which group, the first filter of the block, and how many
    int vectors;
    size_t slot;  // of the first filter, among those of all blocks with those that fill up vectors
    size_t weights;
  };

  // What the phases of one run share.
  struct Job {
    const Run& run;
    const Pool& pool;
    int64_t convolved[2];  // rows and columns of the convolution; those of Y where there is no max pool
    int64_t output[4];
    size_t plane, sample;            // floats of X
    size_t group_bytes;              // of one packed group of one sample
    bool fetches;                    // see ConvTask
    int64_t first = 0, samples = 0;  // of X: those that go through the phases together
    Bytes packed;                    // [sample][group][group_bytes]

    const float* x(int64_t i) const { return run.x + static_cast<size_t>(first + i) * sample; }
    uint8_t* packed_group(int64_t i, int64_t group, int64_t groups) const {
      return packed.get() + static_cast<size_t>(i * groups + group) * group_bytes;
    }
  };

  // `taps` of `tap_channels` each is what the kernel sees; `task_macs` is how many multiplications make a task.
  Conv(const Geometry& geometry, const Variant& variant, const Kernel& kernel, int64_t taps, int64_t tap_channels,
       int64_t task_macs, const float* scale, const float* bias, const float* slope);

  // Calls put(place) for each tap of each filter.
  template <class Put>
  void lay_out(const Put& put);

  virtual size_t packed_bytes(const Job& job) const = 0;  // of one group of one sample
  virtual void pack(const Job& job) const = 0;
  virtual void describe(const Job& job, const Block& block, ConvTask& task) const = 0;  // what only it knows

  Geometry geometry_;
  siman_pool pool_ = kNoPool;
  size_t slots_ = 0;  // filters of all blocks with those that fill up vectors
  size_t pixel_bytes_ = 0;
  int64_t taps_, units_;  // units: of one tap
  Bytes weights_;

 private:
  void make_blocks();
  Status sizes(const int64_t image[4], int64_t convolved[2], int64_t output[4]) const;
  bool pools() const;
  int64_t count_bands(const Job& job) const;
  void convolve_samples(const Job& job) const;
  ConvTask task_for(const Job& job, int64_t sample, const Block& block) const;

  const Variant& variant_;
  const Kernel& kernel_;
  int64_t task_macs_;
  std::unique_ptr<Block[]> blocks_;
  size_t block_count_ = 0;
  std::unique_ptr<float[]> scale_, bias_, slope_;
};

template <class Put>
void Conv::lay_out(const Put& put) {
  const auto vector_bytes = static_cast<size_t>(kernel_.vector_bytes);
  for (const Block* block = blocks_.get(); block != blocks_.get() + block_count_; ++block) {
    const size_t unit_stride = vector_bytes * static_cast<size_t>(block->vectors);
    for (int64_t tap = 0; tap < taps_; ++tap) {
      uint8_t* units = weights_.get() + block->weights + static_cast<size_t>(tap * units_) * unit_stride;
      for (int64_t f = 0; f < block->filters; ++f) {
        uint8_t* vector = units + static_cast<size_t>(f / kernel_.lanes) * vector_bytes;
        const size_t slot = block->slot + static_cast<size_t>(f);
        put(Place{block->filter + f, tap, slot, static_cast<int>(f % kernel_.lanes), vector, unit_stride});
      }
    }
  }
}

}  // namespace siman
