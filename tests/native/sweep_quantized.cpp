// siman.QuantizedConv2d for the sweep.
#include <algorithm>
#include <cmath>

#include "sweep.h"

namespace sweep {
namespace {

struct QuantizedCase : Case {
  std::vector<int8_t> weights;
  float x_scale = 1;
  int32_t x_zero_point = 0;

  siman_status create(const char* variant, siman_conv** conv) const override {
    return siman_create_quantized(&geometry, weights.data(), scale.data(), bias.data(), slope.data(), x_scale,
                                  x_zero_point, &pool, variant, conv);
  }
  std::vector<int> activations(const float* sample, size_t count) const override {
    const auto lowest = static_cast<float>(-x_zero_point), highest = lowest + 255;
    std::vector<int> steps(count);
    for (size_t i = 0; i < count; ++i) {
      const float t = std::nearbyint(sample[i] / x_scale), d = t >= lowest ? t : lowest;
      steps[i] = static_cast<int>(d <= highest ? d : highest);
    }
    return steps;
  }
  std::vector<int> integer_weights() const override {
    const auto channels = static_cast<size_t>(geometry.channels);
    const auto taps = static_cast<size_t>(geometry.kernel[0] * geometry.kernel[1]);
    std::vector<int> all;
    for (size_t filter = 0; filter < weights.size(); filter += channels * taps)
      for (size_t tap = 0; tap < taps; ++tap)
        for (size_t c = 0; c < channels; ++c) all.push_back(weights[filter + c * taps + tap]);
    return all;
  }
};

// Half steps: those between two integers are rounded to the even one.
void put_on_half_steps(Random& random, QuantizedCase& c) {
  c.x_scale = std::ldexp(1.0f, static_cast<int>(draw(random, -20, 20)));
  for (float& x : c.x) x = c.x_scale * static_cast<float>(draw(random, -600, 600)) / 2;
}

void draw_steps(Random& random, QuantizedCase& c) {
  static const int32_t zero_points[] = {0, 255, 128, 1, 114};
  static const float scales[] = {0.0186f, 1.0f, 0.25f, 3e38f, 1e-45f, 1e-38f, 40.0f};
  c.x_zero_point = zero_points[static_cast<size_t>(draw(random, 0, 4))];
  c.x_scale = scales[static_cast<size_t>(draw(random, 0, 3) ? 0 : draw(random, 1, 6))];
  if (draw(random, 0, 3) == 0) put_on_half_steps(random, c);
}

std::unique_ptr<QuantizedCase> make(const siman_geometry& geometry) {
  auto c = std::make_unique<QuantizedCase>();
  c->geometry = geometry;
  const siman_geometry& g = geometry;
  c->weights.resize(static_cast<size_t>(g.filters * g.channels * g.kernel[0] * g.kernel[1]));
  c->scale = c->bias = c->slope = Floats(static_cast<size_t>(g.filters), 1.0f);
  return c;
}

// Often the pool behind a network's first convolution; else whatever has a window in rows x columns.
void draw_pool(Random& random, Case& c) {
  const siman_geometry& g = c.geometry;
  for (int i = 0; i < 2; ++i) {
    const int64_t room = c.image[2 + i] + g.pads[i] + g.pads[i + 2] - g.kernel[i], size = room / g.strides[i] + 1;
    const bool usual = draw(random, 0, 2) == 0 && size > 1;
    c.pool.kernel[i] = usual ? 3 : draw(random, 1, std::min<int64_t>(size, draw(random, 0, 2) ? 4 : 40));
    c.pool.strides[i] = usual ? 2 : draw(random, 1, 5);
    c.pool.pads[i] = usual ? 1 : draw(random, 0, c.pool.kernel[i] - 1);
    c.pool.pads[i + 2] = usual ? 1 : draw(random, 0, c.pool.kernel[i] - 1);
  }
}

CasePtr largest_sums(int8_t weight, int32_t x_zero_point, float x) {
  auto c = make({33, {1, 1}, 518, {1, 1}, {0, 0, 0, 1}, {1, 1}, 1, 0});
  const int64_t image[] = {1, 518, 1, 2};
  std::copy_n(image, 4, c->image);
  std::fill(c->weights.begin(), c->weights.end(), weight);
  c->x.assign(518 * 2, x);
  c->x_zero_point = x_zero_point;
  return c;
}

// The image is never as large as its padding says.
CasePtr far_beyond(int64_t kernel) {
  constexpr int64_t kPad = 1 << 30;
  auto c = make({3, {kernel, kernel}, 2, {(1 << 25) - 1, (1 << 25) + 1}, {kPad, kPad, kPad, kPad}, {1, 1}, 1, 0});
  const int64_t image[] = {1, 2, 5, 6};
  std::copy_n(image, 4, c->image);
  for (size_t i = 0; i < c->weights.size(); ++i) c->weights[i] = static_cast<int8_t>(i);
  c->x.assign(2 * 5 * 6, 3.0f);
  c->x_zero_point = 7;
  return c;
}

}  // namespace

CasePtr draw_quantized(Random& random) {
  static const int64_t filters[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 97};
  siman_geometry g{};
  g.filters = filters[static_cast<size_t>(draw(random, 0, 13))];
  g.group = g.dilations[0] = g.dilations[1] = 1;
  for (int i = 0; i < 2; ++i) {
    g.kernel[i] = draw(random, 1, draw(random, 0, 2) ? 3 : 7);
    g.strides[i] = draw(random, 1, 3);
    g.pads[i] = draw(random, 0, 3);
    g.pads[i + 2] = draw(random, 0, 3);
  }
  const int64_t most = 518 / (g.kernel[0] * g.kernel[1]);
  g.channels = draw(random, 1, std::min<int64_t>(most, draw(random, 0, 2) ? 9 : 70));
  auto c = make(g);
  for (auto& weight : c->weights) weight = static_cast<int8_t>(draw(random, -127, 127));
  draw_images(random, *c, static_cast<int>(draw(random, 0, 4)));
  draw_epilogue(random, *c);
  draw_steps(random, *c);
  if (draw(random, 0, 1)) draw_pool(random, *c);
  return c;
}

std::vector<CasePtr> special_quantized() {
  std::vector<CasePtr> all;
  for (const int8_t weight : {-127, 127})
    for (const int32_t zero_point : {0, 255})
      for (const float x : {-1e9f, 1e9f}) all.push_back(largest_sums(weight, zero_point, x));
  for (const int64_t kernel : {1, 2, 3}) all.push_back(far_beyond(kernel));
  return all;
}

}  // namespace sweep
