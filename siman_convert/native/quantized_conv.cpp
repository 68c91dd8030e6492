// X is quantized once, into an image with its padding where each tap is inside. Where strides are larger than the
// kernel the image leaves out what no tap reads: its rows and columns are then `kernel` taps for each output position.
#include "quantized_conv.h"

#include <cstring>
#include <vector>

namespace siman {
namespace {

constexpr int64_t kTaskMacs = 1 << 22;    // some ten microseconds
constexpr int64_t kTaskFloats = 1 << 15;  // as many, of quantizing
constexpr int64_t kTilePixels = 16;       // that a kernel may always take together
constexpr float kNoResidual = -0.0f;      // added to -0 as well it changes nothing

}  // namespace

QuantizedConv::QuantizedConv(const Geometry& geometry, const int8_t* weights, const float* scale, const float* bias,
                             const float* slope, float x_scale, int32_t x_zero_point, const siman_pool& pool,
                             const Variant& variant)
    : Conv(geometry, variant, variant.quantized.kernel, geometry.kernel[0], geometry.kernel[1] * geometry.channels,
           kTaskMacs, scale, bias, slope),
      kernels_(variant.quantized),
      x_scale_(x_scale),
      x_zero_point_(x_zero_point),
      zero_code_(variant.quantized.code_bytes == 1 ? x_zero_point : 0),
      base_(std::make_unique<int32_t[]>(slots_)) {
  pool_ = pool;
  pixel_bytes_ = static_cast<size_t>(geometry.channels * kernels_.code_bytes);
  const auto channels = static_cast<size_t>(geometry.channels), columns = static_cast<size_t>(geometry.kernel[1]);
  const size_t rows = static_cast<size_t>(geometry.kernel[0]), taps = rows * columns;
  std::vector<int8_t> row(columns * channels);  // of one filter, by columns and channels
  lay_out([&](const Place& to) {
    const int8_t* first =
        weights + static_cast<size_t>(to.filter) * channels * taps + static_cast<size_t>(to.tap) * columns;
    for (size_t i = 0; i < row.size(); ++i) row[i] = first[i % channels * taps + i / channels];
    kernels_.place(row.data(), row.size(), to.lane, to.vector, to.unit_stride);
    for (const int8_t weight : row) base_[to.slot] -= zero_code_ * weight;
  });
}

// From one output position to the next, in the image.
int64_t QuantizedConv::step(int axis) const { return std::min(geometry_.strides[axis], geometry_.kernel[axis]); }

int64_t QuantizedConv::image_size(const Job& job, int axis) const {
  return (job.convolved[axis] - 1) * step(axis) + geometry_.kernel[axis];
}

// Which row or column of X is number `at` of the image; it may be beside X.
int64_t QuantizedConv::source(int64_t at, int axis) const {
  return at / step(axis) * geometry_.strides[axis] + at % step(axis) - geometry_.pads[axis];
}

// Bytes after the image that kernels may read, and then do not use: a tile of pixels, and a unit.
size_t QuantizedConv::beyond() const {
  return static_cast<size_t>(kTilePixels * step(1)) * pixel_bytes_ + static_cast<size_t>(kernels_.kernel.unit_bytes) +
         8;
}

size_t QuantizedConv::packed_bytes(const Job& job) const {
  const auto pixels = static_cast<size_t>(image_size(job, 0) * image_size(job, 1));
  return pixels * pixel_bytes_ + beyond();
}

void QuantizedConv::pack(const Job& job) const {
  const int64_t height = image_size(job, 0), width = image_size(job, 1);
  const int64_t rows = std::clamp(kTaskFloats / width / geometry_.channels, int64_t{1}, height);
  const int64_t bands = (height + rows - 1) / rows;
  for_each(job.pool, static_cast<size_t>(bands * job.samples), [&](size_t i) {
    const int64_t sample = static_cast<int64_t>(i) / bands, first = static_cast<int64_t>(i) % bands * rows;
    const int64_t last = std::min(first + rows, height);
    for (int64_t at = first; at < last; ++at) quantize_row(job, sample, at);
    if (last == height) std::memset(job.packed_group(sample, 0, 1) + job.group_bytes - beyond(), 0, beyond());
  });
}

// In one piece where the columns are evenly spaced in X, else in one for each output position.
void QuantizedConv::quantize_row(const Job& job, int64_t sample, int64_t at) const {
  const int64_t width = image_size(job, 1), kernel = geometry_.kernel[1], stride = geometry_.strides[1];
  const int64_t y = source(at, 0), spacing = kernel == 1 ? stride : 1;
  const int64_t pixels = kernel == 1 || stride <= kernel ? width : kernel;
  uint8_t* codes = job.packed_group(sample, 0, 1) + static_cast<size_t>(at * width) * pixel_bytes_;
  if (y < 0 || y >= job.run.image[2]) {
    std::memset(codes, zero_code_, static_cast<size_t>(width) * pixel_bytes_);
    return;
  }
  const float* row = job.x(sample) + static_cast<size_t>(y * job.run.image[3]);
  for (int64_t x = 0; x < width; x += pixels, codes += static_cast<size_t>(pixels) * pixel_bytes_)
    quantize_piece(job, {row, source(x, 1), spacing, pixels, codes});
}

void QuantizedConv::quantize_piece(const Job& job, const Piece& p) const {
  const auto reaching = [&](int64_t x) { return std::clamp((x + p.spacing - 1) / p.spacing, int64_t{0}, p.pixels); };
  const int64_t first = reaching(std::max(-p.x, int64_t{0})), last = reaching(job.run.image[3] - p.x);
  const auto before = static_cast<size_t>(first) * pixel_bytes_, end = static_cast<size_t>(last) * pixel_bytes_;
  std::memset(p.codes, zero_code_, before);
  std::memset(p.codes + end, zero_code_, static_cast<size_t>(p.pixels) * pixel_bytes_ - end);
  if (first >= last) return;
  const float* x = p.row + p.x + first * p.spacing;
  kernels_.quantize({x, job.plane, static_cast<size_t>(geometry_.channels), static_cast<size_t>(p.spacing),
                     static_cast<size_t>(last - first), x_scale_, static_cast<float>(-x_zero_point_),
                     p.codes + before});
}

void QuantizedConv::describe(const Job& job, const Block& block, ConvTask& task) const {
  task.rows = {image_size(job, 0), job.convolved[0], geometry_.kernel[0], step(0), 0, 1};
  task.columns = {image_size(job, 1), job.convolved[1], 1, step(1), 0, 1};
  task.row_bytes = static_cast<size_t>(image_size(job, 1)) * pixel_bytes_;
  task.channels = geometry_.channels * geometry_.kernel[1];
  task.base = base_.get() + block.slot;
  task.residual = &kNoResidual;
  task.residual_is_full = false;
}

}  // namespace siman
