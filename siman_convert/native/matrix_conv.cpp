#include "matrix_conv.h"

#include <cstring>

namespace siman {
namespace {

constexpr int64_t kTaskMacs = 1 << 25;  // some ten microseconds
constexpr int64_t kLeastChannels = 16, kLeastFilters = 16;
constexpr int64_t kMostReach = 16;         // of strides and dilated kernels
constexpr int64_t kMostDropped = 6;        // positions at the end of a row that are none of the output
constexpr int64_t kMostPadding = 1 << 22;  // bytes of a sample, so that a small X stays small

// Bytes of one pixel of all groups, times the padding of an image of one pixel, and what is read beyond it.
int64_t padding_bytes(const Geometry& g, const MatrixKernels& matrix) {
  const int64_t unit = matrix.kernel.unit_bytes, units = (g.channels + unit - 1) / unit;
  const int64_t rows = g.pads[0] + g.pads[2] + g.strides[0], columns = g.pads[1] + g.pads[3] + g.strides[1];
  return g.group * unit * (units * rows * columns + matrix.most_positions * g.strides[1]);
}

}  // namespace

bool MatrixConv::suits(const Geometry& g, const Variant& variant) {
  if (!variant.matrix.kernel.convolve || g.channels < kLeastChannels || g.filters / g.group < kLeastFilters)
    return false;
  for (int i = 0; i < 2; ++i) {
    if (g.kernel[i] > kMostReach || g.dilations[i] > kMostReach || g.strides[i] > kMostReach) return false;
    const int64_t reach = (g.kernel[i] - 1) * g.dilations[i];
    if (reach >= kMostReach || g.pads[i] > reach || g.pads[2 + i] > reach) return false;
  }
  const int64_t dropped = (g.kernel[1] - 1) * g.dilations[1] / g.strides[1];
  return dropped <= kMostDropped && padding_bytes(g, variant.matrix) <= kMostPadding;
}

MatrixConv::MatrixConv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias,
                       const float* slope, const Variant& variant)
    : BinaryConv(geometry, scale, bias, slope, variant, variant.matrix.kernel, kTaskMacs) {
  const Kernel& kernel = variant.matrix.kernel;
  pixel_bytes_ = static_cast<size_t>(kernel.unit_bytes);
  const auto tap_stride = static_cast<size_t>(kernel.vector_bytes),
             unit_stride = tap_stride * static_cast<size_t>(taps_);
  lay_out([&](const Place& to) {  // [vector][unit][tap], whatever the block
    uint8_t* vector =
        weights_.get() + to.slot / static_cast<size_t>(kernel.lanes) * unit_stride * static_cast<size_t>(units_);
    variant.matrix.place(tap(weights, to.filter, to.tap), tap_bytes_, to.lane,
                         vector + static_cast<size_t>(to.tap) * tap_stride, unit_stride);
  });
}

// Rows or columns that taps reach.
int64_t MatrixConv::needed(const Job& job, int axis) const {
  return (job.convolved[axis] - 1) * geometry_.strides[axis] +
         (geometry_.kernel[axis] - 1) * geometry_.dilations[axis] + 1;
}

MatrixConv::Image MatrixConv::image(const Job& job) const {
  const int64_t *strides = geometry_.strides, rows = needed(job, 0), columns = needed(job, 1);
  return {strides[0], (rows + strides[0] - 1) / strides[0], (columns + strides[1] - 1) / strides[1] * strides[1]};
}

size_t MatrixConv::unit_bytes(const Image& image) const { return image.pixels() * pixel_bytes_; }

// With what is read beyond the last position.
size_t MatrixConv::image_bytes(const Job& job) const {
  const auto beyond = static_cast<size_t>(variant().matrix.most_positions * geometry_.strides[1]);
  return unit_bytes(image(job)) * static_cast<size_t>(units_) + beyond * pixel_bytes_;
}

// The image, and then its bits.
size_t MatrixConv::packed_bytes(const Job& job) const {
  return round_up_div(image_bytes(job) + job.plane * bit_bytes_, 64) * 64;
}

void MatrixConv::pack_rows(const Job& job, const Rows& rows) const {
  uint8_t* packed = job.packed_group(rows.sample, rows.group, geometry_.group);
  uint8_t* bits = packed + image_bytes(job);
  pack_bits(job, rows, bits, bit_bytes_);
  const Image to = image(job);
  const auto width = static_cast<size_t>(job.run.image[3]), channels = static_cast<size_t>(geometry_.channels);
  const auto left = static_cast<size_t>(geometry_.pads[1]), columns = static_cast<size_t>(to.columns);
  const size_t bytes = unit_bytes(to), room = columns > left ? columns - left : 0, used = width < room ? width : room;
  for (size_t y = rows.begin; used > 0 && y < rows.end; ++y) {
    const int64_t row = static_cast<int64_t>(y) + geometry_.pads[0];
    if (row >= to.phases * to.rows) break;
    uint8_t* first = packed + (to.first(row) + left) * pixel_bytes_;
    variant().matrix.spread({bits + y * width * bit_bytes_, channels, used, first, bytes});
  }
  clear_padding(job, rows, packed);
}

// Of these rows; with the first of X what is above, with the last what is below.
void MatrixConv::clear_padding(const Job& job, const Rows& of, uint8_t* packed) const {
  const Image to = image(job);
  const size_t bytes = unit_bytes(to);
  const int64_t height = job.run.image[2], above = geometry_.pads[0], left = geometry_.pads[1];
  const auto first = static_cast<int64_t>(of.begin), last = static_cast<int64_t>(of.end);
  const int64_t rows = to.phases * to.rows, begin = first == 0 ? 0 : above + first;
  const int64_t end = last == height ? rows : above + last;
  for (int64_t row = begin; row < std::min(end, rows); ++row) {
    const bool is_image = row >= above && row < above + height;
    for (int64_t u = 0; u < units_; ++u) {
      uint8_t* unit = packed + static_cast<size_t>(u) * bytes;
      clear_columns(to, row, 0, is_image ? left : to.columns, unit);
      if (is_image) clear_columns(to, row, left + job.run.image[3], to.columns, unit);
    }
  }
}

void MatrixConv::clear_columns(const Image& image, int64_t row, int64_t begin, int64_t end, uint8_t* packed) const {
  end = std::min(end, image.columns);
  if (begin >= end) return;
  uint8_t* from = packed + (image.first(row) + static_cast<size_t>(begin)) * pixel_bytes_;
  std::memset(from, 0, static_cast<size_t>(end - begin) * pixel_bytes_);
}

void MatrixConv::describe(const Job& job, const Block&, ConvTask& task) const {
  const Image from = image(job);
  const auto axis = [&](int64_t in, int i) {
    return Axis{in, job.convolved[i], geometry_.kernel[i], geometry_.strides[i], 0, geometry_.dilations[i]};
  };
  task.unit_bytes = unit_bytes(from);
  task.rows = axis(from.rows, 0);
  task.columns = axis(from.columns, 1);
}

}  // namespace siman
