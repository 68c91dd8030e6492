// Every variant this processor can run against plain loops (over integers, training in double), sequentially and on
// three threads in a random order; then two threads at once that run one convolution, and two that each make and run
// their own. Prints its seed; `siman_sweep SEED COUNT` repeats a run.
#include "sweep.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>

namespace sweep {

int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

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

void draw_images(Random& random, Case& c, int kind) {
  const siman_geometry& g = c.geometry;
  c.image[0] = draw(random, 0, 5);
  c.image[1] = g.channels * g.group;
  for (int i = 0; i < 2; ++i) {
    const int64_t span = g.dilations[i] * (g.kernel[i] - 1) + 1, beyond = draw(random, 0, 3) ? 9 : 70;
    c.image[2 + i] = std::max<int64_t>(1, span - g.pads[i] - g.pads[i + 2]) + draw(random, 0, beyond);
  }
  for (int64_t n = 0; n < c.image[0]; ++n) {
    const Floats sample = draw_floats(random, static_cast<size_t>(c.image[1] * c.image[2] * c.image[3]), kind);
    c.x.insert(c.x.end(), sample.begin(), sample.end());
  }
}

void draw_epilogue(Random& random, Case& c) {
  const auto filters = static_cast<size_t>(c.geometry.filters);
  c.scale = draw_floats(random, filters, 1);
  c.bias = draw_floats(random, filters, static_cast<int>(draw(random, 0, 4)));
  c.slope =
      draw(random, 0, 1) ? Floats(filters, static_cast<float>(draw(random, 0, 1))) : draw_floats(random, filters, 1);
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void require(siman_status status) { require(status == SIMAN_OK, siman_message(status)); }

namespace {

int naive_acc(const Case& c, const std::vector<int>& activations, const std::vector<int>& weights, int64_t o, int64_t y,
              int64_t x) {
  const siman_geometry& g = c.geometry;
  const int64_t height = c.image[2], width = c.image[3], first = o / (g.filters / g.group) * g.channels;
  int acc = 0;
  for (int64_t i = 0; i < g.kernel[0]; ++i) {
    for (int64_t j = 0; j < g.kernel[1]; ++j) {
      const int64_t in_y = y * g.strides[0] - g.pads[0] + i * g.dilations[0];
      const int64_t in_x = x * g.strides[1] - g.pads[1] + j * g.dilations[1];
      if (in_y < 0 || in_y >= height || in_x < 0 || in_x >= width) continue;
      const int* tap = weights.data() + ((o * g.kernel[0] + i) * g.kernel[1] + j) * g.channels;
      const int* pixel = activations.data() + (first * height + in_y) * width + in_x;
      for (int64_t k = 0; k < g.channels; ++k) acc += pixel[k * height * width] * tap[k];
    }
  }
  return acc;
}

// Of one plane of `size`, row by row.
void pool_plane(const siman_pool& p, const int64_t size[2], const float* values, const int64_t out[2], Floats& y) {
  for (int64_t at = 0; at < out[0] * out[1]; ++at) {
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < p.kernel[0] * p.kernel[1]; ++i) {
      const int64_t row = at / out[1] * p.strides[0] - p.pads[0] + i / p.kernel[1];
      const int64_t column = at % out[1] * p.strides[1] - p.pads[1] + i % p.kernel[1];
      if (row < 0 || row >= size[0] || column < 0 || column >= size[1]) continue;
      const float value = values[row * size[1] + column];
      if (value > largest) largest = value;
    }
    y.push_back(largest);
  }
}

Floats pooled(const Case& c, const int64_t size[2], const Floats& values) {
  const siman_pool& p = c.pool;
  if (p.kernel[0] * p.kernel[1] * p.strides[0] * p.strides[1] == 1) return values;
  Floats y;
  for (int64_t plane = 0; plane < c.output[0] * c.output[1]; ++plane)
    pool_plane(p, size, values.data() + plane * size[0] * size[1], c.output + 2, y);
  return y;
}

Floats naive(const Case& c) {
  const siman_geometry& g = c.geometry;
  int64_t out[] = {c.output[0], c.output[1], 0, 0};  // before the pool
  for (int i = 0; i < 2; ++i)
    for (int64_t at = -g.pads[i]; at + g.dilations[i] * (g.kernel[i] - 1) < c.image[2 + i] + g.pads[2 + i];
         at += g.strides[i])
      ++out[2 + i];
  const std::vector<int> weights = c.integer_weights();
  const auto sample = static_cast<size_t>(c.image[1] * c.image[2] * c.image[3]);
  Floats y;
  for (int64_t n = 0; n < out[0]; ++n) {
    const std::vector<int> activations = c.activations(c.x.data() + static_cast<size_t>(n) * sample, sample);
    for (int64_t o = 0; o < out[1]; ++o) {
      for (int64_t at = 0; at < out[2] * out[3]; ++at) {
        const auto acc = static_cast<float>(naive_acc(c, activations, weights, o, at / out[3], at % out[3]));
        const auto f = static_cast<size_t>(o);
        const float v = c.scale[f] * acc + c.bias[f] + (c.full_residual() ? c.residual[y.size()] : c.residual[0]);
        y.push_back(v >= 0 ? v : c.slope[f] * v);
      }
    }
  }
  return pooled(c, out + 2, y);
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

bool same(const Floats& got, const Floats& expected) {
  for (size_t i = 0; i < got.size(); ++i)
    if (got[i] != expected[i] && !(std::isnan(got[i]) && std::isnan(expected[i]))) return false;
  return got.size() == expected.size();
}

siman_conv* create(const Case& c, const char* variant) {
  siman_conv* conv = nullptr;
  require(c.create(variant, &conv));
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
  CasePtr c;
  Floats y;
};

// Two convolutions that share nothing but the library: each thread makes, runs and destroys its own.
void check_two_at_once(const Expectation& a, const Expectation& b, const char* variant) {
  const auto work = [&](const Expectation& e) {
    siman_conv* conv = create(*e.c, variant);
    for (int i = 0; i < 2; ++i) require(same(run(*e.c, conv, on_threads), e.y), "one of two convolutions at once");
    siman_destroy(conv);
  };
  std::thread other([&] { work(a); });
  work(b);
  other.join();
}

void finish_case(Random& random, Case& c, bool may_have_residual) {
  siman_conv* conv = create(c, "scalar");
  require(siman_output_shape(conv, c.image, c.output));
  siman_destroy(conv);
  const auto count = static_cast<size_t>(c.output[0] * c.output[1] * c.output[2] * c.output[3]);
  if (may_have_residual && draw(random, 0, 1))
    c.residual = draw_floats(random, count, static_cast<int>(draw(random, 0, 4)));
}

using Draw = CasePtr (*)(Random&);

// `cases` of one operator, the special ones among them.
void check_operator(Random& random, size_t cases, std::vector<CasePtr> all, Draw draw_case, bool has_residual) {
  while (all.size() < cases) all.push_back(draw_case(random));
  Expectation before;
  for (CasePtr& c : all) {
    finish_case(random, *c, has_residual);
    Floats y = naive(*c);
    Expectation now{std::move(c), std::move(y)};
    for (size_t i = 0; siman_variant_name(i); ++i) {
      if (!siman_variant_supported(i)) continue;
      check_variant(*now.c, siman_variant_name(i), now.y);
      if (!before.y.empty()) check_two_at_once(before, now, siman_variant_name(i));
    }
    before = std::move(now);
  }
}

}  // namespace
}  // namespace sweep

int main(int argc, char** argv) {
  const auto seed = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 20u;
  const int cases = argc > 2 ? std::atoi(argv[2]) : 150;
  std::printf("seed %u, %d cases of each operator and of training\n", seed, cases);
  using namespace sweep;
  Random random(seed);
  check_operator(random, static_cast<size_t>(cases), special_binary(), draw_binary, true);
  check_operator(random, static_cast<size_t>(cases), special_quantized(), draw_quantized, false);
  check_training(random, static_cast<size_t>(cases));
  for (size_t i = 0; siman_variant_name(i); ++i)
    std::printf("%s: %s\n", siman_variant_name(i),
                siman_variant_supported(i) ? "same as plain loops" : "not supported here");
}
