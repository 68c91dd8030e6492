// siman.BinaryConv2d: X against the mean of its sample, packed into bits, times weights of one bit. xor_conv.h and
// matrix_conv.h say what becomes of the bits.
#pragma once

#include "conv.h"

namespace siman {

Status check_geometry(const Geometry& geometry);
Status check_weights(const Geometry& geometry, const uint8_t* weights, size_t size);

// The fastest kind of this variant for the geometry; this and the weights are checked before.
std::unique_ptr<Conv> make_binary_conv(const Geometry& geometry, const uint8_t* weights, const float* scale,
                                       const float* bias, const float* slope, const Variant& variant);

class BinaryConv : public Conv {
 protected:
  BinaryConv(const Geometry& geometry, const float* scale, const float* bias, const float* slope,
             const Variant& variant, const Kernel& kernel, int64_t task_macs);

  // Rows [begin, end) of one group of one sample: to be packed, where X is at least `threshold`.
  struct Rows {
    int64_t sample, group;
    float threshold;
    size_t begin, end;
  };
  virtual void pack_rows(const Job& job, const Rows& rows) const = 0;

  const uint8_t* tap(const uint8_t* weights, int64_t filter, int64_t at) const;
  void pack_bits(const Job& job, const Rows& rows, uint8_t* packed, size_t pixel_bytes) const;
  void pack(const Job& job) const final;

  const BinaryKernels& kernels_;
  size_t tap_bytes_;  // of one tap of one filter, as handed over
  size_t bit_bytes_;  // of a pixel's bits, in whole 64-channel words

 private:
  std::unique_ptr<double[]> sum_samples(const Job& job) const;  // [sample][block of 4096 elements]
};

}  // namespace siman
