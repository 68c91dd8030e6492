// siman.BinaryConv2d for the sweep.
#include <algorithm>

#include "sweep.h"

namespace sweep {
namespace {

float mean(const float* x, size_t count) {
  double total = 0;
  for (size_t start = 0; start < count; start += 4096) {
    double sums[32] = {};
    for (size_t i = start; i < std::min(start + 4096, count); ++i) sums[i % 32] += x[i];
    for (int width = 16; width > 0; width /= 2)
      for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    total += sums[0];
  }
  return static_cast<float>(total / static_cast<double>(count));
}

struct BinaryCase : Case {
  std::vector<uint8_t> weights;

  siman_status create(const char* variant, siman_conv** conv) const override {
    return siman_create(&geometry, weights.data(), weights.size(), scale.data(), bias.data(), slope.data(), variant,
                        conv);
  }
  std::vector<int> activations(const float* sample, size_t count) const override {
    const float m = geometry.center ? mean(sample, count) : 0.0f;
    std::vector<int> signs(count);
    for (size_t i = 0; i < count; ++i) signs[i] = sample[i] >= m ? 1 : -1;
    return signs;
  }
  std::vector<int> integer_weights() const override {
    const auto channels = static_cast<size_t>(geometry.channels), tap_bytes = (channels + 7) / 8;
    std::vector<int> all;
    for (size_t tap = 0; tap < weights.size(); tap += tap_bytes)
      for (size_t c = 0; c < channels; ++c) all.push_back(weights[tap + c / 8] >> (c % 8) & 1 ? 1 : -1);
    return all;
  }
};

std::vector<uint8_t> draw_weights(Random& random, const siman_geometry& g) {
  const int64_t bytes = (g.channels + 7) / 8;
  std::vector<uint8_t> weights(static_cast<size_t>(g.filters * g.kernel[0] * g.kernel[1] * bytes));
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool is_last = (i + 1) % static_cast<size_t>(bytes) == 0;
    const int used = is_last ? static_cast<int>(g.channels - 8 * (bytes - 1)) : 8;
    weights[i] = static_cast<uint8_t>(draw(random, 0, (1 << used) - 1));
  }
  return weights;
}

// 70,000 channels that all differ, or nearly all agree.
CasePtr many_channels(uint8_t weights) {
  auto c = std::make_unique<BinaryCase>();
  c->geometry = {3, {1, 1}, 70000, {1, 1}, {0, 0, 0, 1}, {1, 1}, 1, 0};
  const int64_t image[] = {1, 70000, 1, 2};
  std::copy_n(image, 4, c->image);
  c->weights.assign(3 * 70000 / 8, weights);
  c->x.assign(140000, 1.0f);
  c->scale = c->bias = c->slope = Floats(3, 1.0f);
  return c;
}

// Rows or columns of the output so far beside the image that a pointer there, which nothing reads, would wrap around.
CasePtr far_away(int axis) {
  constexpr int64_t kFar = 2147483647;
  auto c = std::make_unique<BinaryCase>();
  c->geometry = {3, {1, 1}, 4096, {1, 1}, {0, 0, 0, 0}, {1, 1}, 1, 0};
  c->geometry.strides[axis] = c->geometry.pads[axis] = kFar;
  const int64_t image[] = {1, 4096, axis ? 256 : 1, axis ? 1 : 256};
  std::copy_n(image, 4, c->image);
  c->weights.assign(3 * 4096 / 8, 0x5a);
  c->x.assign(4096 * 256, 1.0f);
  c->scale = c->bias = c->slope = Floats(3, 1.0f);
  return c;
}

}  // namespace

CasePtr draw_binary(Random& random) {
  static const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 97, 128, 192, 193};
  const auto size = [&] { return sizes[static_cast<size_t>(draw(random, 0, 16))]; };
  auto c = std::make_unique<BinaryCase>();
  siman_geometry& g = c->geometry;
  g.group = draw(random, 0, 3) ? 1 : draw(random, 2, 4);
  g.channels = g.group > 1 ? std::min<int64_t>(size(), 33) : size();
  g.filters = g.group * (g.group > 1 ? std::min<int64_t>(size(), 33) : size());
  g.center = draw(random, 0, 1);
  for (int i = 0; i < 2; ++i) {
    g.kernel[i] = draw(random, 1, 4);
    g.strides[i] = draw(random, 0, 7) ? draw(random, 1, 3) : draw(random, 4, 20);
    g.dilations[i] = draw(random, 0, 2) ? 1 : draw(random, 2, 3);
    g.pads[i] = draw(random, 0, 3);
    g.pads[i + 2] = draw(random, 0, 3);
  }
  c->weights = draw_weights(random, g);
  draw_images(random, *c, static_cast<int>(draw(random, 0, 4)));
  draw_epilogue(random, *c);
  return c;
}

std::vector<CasePtr> special_binary() {
  std::vector<CasePtr> all;
  for (const uint8_t weights : {0, 1, 255}) all.push_back(many_channels(weights));
  for (const int axis : {0, 1}) all.push_back(far_away(axis));
  return all;
}

}  // namespace sweep
