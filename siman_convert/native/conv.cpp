#include "conv.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace siman {
namespace {

constexpr size_t kSumBlock = 4096;       // elements that are summed together: part of the operator's meaning
constexpr size_t kTaskFloats = 1 << 15;  // that a task of the first two phases reads
constexpr int64_t kTaskMacs = 1 << 23;   // one-bit multiplications of a task of the third
constexpr size_t kWaveBytes =
    size_t{4} << 20;  // of input that is taken through the phases together, to stay in the cache

size_t round_up_div(size_t a, size_t b) { return (a + b - 1) / b; }

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

template <class Task>
void for_each(const Pool& pool, size_t count, const Task& task) {
  if (!pool.parallel_for || count < 2) {
    for (size_t i = 0; i < count; ++i) task(i);
    return;
  }
  const auto call = [](void* context, size_t i) { (*static_cast<const Task*>(context))(i); };
  pool.parallel_for(pool.pool, call, const_cast<Task*>(&task), count);
}

}  // namespace

Conv::Conv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias, const float* slope,
           const Variant& variant)
    : geometry_(geometry),
      variant_(variant),
      taps_(geometry.kernel[0] * geometry.kernel[1]),
      tap_bytes_(static_cast<size_t>((geometry.channels + 7) / 8)),
      units_((geometry.channels + variant.unit_channels - 1) / variant.unit_channels),
      pixel_bytes_(
          static_cast<size_t>((geometry.channels + 63) / 64 * (64 / variant.unit_channels) * variant.unit_bytes)),
      scale_(copy(scale, geometry.filters)),
      bias_(copy(bias, geometry.filters)),
      slope_(copy(slope, geometry.filters)) {
  make_blocks();
  for (size_t b = 0; b < block_count_; ++b) {
    lay_out(blocks_[b], weights);
    count_ones(blocks_[b], weights);
  }
}

// Each group is cut into blocks of `vectors` vectors, and what is left into blocks of `few_vectors`.
void Conv::make_blocks() {
  const int64_t filters = geometry_.filters / geometry_.group;
  const int64_t full = variant_.lanes * variant_.vectors, few = variant_.lanes * variant_.few_vectors;
  const int64_t full_blocks = filters / full, few_blocks = (filters % full + few - 1) / few;
  block_count_ = static_cast<size_t>(geometry_.group * (full_blocks + few_blocks));
  blocks_ = std::make_unique<Block[]>(block_count_);
  const size_t bytes_per_lane = static_cast<size_t>(taps_ * units_ * variant_.vector_bytes / variant_.lanes);
  Block* block = blocks_.get();
  for (int64_t group = 0; group < geometry_.group; ++group) {
    for (int64_t filter = 0, lanes = 0; filter < filters; filter += lanes, ++block) {
      const bool is_full = filter < full_blocks * full;
      lanes = is_full ? full : few;
      const int vectors = is_full ? variant_.vectors : variant_.few_vectors;
      *block = {group, filter, std::min(lanes, filters - filter), vectors, slots_, slots_ * bytes_per_lane};
      slots_ += static_cast<size_t>(lanes);
    }
  }
  weights_ = zeroed_bytes(slots_ * bytes_per_lane);
  ones_ =
      std::make_unique<int32_t[]>(static_cast<size_t>((geometry_.kernel[0] + 1) * (geometry_.kernel[1] + 1)) * slots_);
}

const uint8_t* Conv::tap(const uint8_t* weights, int64_t filter, int64_t at) const {
  return weights + static_cast<size_t>(filter * taps_ + at) * tap_bytes_;
}

void Conv::lay_out(const Block& block, const uint8_t* weights) {
  const int64_t first = block.group * (geometry_.filters / geometry_.group) + block.filter;
  const size_t vector_bytes = static_cast<size_t>(variant_.vector_bytes), unit_stride = vector_bytes * block.vectors;
  for (int64_t at = 0; at < taps_; ++at) {
    uint8_t* out = weights_.get() + block.weights + static_cast<size_t>(at * units_) * unit_stride;
    for (int64_t f = 0; f < block.filters; ++f) {
      uint8_t* vector = out + static_cast<size_t>(f / variant_.lanes) * vector_bytes;
      variant_.place(tap(weights, first + f, at), tap_bytes_, static_cast<int>(f % variant_.lanes), vector,
                     unit_stride);
    }
  }
}

// ones[i][j]: those of the taps in the rectangle above row i and left of column j, by inclusion and exclusion.
void Conv::count_ones(const Block& block, const uint8_t* weights) {
  const int64_t first = block.group * (geometry_.filters / geometry_.group) + block.filter;
  const int64_t rows = geometry_.kernel[0], columns = geometry_.kernel[1];
  const size_t row = static_cast<size_t>(columns + 1) * slots_;
  for (int64_t f = 0; f < block.filters; ++f) {
    int32_t* above = ones_.get() + block.slot + f;
    for (int64_t i = 0; i < rows; ++i, above += row) {
      for (int64_t j = 0; j < columns; ++j) {
        const uint8_t* bytes = tap(weights, first + f, i * columns + j);
        int32_t ones = 0;
        for (size_t b = 0; b < tap_bytes_; ++b) ones += std::popcount(bytes[b]);
        const size_t left = static_cast<size_t>(j) * slots_, right = left + slots_;
        above[row + right] = above[right] + above[row + left] - above[left] + ones;
      }
    }
  }
}

struct Conv::Job {
  const Run& run;
  const Pool& pool;
  int64_t output[4];
  size_t plane, sample;            // floats of X
  size_t sum_blocks;               // of a sample
  size_t group_bytes;              // of one packed group of one sample, with its pixel of zeros
  int64_t first = 0, samples = 0;  // of X: those that go through the phases together
  std::unique_ptr<double[]> sums;  // [sample][sum_blocks]
  Bytes packed;                    // [sample][group][pixel][pixel_bytes]

  const float* x(int64_t i) const { return run.x + static_cast<size_t>(first + i) * sample; }
  uint8_t* packed_group(int64_t i, int64_t group, int64_t groups) const {
    return packed.get() + static_cast<size_t>(i * groups + group) * group_bytes;
  }
  float mean(int64_t i) const {
    double total = 0;
    for (size_t b = 0; b < sum_blocks; ++b) total += sums[static_cast<size_t>(i) * sum_blocks + b];
    return static_cast<float>(total / static_cast<double>(sample));
  }
};

Status Conv::run(const Run& run, const Pool& pool) const {
  Job job{run, pool, {}, 0, 0, 0, 0, 0, 0, nullptr, nullptr};
  const Status status = output_shape(run.image, job.output);
  if (status != SIMAN_OK || run.image[0] == 0) return status;
  job.plane = static_cast<size_t>(run.image[2] * run.image[3]);
  job.sample = job.plane * static_cast<size_t>(run.image[1]);
  job.sum_blocks = round_up_div(job.sample, kSumBlock);
  job.group_bytes = (job.plane + 1) * pixel_bytes_;
  const auto in_cache = static_cast<int64_t>(kWaveBytes / (job.sample * sizeof(float)));
  const int64_t wave = std::clamp(in_cache, int64_t{1}, run.image[0]);
  if (geometry_.center) job.sums = std::make_unique<double[]>(static_cast<size_t>(wave) * job.sum_blocks);
  job.packed = uninitialised_bytes(static_cast<size_t>(wave * geometry_.group) * job.group_bytes);
  for (; job.first < run.image[0]; job.first += wave) {
    job.samples = std::min(wave, run.image[0] - job.first);
    if (geometry_.center) sum_samples(job);
    pack_samples(job);
    convolve_samples(job);
  }
  return SIMAN_OK;
}

void Conv::sum_samples(const Job& job) const {
  constexpr size_t kBlocks = kTaskFloats / kSumBlock;
  const size_t tasks = round_up_div(job.sum_blocks, kBlocks);
  for_each(job.pool, tasks * static_cast<size_t>(job.samples), [&](size_t i) {
    const size_t sample = i / tasks, begin = i % tasks * kBlocks, end = std::min(begin + kBlocks, job.sum_blocks);
    const float* x = job.x(static_cast<int64_t>(sample));
    for (size_t b = begin; b < end; ++b)
      job.sums[sample * job.sum_blocks + b] =
          variant_.sum_block(x + b * kSumBlock, std::min(kSumBlock, job.sample - b * kSumBlock));
  });
}

void Conv::pack_samples(const Job& job) const {
  const auto channels = static_cast<size_t>(geometry_.channels);
  const size_t pixels = std::max(kTaskFloats / (job.sample / job.plane) / 16 * 16, size_t{16});
  const size_t tasks = round_up_div(job.plane, pixels);
  for_each(job.pool, tasks * static_cast<size_t>(job.samples), [&](size_t i) {
    const auto sample = static_cast<int64_t>(i / tasks);
    const size_t begin = i % tasks * pixels, end = std::min(begin + pixels, job.plane);
    const float threshold = geometry_.center ? job.mean(sample) : 0.0f;
    for (int64_t g = 0; g < geometry_.group; ++g) {
      uint8_t* packed = job.packed_group(sample, g, geometry_.group);
      const float* x = job.x(sample) + static_cast<size_t>(g) * channels * job.plane;
      variant_.pack({x, job.plane, channels, threshold, packed, pixel_bytes_, begin, end});
      if (end == job.plane) std::memset(packed + job.plane * pixel_bytes_, 0, pixel_bytes_);
    }
  });
}

void Conv::convolve_samples(const Job& job) const {
  const int64_t out_h = job.output[2], lanes = variant_.lanes * variant_.vectors;
  const int64_t row_macs = job.output[3] * lanes * geometry_.channels;  // < 2^62, as out_w*channels is bounded by X
  const int64_t rows = std::clamp(kTaskMacs / std::max(row_macs, int64_t{1}) / taps_, int64_t{1}, out_h);
  const int64_t bands = (out_h + rows - 1) / rows;
  const size_t per_sample = block_count_ * static_cast<size_t>(bands);
  for_each(job.pool, per_sample * static_cast<size_t>(job.samples), [&](size_t i) {
    const auto sample = static_cast<int64_t>(i / per_sample);
    const auto band = static_cast<int64_t>(i % per_sample) % bands;
    ConvTask task = task_for(job, sample, blocks_[i % per_sample / static_cast<size_t>(bands)]);
    task.row_begin = band * out_h / bands;
    task.row_end = (band + 1) * out_h / bands;
    variant_.convolve(task);
  });
}

ConvTask Conv::task_for(const Job& job, int64_t sample, const Block& block) const {
  const Geometry& g = geometry_;
  const auto axis = [&](int i) {
    return Axis{job.run.image[2 + i], job.output[2 + i], g.kernel[i], g.strides[i], g.pads[i], g.dilations[i]};
  };
  const int64_t filter = block.group * (g.filters / g.group) + block.filter;
  const auto y = static_cast<size_t>(((job.first + sample) * g.filters + filter) * job.output[2] * job.output[3]);
  ConvTask task{};
  task.rows = axis(0);
  task.columns = axis(1);
  task.channels = g.channels;
  task.units = units_;
  task.packed = job.packed_group(sample, block.group, g.group);
  task.pixel_bytes = pixel_bytes_;
  task.weights = weights_.get() + block.weights;
  task.ones = ones_.get() + block.slot;
  task.ones_stride = slots_;
  task.vectors = block.vectors;
  task.filters = block.filters;
  task.scale = scale_.get() + filter;
  task.bias = bias_.get() + filter;
  task.slope = slope_.get() + filter;
  task.residual_is_full = job.run.residual_is_full;
  task.residual = job.run.residual + (job.run.residual_is_full ? y : 0);
  task.y = job.run.y + y;
  return task;
}

}  // namespace siman
