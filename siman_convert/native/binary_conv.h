// siman.BinaryConv2d: X against the mean of its sample, packed into bits, times weights of one bit.
#pragma once

#include "conv.h"

namespace siman {

Status check_geometry(const Geometry& geometry);
Status check_weights(const Geometry& geometry, const uint8_t* weights, size_t size);

class BinaryConv final : public Conv {
 public:
  // Geometry and weights are checked before.
  BinaryConv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias,
             const float* slope, const Variant& variant);

 private:
  void count_ones(const uint8_t* weights, int64_t filter, size_t slot);
  std::unique_ptr<double[]> sum_samples(const Job& job) const;  // [sample][block of 4096 elements]
  const uint8_t* tap(const uint8_t* weights, int64_t filter, int64_t at) const;

  size_t packed_bytes(const Job& job) const override;
  void pack(const Job& job) const override;
  void describe(const Job& job, const Block& block, ConvTask& task) const override;

  const BinaryKernels& kernels_;
  size_t tap_bytes_;                 // of one tap of one filter, as handed over
  std::unique_ptr<int32_t[]> ones_;  // see ConvTask::ones; [kH+1][kW+1][slots]
};

}  // namespace siman
