// What is refused, before anything is allocated: the limits keep all later arithmetic inside 64 bits.
#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "binary_conv.h"
#include "quantized_conv.h"

namespace siman {
namespace {

bool all_within(std::initializer_list<int64_t> values, int64_t least) {
  return std::all_of(values.begin(), values.end(), [=](int64_t v) { return v >= least && v <= kMaxElements; });
}

// Whether the product of values from 0 to kMaxElements is at most `limit`.
bool product_within(std::initializer_list<int64_t> values, int64_t limit) {
  if (std::find(values.begin(), values.end(), 0) != values.end()) return true;
  int64_t product = 1;
  for (int64_t v : values) {
    if (v > limit / product) return false;
    product *= v;
  }
  return true;
}

// Of X or Y; also of one plane, where the batch is 0.
bool elements_within(const int64_t* shape) {
  return product_within({shape[0], shape[1], shape[2], shape[3]}, kMaxElements) &&
         product_within({shape[2], shape[3]}, kMaxElements);
}

// Output positions of one axis; 0 where the dilated kernel does not fit.
int64_t positions(int64_t in, int64_t before, int64_t after, int64_t kernel, int64_t dilation, int64_t stride) {
  const int64_t room = before + in + after - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

}  // namespace

Status check_geometry(const Geometry& g) {
  if (!all_within({g.filters}, 1)) return SIMAN_BAD_FILTERS;
  if (!all_within({g.kernel[0], g.kernel[1]}, 1)) return SIMAN_BAD_KERNEL;
  if (!all_within({g.channels}, 1)) return SIMAN_BAD_CHANNELS;
  if (!all_within({g.strides[0], g.strides[1]}, 1)) return SIMAN_BAD_STRIDES;
  if (!all_within({g.pads[0], g.pads[1], g.pads[2], g.pads[3]}, 0)) return SIMAN_BAD_PADS;
  if (!all_within({g.dilations[0], g.dilations[1]}, 1)) return SIMAN_BAD_DILATIONS;
  if (!all_within({g.group}, 1) || g.filters % g.group != 0) return SIMAN_BAD_GROUP;
  if (g.center != 0 && g.center != 1) return SIMAN_BAD_CENTER;
  if (!product_within({g.channels, g.kernel[0], g.kernel[1]}, kMaxTaps)) return SIMAN_TOO_MANY_TAPS;
  if (!product_within({g.filters, g.kernel[0], g.kernel[1], (g.channels + 7) / 8}, kMaxElements))
    return SIMAN_TOO_MANY_ELEMENTS;
  return SIMAN_OK;
}

Status check_weights(const Geometry& g, const uint8_t* weights, size_t size) {
  const auto bytes = static_cast<size_t>((g.channels + 7) / 8);
  if (size != static_cast<size_t>(g.filters * g.kernel[0] * g.kernel[1]) * bytes) return SIMAN_BAD_WEIGHT_BYTES;
  if (g.channels % 8 == 0) return SIMAN_OK;
  for (size_t last = bytes - 1; last < size; last += bytes)
    if (weights[last] >> (g.channels % 8)) return SIMAN_PADDING_BITS_SET;
  return SIMAN_OK;
}

Status check_quantized_geometry(const Geometry& g) {
  if (const Status status = check_geometry(g); status != SIMAN_OK) return status;
  if (g.group != 1 || g.dilations[0] != 1 || g.dilations[1] != 1 || g.center != 0) return SIMAN_NOT_PLAIN;
  if (!product_within({g.channels, g.kernel[0], g.kernel[1]}, kMaxQuantizedTaps)) return SIMAN_TOO_MANY_QUANTIZED_TAPS;
  if (!product_within({g.filters, g.channels, g.kernel[0], g.kernel[1]}, kMaxElements)) return SIMAN_TOO_MANY_ELEMENTS;
  return SIMAN_OK;
}

Status check_quantized_weights(const Geometry& g, const int8_t* weights) {
  const int8_t* end = weights + g.filters * g.channels * g.kernel[0] * g.kernel[1];
  return std::find(weights, end, INT8_MIN) == end ? SIMAN_OK : SIMAN_BAD_WEIGHT;
}

Status check_steps(float x_scale, int32_t x_zero_point) {
  if (!std::isfinite(x_scale) || x_scale <= 0) return SIMAN_BAD_X_SCALE;
  return x_zero_point >= 0 && x_zero_point <= 255 ? SIMAN_OK : SIMAN_BAD_X_ZERO_POINT;
}

// Pads below the kernel's sides: each window then has something of the image in it.
Status check_pool(const siman_pool& p) {
  if (!all_within({p.kernel[0], p.kernel[1], p.strides[0], p.strides[1]}, 1)) return SIMAN_BAD_POOL;
  for (int i = 0; i < 4; ++i)
    if (p.pads[i] < 0 || p.pads[i] >= p.kernel[i % 2]) return SIMAN_BAD_POOL;
  return SIMAN_OK;
}

Status Conv::output_shape(const int64_t image[4], int64_t output[4]) const {
  int64_t convolved[2];
  return sizes(image, convolved, output);
}

Status Conv::sizes(const int64_t image[4], int64_t convolved[2], int64_t output[4]) const {
  const Geometry& g = geometry_;
  if (!all_within({image[0]}, 0) || !all_within({image[2], image[3]}, 1) || image[1] != g.channels * g.group)
    return SIMAN_BAD_IMAGE;
  output[0] = image[0];
  output[1] = g.filters;
  for (int i = 0; i < 2; ++i)
    convolved[i] = positions(image[2 + i], g.pads[i], g.pads[2 + i], g.kernel[i], g.dilations[i], g.strides[i]);
  if (convolved[0] < 1 || convolved[1] < 1) return SIMAN_KERNEL_LARGER_THAN_IMAGE;
  const int64_t values[] = {output[0], output[1], convolved[0], convolved[1]};
  if (!elements_within(image) || !elements_within(values)) return SIMAN_TOO_MANY_ELEMENTS;
  for (int i = 0; i < 2; ++i)
    output[2 + i] = positions(convolved[i], pool_.pads[i], pool_.pads[2 + i], pool_.kernel[i], 1, pool_.strides[i]);
  if (output[2] < 1 || output[3] < 1) return SIMAN_POOL_LARGER_THAN_IMAGE;
  return elements_within(output) ? SIMAN_OK : SIMAN_TOO_MANY_ELEMENTS;
}

}  // namespace siman
