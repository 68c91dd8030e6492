#include "binary_conv.h"

#include "matrix_conv.h"
#include "xor_conv.h"

namespace siman {
namespace {

constexpr size_t kTaskFloats = size_t{1} << 15;  // of summing or packing: some microseconds

// The mean of a sample, from its sums.
float mean(const double* sums, size_t count, size_t elements) {
  double total = 0;
  for (size_t b = 0; b < count; ++b) total += sums[b];
  return static_cast<float>(total / static_cast<double>(elements));
}

}  // namespace

std::unique_ptr<Conv> make_binary_conv(const Geometry& geometry, const uint8_t* weights, const float* scale,
                                       const float* bias, const float* slope, const Variant& variant) {
  if (MatrixConv::suits(geometry, variant))
    return std::make_unique<MatrixConv>(geometry, weights, scale, bias, slope, variant);
  return std::make_unique<XorConv>(geometry, weights, scale, bias, slope, variant);
}

BinaryConv::BinaryConv(const Geometry& geometry, const float* scale, const float* bias, const float* slope,
                       const Variant& variant, const Kernel& kernel, int64_t task_macs)
    : Conv(geometry, variant, kernel, geometry.kernel[0] * geometry.kernel[1], geometry.channels, task_macs, scale,
           bias, slope),
      kernels_(variant.binary),
      tap_bytes_(static_cast<size_t>((geometry.channels + 7) / 8)),
      bit_bytes_(static_cast<size_t>((geometry.channels + 63) / 64 * 8)) {}

const uint8_t* BinaryConv::tap(const uint8_t* weights, int64_t filter, int64_t at) const {
  return weights + static_cast<size_t>(filter * geometry_.kernel[0] * geometry_.kernel[1] + at) * tap_bytes_;
}

std::unique_ptr<double[]> BinaryConv::sum_samples(const Job& job) const {
  const size_t sum_blocks = round_up_div(job.sample, kSumBlock), tasks = round_up_div(job.sample, kTaskFloats);
  auto sums = std::make_unique<double[]>(static_cast<size_t>(job.samples) * sum_blocks);
  for_each(job.pool, tasks * static_cast<size_t>(job.samples), [&](size_t i) {
    const size_t sample = i / tasks, task = i % tasks, end = (task + 1) * sum_blocks / tasks;
    const float* x = job.x(static_cast<int64_t>(sample));
    for (size_t b = task * sum_blocks / tasks; b < end; ++b)
      sums[sample * sum_blocks + b] =
          kernels_.sum_block(x + b * kSumBlock, std::min(kSumBlock, job.sample - b * kSumBlock));
  });
  return sums;
}

// Tasks of nearly the same number of whole rows, as pixels may be paired with others of their row; where there are so
// many pixels, none has fewer than a vector.
void BinaryConv::pack(const Job& job) const {
  constexpr size_t kVector = 16;
  const auto sums = geometry_.center ? sum_samples(job) : nullptr;
  const size_t sum_blocks = round_up_div(job.sample, kSumBlock);
  const auto rows = static_cast<size_t>(job.run.image[2]), columns = static_cast<size_t>(job.run.image[3]);
  const size_t most = std::max(rows / round_up_div(kVector, columns), size_t{1});
  const size_t tasks = std::min(round_up_div(job.sample, kTaskFloats), most);
  for_each(job.pool, tasks * static_cast<size_t>(job.samples), [&](size_t i) {
    const auto sample = static_cast<int64_t>(i / tasks);
    const size_t begin = i % tasks * rows / tasks, end = (i % tasks + 1) * rows / tasks;
    const float threshold = sums ? mean(sums.get() + i / tasks * sum_blocks, sum_blocks, job.sample) : 0.0f;
    for (int64_t g = 0; g < geometry_.group; ++g) pack_rows(job, {sample, g, threshold, begin, end});
  });
}

// `packed` is pixel 0 of the group.
void BinaryConv::pack_bits(const Job& job, const Rows& rows, uint8_t* packed, size_t pixel_bytes) const {
  const auto channels = static_cast<size_t>(geometry_.channels), columns = static_cast<size_t>(job.run.image[3]);
  const float* x = job.x(rows.sample) + static_cast<size_t>(rows.group) * channels * job.plane;
  kernels_.pack(
      {x, job.plane, channels, rows.threshold, packed, pixel_bytes, rows.begin * columns, rows.end * columns});
}

}  // namespace siman
