#include "xor_conv.h"

#include <bit>
#include <cstring>

namespace siman {
namespace {

constexpr int64_t kTaskMacs = 1 << 23;  // of one bit; some ten microseconds

}  // namespace

XorConv::XorConv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias,
                 const float* slope, const Variant& variant)
    : BinaryConv(geometry, scale, bias, slope, variant, variant.binary.kernel, kTaskMacs),
      ones_(std::make_unique<int32_t[]>(static_cast<size_t>((geometry.kernel[0] + 1) * (geometry.kernel[1] + 1)) *
                                        slots_)) {
  const Kernel& kernel = kernels_.kernel;
  pixel_bytes_ = bit_bytes_ * 8 / static_cast<size_t>(kernel.unit_channels) * static_cast<size_t>(kernel.unit_bytes);
  lay_out([&](const Place& to) {
    kernels_.place(tap(weights, to.filter, to.tap), tap_bytes_, to.lane, to.vector, to.unit_stride);
    if (to.tap == 0) count_ones(weights, to.filter, to.slot);
  });
}

// ones[i][j]: those of the taps in the rectangle above row i and left of column j, by inclusion and exclusion.
void XorConv::count_ones(const uint8_t* weights, int64_t filter, size_t slot) {
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

// Columns before the first: pairs whose first pixel is left of the image and whose second is in it.
size_t XorConv::partners(const Job& job) const {
  if (!kernels_.pair || geometry_.pads[1] == 0) return 0;
  return static_cast<size_t>(std::min(geometry_.strides[1], job.run.image[3]));
}

size_t XorConv::row_bytes(const Job& job) const {
  return (partners(job) + static_cast<size_t>(job.run.image[3])) * pixel_bytes_;
}

size_t XorConv::image_bytes(const Job& job) const { return static_cast<size_t>(job.run.image[2]) * row_bytes(job); }

// The image, a pixel of zeros, and then the bits where pixels are paired.
size_t XorConv::packed_bytes(const Job& job) const {
  const size_t bits = kernels_.pair ? job.plane * bit_bytes_ : 0;
  return round_up_div(image_bytes(job) + pixel_bytes_ + bits, 64) * 64;
}

void XorConv::pack_rows(const Job& job, const Rows& rows) const {
  uint8_t *packed = job.packed_group(rows.sample, rows.group, geometry_.group), *zeros = packed + image_bytes(job);
  if (rows.end == static_cast<size_t>(job.run.image[2])) std::memset(zeros, 0, pixel_bytes_);
  if (!kernels_.pair) return pack_bits(job, rows, packed, pixel_bytes_);
  uint8_t* bits = zeros + pixel_bytes_;
  pack_bits(job, rows, bits, bit_bytes_);
  const auto columns = static_cast<size_t>(job.run.image[3]), distance = static_cast<size_t>(geometry_.strides[1]);
  kernels_.pair({bits + rows.begin * columns * bit_bytes_, bit_bytes_ / sizeof(uint64_t), rows.end - rows.begin,
                 columns, distance, partners(job), packed + rows.begin * row_bytes(job)});
}

void XorConv::describe(const Job& job, const Block& block, ConvTask& task) const {
  const Geometry& g = geometry_;
  const auto axis = [&](int i) {
    return Axis{job.run.image[2 + i], job.convolved[i], g.kernel[i], g.strides[i], g.pads[i], g.dilations[i]};
  };
  task.zeros = task.packed + image_bytes(job);
  task.partners = static_cast<int64_t>(partners(job));
  task.packed += partners(job) * pixel_bytes_;
  task.row_bytes = row_bytes(job);
  task.rows = axis(0);
  task.columns = axis(1);
  task.ones = ones_.get() + block.slot;
  task.ones_stride = slots_;
}

}  // namespace siman
