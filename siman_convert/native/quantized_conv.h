// siman.QuantizedConv2d: X in steps of x_scale, clipped to 8 bits, times weights of 8 bits.
#pragma once

#include "conv.h"

namespace siman {

// `weights`: (filters, channels, kernel_h, kernel_w).
Status check_quantized_geometry(const Geometry& geometry);
Status check_quantized_weights(const Geometry& geometry, const int8_t* weights);
Status check_steps(float x_scale, int32_t x_zero_point);
Status check_pool(const siman_pool& pool);

class QuantizedConv final : public Conv {
 public:
  // All is checked before.
  QuantizedConv(const Geometry& geometry, const int8_t* weights, const float* scale, const float* bias,
                const float* slope, float x_scale, int32_t x_zero_point, const siman_pool& pool,
                const Variant& variant);

 private:
  // A piece of a row of the image: `pixels` that are `spacing` apart in X, from column `x` of a row of X on.
  struct Piece {
    const float* row;
    int64_t x, spacing, pixels;
    uint8_t* codes;
  };

  int64_t step(int axis) const;
  int64_t image_size(const Job& job, int axis) const;
  int64_t source(int64_t at, int axis) const;
  size_t beyond() const;
  void quantize_row(const Job& job, int64_t sample, int64_t at) const;
  void quantize_piece(const Job& job, const Piece& piece) const;

  size_t packed_bytes(const Job& job) const override;
  void pack(const Job& job) const override;
  void describe(const Job& job, const Block& block, ConvTask& task) const override;

  const QuantizedKernels& kernels_;
  float x_scale_;
  int32_t x_zero_point_;
  int32_t zero_code_;                // what a pixel beside X holds
  std::unique_ptr<int32_t[]> base_;  // see ConvTask::base; [slots]
};

}  // namespace siman
