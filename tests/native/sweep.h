// What siman_sweep shares: cases of either operator, and how their numbers are drawn.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "siman.h"

namespace sweep {

using Floats = std::vector<float>;
using Random = std::mt19937;

struct Case {
  siman_geometry geometry{};
  siman_pool pool{{1, 1}, {1, 1}, {0, 0, 0, 0}};  // none
  int64_t image[4] = {}, output[4] = {};
  Floats x, scale, bias, slope, residual{0.0f};

  virtual ~Case() = default;
  virtual siman_status create(const char* variant, siman_conv** conv) const = 0;
  // What is multiplied, as integers: of one sample of X; of the weights, [filter][row][column][channel].
  virtual std::vector<int> activations(const float* x, size_t count) const = 0;
  virtual std::vector<int> integer_weights() const = 0;

  bool full_residual() const { return residual.size() != 1; }
};
using CasePtr = std::unique_ptr<Case>;

CasePtr draw_binary(Random& random);
CasePtr draw_quantized(Random& random);
std::vector<CasePtr> special_binary();     // sums that only 32 bits hold
std::vector<CasePtr> special_quantized();  // the largest sums; images of which most is padding

int64_t draw(Random& random, int64_t low, int64_t high);
Floats draw_floats(Random& random, size_t count, int kind);  // 0 <= kind < 5
// The size of the images, of which everything in `geometry` is known, and X: `kind` of each sample.
void draw_images(Random& random, Case& c, int kind);
void draw_epilogue(Random& random, Case& c);

void check_training(Random& random, size_t cases);
void require(bool holds, const char* what);
void require(siman_status status);

}  // namespace sweep
