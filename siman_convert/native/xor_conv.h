// The binary convolution that counts differing bits.
#pragma once

#include "binary_conv.h"

namespace siman {

class XorConv final : public BinaryConv {
 public:
  XorConv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias, const float* slope,
          const Variant& variant);

 private:
  void count_ones(const uint8_t* weights, int64_t filter, size_t slot);

  size_t partners(const Job& job) const;  // see PairTask
  size_t row_bytes(const Job& job) const;
  size_t image_bytes(const Job& job) const;

  size_t packed_bytes(const Job& job) const override;
  void pack_rows(const Job& job, const Rows& rows) const override;
  void describe(const Job& job, const Block& block, ConvTask& task) const override;

  std::unique_ptr<int32_t[]> ones_;  // see ConvTask::ones; [kH+1][kW+1][slots]
};

}  // namespace siman
