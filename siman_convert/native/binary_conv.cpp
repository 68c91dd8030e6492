#include "binary_conv.h"

#include <bit>
#include <cstring>

namespace siman {
namespace {

constexpr size_t kSumBlock = 4096;       // elements that are summed together: part of the operator's meaning
constexpr int64_t kTaskMacs = 1 << 23;   // of one bit; some ten microseconds, what makes a task worth handing out
constexpr size_t kTaskFloats = 1 << 17;  // as many, of summing or packing

// The mean of a sample, from its sums.
float mean(const double* sums, size_t count, size_t elements) {
  double total = 0;
  for (size_t b = 0; b < count; ++b) total += sums[b];
  return static_cast<float>(total / static_cast<double>(elements));
}

}  // namespace

BinaryConv::BinaryConv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias,
                       const float* slope, const Variant& variant)
    : Conv(geometry, variant, variant.binary.kernel, geometry.kernel[0] * geometry.kernel[1], geometry.channels,
           kTaskMacs, scale, bias, slope),
      kernels_(variant.binary),
      tap_bytes_(static_cast<size_t>((geometry.channels + 7) / 8)),
      ones_(std::make_unique<int32_t[]>(static_cast<size_t>((geometry.kernel[0] + 1) * (geometry.kernel[1] + 1)) *
                                        slots_)) {
  const Kernel& kernel = kernels_.kernel;
  pixel_bytes_ = static_cast<size_t>((geometry.channels + 63) / 64 * (64 / kernel.unit_channels) * kernel.unit_bytes);
  lay_out([&](const Place& to) {
    kernels_.place(tap(weights, to.filter, to.tap), tap_bytes_, to.lane, to.vector, to.unit_stride);
    if (to.tap == 0) count_ones(weights, to.filter, to.slot);
  });
}

const uint8_t* BinaryConv::tap(const uint8_t* weights, int64_t filter, int64_t at) const {
  return weights + static_cast<size_t>(filter * geometry_.kernel[0] * geometry_.kernel[1] + at) * tap_bytes_;
}

// ones[i][j]: those of the taps in the rectangle above row i and left of column j, by inclusion and exclusion.
void BinaryConv::count_ones(const uint8_t* weights, int64_t filter, size_t slot) {
  const int64_t rows = geometry_.kernel[0], columns = geometry_.kernel[1];
  const size_t row = static_cast<size_t>(columns + 1) * slots_;
  int32_t* above = ones_.get() + slot;
  for (int64_t i = 0; i < rows; ++i, above += row) {
    for (int64_t j = 0; j < columns; ++j) {
      const uint8_t* bytes = tap(weights, filter, i * columns + j);
      int32_t ones = 0;
      for (size_t b = 0; b < tap_bytes_; ++b) ones += std::popcount(bytes[b]);
      const size_t left = static_cast<size_t>(j) * slots_, right = left + slots_;
      above[row + right] = above[right] + above[row + left] - above[left] + ones;
    }
  }
}

// With a pixel of zeros after the others.
size_t BinaryConv::packed_bytes(const Job& job) const { return (job.plane + 1) * pixel_bytes_; }

std::unique_ptr<double[]> BinaryConv::sum_samples(const Job& job) const {
  constexpr size_t kBlocks = kTaskFloats / kSumBlock;
  const size_t sum_blocks = round_up_div(job.sample, kSumBlock), tasks = round_up_div(sum_blocks, kBlocks);
  auto sums = std::make_unique<double[]>(static_cast<size_t>(job.samples) * sum_blocks);
  for_each(job.pool, tasks * static_cast<size_t>(job.samples), [&](size_t i) {
    const size_t sample = i / tasks, begin = i % tasks * kBlocks, end = std::min(begin + kBlocks, sum_blocks);
    const float* x = job.x(static_cast<int64_t>(sample));
    for (size_t b = begin; b < end; ++b)
      sums[sample * sum_blocks + b] =
          kernels_.sum_block(x + b * kSumBlock, std::min(kSumBlock, job.sample - b * kSumBlock));
  });
  return sums;
}

void BinaryConv::pack(const Job& job) const {
  const auto sums = geometry_.center ? sum_samples(job) : nullptr;
  const size_t sum_blocks = round_up_div(job.sample, kSumBlock);
  const auto channels = static_cast<size_t>(geometry_.channels);
  const size_t pixels = std::max(kTaskFloats / (job.sample / job.plane) / 16 * 16, size_t{16});
  const size_t tasks = round_up_div(job.plane, pixels);
  for_each(job.pool, tasks * static_cast<size_t>(job.samples), [&](size_t i) {
    const auto sample = static_cast<int64_t>(i / tasks);
    const size_t begin = i % tasks * pixels, end = std::min(begin + pixels, job.plane);
    const float threshold = sums ? mean(sums.get() + i / tasks * sum_blocks, sum_blocks, job.sample) : 0.0f;
    for (int64_t g = 0; g < geometry_.group; ++g) {
      uint8_t* packed = job.packed_group(sample, g, geometry_.group);
      const float* x = job.x(sample) + static_cast<size_t>(g) * channels * job.plane;
      kernels_.pack({x, job.plane, channels, threshold, packed, pixel_bytes_, begin, end});
      if (end == job.plane) std::memset(packed + job.plane * pixel_bytes_, 0, pixel_bytes_);
    }
  });
}

void BinaryConv::describe(const Job& job, const Block& block, ConvTask& task) const {
  const Geometry& g = geometry_;
  const auto axis = [&](int i) {
    return Axis{job.run.image[2 + i], job.convolved[i], g.kernel[i], g.strides[i], g.pads[i], g.dilations[i]};
  };
  task.rows = axis(0);
  task.columns = axis(1);
  task.ones = ones_.get() + block.slot;
  task.ones_stride = slots_;
}

}  // namespace siman
