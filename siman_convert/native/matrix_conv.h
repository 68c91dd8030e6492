// The binary convolution as a product of matrices of bytes: see kernels/matrix.inl.
#pragma once

#include "binary_conv.h"

namespace siman {

class MatrixConv final : public BinaryConv {
 public:
  // Whether the variant has such a kernel, and the geometry makes it worth while: few channels or filters leave the
  // matrices empty, and far taps make the image with its padding large, and much of a row none of the output.
  static bool suits(const Geometry& geometry, const Variant& variant);

  MatrixConv(const Geometry& geometry, const uint8_t* weights, const float* scale, const float* bias,
             const float* slope, const Variant& variant);

 private:
  // The image of one group that is packed: `phases` times `rows` rows of `columns` pixels.
  struct Image {
    int64_t phases, rows, columns;

    size_t pixels() const { return static_cast<size_t>(phases * rows * columns); }
    // of row `row` of X with its padding
    size_t first(int64_t row) const { return static_cast<size_t>((row % phases * rows + row / phases) * columns); }
  };

  int64_t needed(const Job& job, int axis) const;
  Image image(const Job& job) const;
  size_t unit_bytes(const Image& image) const;
  size_t image_bytes(const Job& job) const;
  void clear_padding(const Job& job, const Rows& rows, uint8_t* packed) const;
  void clear_columns(const Image& image, int64_t row, int64_t begin, int64_t end, uint8_t* packed) const;

  size_t packed_bytes(const Job& job) const override;
  void pack_rows(const Job& job, const Rows& rows) const override;
  void describe(const Job& job, const Block& block, ConvTask& task) const override;
};

}  // namespace siman
