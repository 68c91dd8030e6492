// Every variant this processor can run against plain loops over +-1 floats, sequentially and on three threads in a
// random order; then two threads at once that run one convolution, and two that each make and run their own. Prints its
// seed; `siman_sweep SEED COUNT` repeats a run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "siman.h"

namespace {

using Floats = std::vector<float>;
using Random = std::mt19937;

int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

struct Case {
  siman_geometry geometry;
  int64_t image[4], output[4];
  std::vector<uint8_t> weights;
  Floats x, scale, bias, slope, residual;

  bool full_residual() const { return residual.size() != 1; }
};

// Kind 0 is one number everywhere. Kind 2 is numbers of very different size and the same negated, backwards: their mean
// is rounding errors, which tell the order of the sum.
Floats draw_floats(Random& random, size_t count, int kind) {
  const float inf = std::numeric_limits<float>::infinity(), tiny = std::numeric_limits<float>::denorm_min();
  const Floats odd{0.0f, -0.0f, tiny, -tiny, 1.0f, -1.0f, inf, -inf, std::nanf("")};
  std::normal_distribution<float> normal;
  Floats values(count, draw(random, 0, 3) ? normal(random) : odd[static_cast<size_t>(draw(random, 0, 8))]);
  for (size_t i = 0; i < count; ++i) {
    float& value = values[i];
    if (kind == 1 || kind == 2) value = normal(random);
    if (kind == 2) value = std::ldexp(value, static_cast<int>(draw(random, -40, 40)));
    if (kind == 2 && i >= (count + 1) / 2) value = -values[count - 1 - i];
    if (kind == 3) value = odd[static_cast<size_t>(draw(random, 0, 5))];
    if (kind == 4) value = draw(random, 0, 30) ? normal(random) : odd[static_cast<size_t>(draw(random, 0, 8))];
  }
  return values;
}

int64_t fitting_size(Random& random, const siman_geometry& g, int axis) {
  const int64_t span = g.dilations[axis] * (g.kernel[axis] - 1) + 1;
  return std::max<int64_t>(1, span - g.pads[axis] - g.pads[axis + 2]) + draw(random, 0, draw(random, 0, 3) ? 9 : 70);
}

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

Case draw_case(Random& random) {
  static const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 97, 128, 192, 193};
  const auto size = [&] { return sizes[static_cast<size_t>(draw(random, 0, 16))]; };
  Case c{};
  siman_geometry& g = c.geometry;
  g.group = draw(random, 0, 3) ? 1 : draw(random, 2, 4);
  g.channels = g.group > 1 ? std::min<int64_t>(size(), 33) : size();
  g.filters = g.group * (g.group > 1 ? std::min<int64_t>(size(), 33) : size());
  g.center = draw(random, 0, 1);
  for (int i = 0; i < 2; ++i) {
    g.kernel[i] = draw(random, 1, 4);
    g.strides[i] = draw(random, 1, 3);
    g.dilations[i] = draw(random, 0, 2) ? 1 : draw(random, 2, 3);
    g.pads[i] = draw(random, 0, 3);
    g.pads[i + 2] = draw(random, 0, 3);
  }
  c.image[0] = draw(random, 0, 5);
  c.image[1] = g.channels * g.group;
  for (int i = 0; i < 2; ++i) c.image[2 + i] = fitting_size(random, g, i);
  c.weights = draw_weights(random, g);
  const auto filters = static_cast<size_t>(g.filters);
  c.scale = draw_floats(random, filters, 1);
  c.bias = draw_floats(random, filters, static_cast<int>(draw(random, 0, 4)));
  c.slope =
      draw(random, 0, 1) ? Floats(filters, static_cast<float>(draw(random, 0, 1))) : draw_floats(random, filters, 1);
  const int kind = static_cast<int>(draw(random, 0, 4));
  for (int64_t n = 0; n < c.image[0]; ++n) {
    const Floats sample = draw_floats(random, static_cast<size_t>(c.image[1] * c.image[2] * c.image[3]), kind);
    c.x.insert(c.x.end(), sample.begin(), sample.end());
  }
  return c;
}

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

int sign_of_weight(const Case& c, int64_t o, int64_t i, int64_t j, int64_t channel) {
  const siman_geometry& g = c.geometry;
  const int64_t tap = (o * g.kernel[0] + i) * g.kernel[1] + j;
  const auto byte = static_cast<size_t>(tap * ((g.channels + 7) / 8) + channel / 8);
  return c.weights[byte] >> (channel % 8) & 1 ? 1 : -1;
}

int naive_acc(const Case& c, const std::vector<int>& signs, int64_t o, int64_t y, int64_t x) {
  const siman_geometry& g = c.geometry;
  const int64_t height = c.image[2], width = c.image[3], first = o / (g.filters / g.group) * g.channels;
  int acc = 0;
  for (int64_t i = 0; i < g.kernel[0]; ++i) {
    for (int64_t j = 0; j < g.kernel[1]; ++j) {
      const int64_t in_y = y * g.strides[0] - g.pads[0] + i * g.dilations[0];
      const int64_t in_x = x * g.strides[1] - g.pads[1] + j * g.dilations[1];
      if (in_y < 0 || in_y >= height || in_x < 0 || in_x >= width) continue;
      for (int64_t k = 0; k < g.channels; ++k)
        acc += signs[static_cast<size_t>(((first + k) * height + in_y) * width + in_x)] * sign_of_weight(c, o, i, j, k);
    }
  }
  return acc;
}

Floats naive(const Case& c) {
  const int64_t* out = c.output;
  const auto sample = static_cast<size_t>(c.image[1] * c.image[2] * c.image[3]);
  Floats y;
  for (int64_t n = 0; n < out[0]; ++n) {
    const float* x = c.x.data() + static_cast<size_t>(n) * sample;
    const float m = c.geometry.center ? mean(x, sample) : 0.0f;
    std::vector<int> signs(sample);
    for (size_t i = 0; i < sample; ++i) signs[i] = x[i] >= m ? 1 : -1;
    for (int64_t o = 0; o < out[1]; ++o) {
      for (int64_t at = 0; at < out[2] * out[3]; ++at) {
        const auto acc = static_cast<float>(naive_acc(c, signs, o, at / out[3], at % out[3]));
        const auto f = static_cast<size_t>(o);
        const float v = c.scale[f] * acc + c.bias[f] + (c.full_residual() ? c.residual[y.size()] : c.residual[0]);
        y.push_back(v >= 0 ? v : c.slope[f] * v);
      }
    }
  }
  return y;
}

// Odd tasks on one thread, even ones on another, the last first on a third.
void on_threads(void*, siman_task task, void* context, size_t count) {
  std::thread odd([=] {
    for (size_t i = 1; i + 1 < count; i += 2) task(context, i);
  });
  std::thread even([=] {
    for (size_t i = 0; i + 1 < count; i += 2) task(context, i);
  });
  task(context, count - 1);
  odd.join();
  even.join();
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void require(siman_status status) { require(status == SIMAN_OK, siman_message(status)); }

bool same(const Floats& got, const Floats& expected) {
  for (size_t i = 0; i < got.size(); ++i)
    if (got[i] != expected[i] && !(std::isnan(got[i]) && std::isnan(expected[i]))) return false;
  return got.size() == expected.size();
}

siman_conv* create(const Case& c, const char* variant) {
  siman_conv* conv = nullptr;
  require(siman_create(&c.geometry, c.weights.data(), c.weights.size(), c.scale.data(), c.bias.data(), c.slope.data(),
                       variant, &conv));
  require(std::strcmp(siman_variant(conv), variant) == 0, "the variant that was asked for");
  return conv;
}

Floats run(const Case& c, const siman_conv* conv, siman_parallel_for parallel_for) {
  Floats y(static_cast<size_t>(c.output[0] * c.output[1] * c.output[2] * c.output[3]), -12345.0f);
  require(siman_run(conv, c.x.data(), c.image, c.residual.data(), c.full_residual(), y.data(), parallel_for, nullptr));
  return y;
}

void check_variant(const Case& c, const char* variant, const Floats& expected) {
  siman_conv* conv = create(c, variant);
  require(same(run(c, conv, nullptr), expected), variant);
  require(same(run(c, conv, on_threads), expected), (std::string(variant) + " on threads").c_str());
  std::thread other([&] { require(same(run(c, conv, on_threads), expected), "one of two runs at once"); });
  require(same(run(c, conv, nullptr), expected), "one of two runs at once");
  other.join();
  siman_destroy(conv);
}

struct Expectation {
  Case c;
  Floats y;
};

// Two convolutions that share nothing but the library: each thread makes, runs and destroys its own.
void check_two_at_once(const Expectation& a, const Expectation& b, const char* variant) {
  const auto work = [=](const Expectation& e) {
    siman_conv* conv = create(e.c, variant);
    for (int i = 0; i < 2; ++i) require(same(run(e.c, conv, on_threads), e.y), "one of two convolutions at once");
    siman_destroy(conv);
  };
  std::thread other([&] { work(a); });
  work(b);
  other.join();
}

void finish_case(Random& random, Case& c) {
  c.residual = {0.0f};
  siman_conv* conv = create(c, "scalar");
  require(siman_output_shape(conv, c.image, c.output));
  siman_destroy(conv);
  const auto count = static_cast<size_t>(c.output[0] * c.output[1] * c.output[2] * c.output[3]);
  if (draw(random, 0, 1)) c.residual = draw_floats(random, count, static_cast<int>(draw(random, 0, 4)));
}

// Sums that no 8 or 16 bits hold: 70,000 channels that all differ, and that nearly all agree.
Case many_channels(uint8_t weights) {
  Case c{};
  c.geometry = {3, {1, 1}, 70000, {1, 1}, {0, 0, 0, 1}, {1, 1}, 1, 0};
  const int64_t image[] = {1, 70000, 1, 2};
  std::copy_n(image, 4, c.image);
  c.weights.assign(3 * 70000 / 8, weights);
  c.x.assign(140000, 1.0f);
  c.scale = c.bias = c.slope = Floats(3, 1.0f);
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const auto seed = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 20u;
  const int cases = argc > 2 ? std::atoi(argv[2]) : 150;
  std::printf("seed %u, %d cases\n", seed, cases);
  Random random(seed);
  std::vector<Case> all;
  for (uint8_t weights : {0, 1, 255}) all.push_back(many_channels(weights));
  while (static_cast<int>(all.size()) < cases) all.push_back(draw_case(random));
  Expectation before{};
  for (Case& c : all) {
    finish_case(random, c);
    const Expectation now{c, naive(c)};
    for (size_t i = 0; siman_variant_name(i); ++i) {
      if (!siman_variant_supported(i)) continue;
      check_variant(c, siman_variant_name(i), now.y);
      if (!before.y.empty()) check_two_at_once(before, now, siman_variant_name(i));
    }
    before = now;
  }
  for (size_t i = 0; siman_variant_name(i); ++i)
    std::printf("%s: %s\n", siman_variant_name(i),
                siman_variant_supported(i) ? "same as plain loops" : "not supported here");
}
