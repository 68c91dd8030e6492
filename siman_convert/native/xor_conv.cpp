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
  pixel_bytes_ = static_cast<size_t>((geometry.channels + 63) / 64 * (64 / kernel.unit_channels) * kernel.unit_bytes);
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

// With a pixel of zeros after the others.
size_t XorConv::packed_bytes(const Job& job) const { return (job.plane + 1) * pixel_bytes_; }

void XorConv::pack_pixels(const Job& job, const Pixels& p) const {
  uint8_t* packed = job.packed_group(p.sample, p.group, geometry_.group);
  pack_bits(job, p, packed, pixel_bytes_);
  if (p.end == job.plane) std::memset(packed + job.plane * pixel_bytes_, 0, pixel_bytes_);
}

void XorConv::describe(const Job& job, const Block& block, ConvTask& task) const {
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
