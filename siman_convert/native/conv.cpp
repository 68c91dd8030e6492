#include "conv.h"

#include <atomic>
#include <cstring>

namespace siman {
namespace {

// Of input, or of what it is packed into, that is taken through the phases together, to stay in the cache.
constexpr size_t kWaveBytes = size_t{1} << 20;
// Of X, Y and residual of a whole batch: of more, some have left the second-level cache since the last operator.
constexpr size_t kCacheBytes = size_t{1} << 20;

// On the boundary of a cache line: no vector of weights should straddle two.
Bytes uninitialised_bytes(size_t size) {
  return Bytes(static_cast<uint8_t*>(::operator new (size, std::align_val_t{64})));
}

Bytes zeroed_bytes(size_t size) {
  Bytes bytes = uninitialised_bytes(size);
  std::memset(bytes.get(), 0, size);
  return bytes;
}

std::unique_ptr<float[]> copy(const float* values, int64_t count) {
  auto copied = std::make_unique<float[]>(static_cast<size_t>(count));
  std::copy_n(values, count, copied.get());
  return copied;
}

}  // namespace

Conv::Conv(const Geometry& geometry, const Variant& variant, const Kernel& kernel, int64_t taps, int64_t tap_channels,
           int64_t task_macs, const float* scale, const float* bias, const float* slope)
    : geometry_(geometry),
      taps_(taps),
      units_((tap_channels + kernel.unit_channels - 1) / kernel.unit_channels),
      variant_(variant),
      kernel_(kernel),
      task_macs_(task_macs),
      scale_(copy(scale, geometry.filters)),
      bias_(copy(bias, geometry.filters)),
      slope_(copy(slope, geometry.filters)) {
  make_blocks();
}

// Each group is cut into blocks of `vectors` vectors, and what is left into blocks of `few_vectors`.
void Conv::make_blocks() {
  const int64_t filters = geometry_.filters / geometry_.group;
  const int64_t full = kernel_.lanes * kernel_.vectors, few = kernel_.lanes * kernel_.few_vectors;
  const int64_t full_blocks = filters / full, few_blocks = (filters % full + few - 1) / few;
  block_count_ = static_cast<size_t>(geometry_.group * (full_blocks + few_blocks));
  blocks_ = std::make_unique<Block[]>(block_count_);
  const size_t bytes_per_lane = static_cast<size_t>(taps_ * units_ * kernel_.vector_bytes / kernel_.lanes);
  Block* block = blocks_.get();
  for (int64_t group = 0; group < geometry_.group; ++group) {
    for (int64_t filter = 0, lanes = 0; filter < filters; filter += lanes, ++block) {
      const bool is_full = filter < full_blocks * full;
      lanes = is_full ? full : few;
      const int vectors = is_full ? kernel_.vectors : kernel_.few_vectors;
      const int64_t count = std::min(lanes, filters - filter);
      *block = {group, group * filters + filter, count, vectors, slots_, slots_ * bytes_per_lane};
      slots_ += static_cast<size_t>(lanes);
    }
  }
  weights_ = zeroed_bytes(slots_ * bytes_per_lane);
}

Status Conv::run(const Run& run, const Pool& pool) const {
  Job job{run, pool, {}, {}, 0, 0, 0, false, 0, 0, nullptr};
  const Status status = sizes(run.image, job.convolved, job.output);
  if (status != SIMAN_OK || run.image[0] == 0) return status;
  job.plane = static_cast<size_t>(run.image[2] * run.image[3]);
  job.sample = job.plane * static_cast<size_t>(run.image[1]);
  job.group_bytes = packed_bytes(job);
  const auto y = static_cast<size_t>(job.output[0] * job.output[1] * job.output[2] * job.output[3]);
  const size_t x = static_cast<size_t>(run.image[0]) * job.sample;
  job.fetches = (x + (run.residual_is_full ? 2 * y : y)) * sizeof(float) > kCacheBytes;
  const size_t packed = job.group_bytes * static_cast<size_t>(geometry_.group);
  const auto in_cache = static_cast<int64_t>(kWaveBytes / std::max(job.sample * sizeof(float), packed));
  const int64_t wave = std::clamp(in_cache, int64_t{1}, run.image[0]);
  job.packed = uninitialised_bytes(static_cast<size_t>(wave) * packed);
  for (; job.first < run.image[0]; job.first += wave) {
    job.samples = std::min(wave, run.image[0] - job.first);
    pack(job);
    convolve_samples(job);
  }
  return SIMAN_OK;
}

bool Conv::pools() const {
  return std::max({pool_.kernel[0], pool_.kernel[1], pool_.strides[0], pool_.strides[1]}) > 1;
}

// Rows of Y go into as many bands. The rows of the convolution that two windows of a pool share are computed in both
// of their bands: bands of four times the work make that little.
int64_t Conv::count_bands(const Job& job) const {
  const int64_t convolved = job.convolved[0], lanes = kernel_.lanes * kernel_.vectors;
  const int64_t row_macs = job.convolved[1] * lanes * geometry_.channels;  // < 2^62: columns*channels is bounded by X
  const int64_t taps = geometry_.kernel[0] * geometry_.kernel[1], macs = pools() ? 4 * task_macs_ : task_macs_;
  const int64_t rows = std::clamp(macs / std::max(row_macs, int64_t{1}) / taps, int64_t{1}, convolved);
  return std::min((convolved + rows - 1) / rows, job.output[2]);
}

void Conv::convolve_samples(const Job& job) const {
  const int64_t out_h = job.output[2], bands = count_bands(job);
  const int64_t kept_rows = std::min(pool_.kernel[0], job.convolved[0]);
  std::atomic<bool> no_memory = false;  // an exception cannot leave a task
  const size_t per_sample = block_count_ * static_cast<size_t>(bands);
  for_each(job.pool, per_sample * static_cast<size_t>(job.samples), [&](size_t i) {
    const auto sample = static_cast<int64_t>(i / per_sample);
    const auto band = static_cast<int64_t>(i % per_sample) % bands;
    ConvTask task = task_for(job, sample, blocks_[i % per_sample / static_cast<size_t>(bands)]);
    task.row_begin = band * out_h / bands;
    task.row_end = (band + 1) * out_h / bands;
    Bytes kept;
    if (pools()) {
      const size_t kept_bytes =
          static_cast<size_t>(kept_rows * job.convolved[1] * kernel_.lanes * task.vectors) * sizeof(float);
      kept.reset(static_cast<uint8_t*>(::operator new (kept_bytes, std::align_val_t{64}, std::nothrow)));
      if (!kept) return no_memory.store(true);
      task.kept = reinterpret_cast<float*>(kept.get());
      task.kept_rows = kept_rows;
    }
    kernel_.convolve(task);
  });
  if (no_memory) throw std::bad_alloc();
}

ConvTask Conv::task_for(const Job& job, int64_t sample, const Block& block) const {
  const int64_t filters = geometry_.filters, filter = block.filter;
  const auto y = static_cast<size_t>(((job.first + sample) * filters + filter) * job.output[2] * job.output[3]);
  ConvTask task{};
  task.channels = geometry_.channels;
  task.units = units_;
  task.packed = job.packed_group(sample, block.group, geometry_.group);
  task.pixel_bytes = pixel_bytes_;
  task.weights = weights_.get() + block.weights;
  task.vectors = block.vectors;
  task.filters = block.filters;
  task.scale = scale_.get() + filter;
  task.bias = bias_.get() + filter;
  task.slope = slope_.get() + filter;
  task.residual_is_full = job.run.residual_is_full;
  task.residual = job.run.residual + (job.run.residual_is_full ? y : 0);
  task.y = job.run.y + y;
  task.fetches = job.fetches && !pools();
  const auto axis = [&](int i) {
    return Axis{job.convolved[i], job.output[2 + i], pool_.kernel[i], pool_.strides[i], pool_.pads[i], 1};
  };
  task.pool_rows = axis(0);
  task.pool_columns = axis(1);
  describe(job, block, task);
  return task;
}

}  // namespace siman
