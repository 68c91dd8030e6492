// Order statistics of a whole layer, which no cache holds: a sample says between which two values the one looked for
// very likely lies, and one pass picks out those between. Where it lies elsewhere, all are picked out: nothing but time
// depends on the sample.
#include "clip.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <vector>

namespace siman {
namespace {

constexpr size_t kSample = 1 << 14;
constexpr double kDeviations = 4;       // of the sample's own percentile, on either side
constexpr uint32_t kMost = 0x7F800000;  // infinity; a NaN is no member, and weights that hold one are lost anyway

uint32_t magnitude_bits(float value) { return std::bit_cast<uint32_t>(value) & 0x7FFFFFFF; }

// The magnitudes of `total` weights in the order of their size; a magnitude is as large as the bits it consists of.
class Order {
 public:
  // `members` has room for all.
  Order(const float* weights, size_t total, float* members, const TrainingKernels& kernels)
      : weights_(weights), total_(total), members_(members), kernels_(kernels) {
    const size_t step = std::max<size_t>(1, total / kSample);
    for (size_t i = 0; i < total; i += step) sample_.push_back(std::bit_cast<float>(magnitude_bits(weights[i])));
  }

  // numpy's linear interpolation between the two that lie around it, in float32.
  float percentile(double percent) {
    const double position = percent / 100 * static_cast<double>(total_ - 1);
    const auto rank = static_cast<size_t>(position);
    pick_around(rank);
    const float below = at(rank), above = at(std::min(rank + 1, total_ - 1));
    return below + static_cast<float>(position - static_cast<double>(rank)) * (above - below);
  }

 private:
  void pick_around(size_t rank) {
    const double share = static_cast<double>(rank) / static_cast<double>(total_);
    const auto size = static_cast<double>(sample_.size());
    const double middle = share * size, margin = 1 + kDeviations * std::sqrt(size * share * (1 - share));
    pick(middle > margin ? of_sample(middle - margin) : 0, middle + margin < size ? of_sample(middle + margin) : kMost);
    if (rank < before_ || std::min(rank + 1, total_ - 1) >= before_ + found_) pick(0, kMost);
  }

  uint32_t of_sample(double rank) const {
    return kernels_.select(sample_.data(), sample_.size(), static_cast<size_t>(rank), 0, kMost);
  }

  void pick(uint32_t low, uint32_t high) {
    size_t before = 0, found = 0;
    for (size_t i = 0; i < total_; ++i) {
      const uint32_t bits = magnitude_bits(weights_[i]);
      members_[found] = std::bit_cast<float>(bits);  // kept if it belongs there
      before += bits < low;
      found += bits - low <= high - low;
    }
    low_ = low, high_ = high, before_ = before, found_ = found;
  }

  float at(size_t rank) const {
    return std::bit_cast<float>(kernels_.select(members_, found_, rank - before_, low_, high_));
  }

  const float* weights_;
  size_t total_;
  float* members_;  // that are in [low_, high_]; before_ are smaller
  const TrainingKernels& kernels_;
  std::vector<float> sample_;
  uint32_t low_ = 0, high_ = kMost;
  size_t before_ = 0, found_ = 0;
};

}  // namespace

void clip(float* weights, size_t filters, size_t count, double percent, const TrainingKernels& kernels) {
  const std::unique_ptr<float[]> members(
      new float[filters * count]);  // before anything is changed: there may be no room
  for (size_t f = 0; f < filters; ++f) kernels.centre(weights + f * count, count);
  Order order(weights, filters * count, members.get(), kernels);
  const float low = order.percentile(percent), high = order.percentile(100 - percent);
  for (size_t f = 0; f < filters; ++f) kernels.clamp(weights + f * count, count, low, high);
}

}  // namespace siman
