// The kernels of training against plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "sweep.h"

namespace sweep {
namespace {

struct Samples {
  size_t samples, count;
  bool centred;
  Floats x, grad, means;
};

double mean(const float* x, size_t count) {
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += x[i];
  return sum / static_cast<double>(count);
}

Samples draw_samples(Random& random) {
  Samples s{static_cast<size_t>(draw(random, 0, 3)),
            static_cast<size_t>(draw(random, 1, 70)),
            draw(random, 0, 1) == 1,
            {},
            {},
            {}};
  if (draw(random, 0, 3) == 0) s.count = static_cast<size_t>(draw(random, 4000, 9000));
  for (size_t n = 0; n < s.samples; ++n) {
    const Floats x = draw_floats(random, s.count, 1), grad = draw_floats(random, s.count, 1);
    s.x.insert(s.x.end(), x.begin(), x.end());
    s.grad.insert(s.grad.end(), grad.begin(), grad.end());
    s.means.push_back(s.centred ? static_cast<float>(mean(x.data(), s.count)) : 0.0f);
  }
  return s;
}

// As kernels/surrogate.inl has it, of one sample. `largest` is raised to what a value could be: std - |c| and the
// centring may leave little of it but roundings.
std::vector<double> gradient(const float* x, const float* grad, size_t count, double mean, bool centred,
                             double& largest) {
  const auto freedom = static_cast<double>(std::max<size_t>(1, count - 1));
  double squares = 0, sum_q = 0, sum_qc = 0;
  for (size_t i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double variance = squares / freedom + 1e-5, std = std::sqrt(variance);
  std::vector<double> q(count);
  for (size_t i = 0; i < count; ++i) {
    q[i] = grad[i] * std::max(0.0, std - std::fabs(x[i] - mean));
    sum_q += q[i];
    sum_qc += q[i] * (x[i] - mean);
  }
  for (size_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(grad[i]) * 2 / std);
    if (centred) q[i] -= sum_q / static_cast<double>(count) + (x[i] - mean) * sum_qc / (variance * freedom);
    q[i] *= 2 / variance;
  }
  return q;
}

bool near(const Floats& got, const std::vector<double>& expected, double largest) {
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::fabs(got[i] - expected[i]) <= 2e-6 * largest)) return false;
  return got.size() == expected.size();
}

struct Latents {
  size_t filters, count;
  double percent;
  bool odd;  // with infinities and the like: the same in all variants, whatever it is
  Floats w, grad;
};

// Of any values, or of few, which tie.
Latents draw_latents(Random& random) {
  Latents l{static_cast<size_t>(draw(random, 1, 5)),
            static_cast<size_t>(draw(random, 1, 80)),
            static_cast<double>(draw(random, 0, 49)),
            draw(random, 0, 3) == 0,
            {},
            {}};
  if (draw(random, 0, 3) == 0) l.count = static_cast<size_t>(draw(random, 4000, 9000));
  l.w = draw_floats(random, l.filters * l.count, l.odd ? static_cast<int>(draw(random, 0, 4)) : 1);
  l.grad = draw_floats(random, l.filters * l.count, 1);
  if (!l.odd && draw(random, 0, 3) == 0)
    for (float& w : l.w) w = std::round(w);
  return l;
}

struct Standardized {
  std::vector<double> z;
  double std;
};

Standardized standardize(const float* w, size_t count) {
  const double of_row = mean(w, count);
  double squares = 0;
  for (size_t i = 0; i < count; ++i) squares += (w[i] - of_row) * (w[i] - of_row);
  Standardized s{std::vector<double>(count),
                 std::sqrt(squares / static_cast<double>(std::max<size_t>(1, count - 1)) + 1e-5)};
  for (size_t i = 0; i < count; ++i) s.z[i] = (w[i] - of_row) / s.std;
  return s;
}

double of_rank(std::vector<double> values, size_t rank) {
  std::sort(values.begin(), values.end());
  return values[std::min(rank, values.size() - 1)];
}

// Rounding decides among magnitudes that nearly tie with the median; of others none is wrong.
bool are_bits(const float* bits, const std::vector<double>& z) {
  std::vector<double> magnitudes;
  for (const double at : z) magnitudes.push_back(std::fabs(at));
  const double median = of_rank(magnitudes, (z.size() - 1) / 2);
  for (size_t i = 0; i < z.size(); ++i) {
    if (bits[i] != 1 && bits[i] != -1) return false;
    if (std::fabs(magnitudes[i] - median) > 1e-5 && (bits[i] > 0) != (magnitudes[i] > median)) return false;
  }
  return true;
}

bool is_gradient(const float* got, const float* grad, const Standardized& s) {
  const size_t count = s.z.size();
  std::vector<double> straight(count);
  double sum = 0, product = 0, largest = 0;
  for (size_t i = 0; i < count; ++i) {
    if (s.z[i] != 0 && std::fabs(s.z[i]) < 1e-4) return true;  // rounding decides the sign, and all others with it
    straight[i] = s.z[i] == 0 ? 0 : s.z[i] > 0 ? grad[i] : -grad[i];
    sum += straight[i], product += straight[i] * s.z[i];
    largest = std::max(largest, std::fabs(straight[i]));
  }
  const double slope = product / static_cast<double>(std::max<size_t>(1, count - 1));
  for (size_t i = 0; i < count; ++i) {
    const double expected = (straight[i] - sum / static_cast<double>(count) - s.z[i] * slope) / s.std;
    if (!(std::fabs(got[i] - expected) <= 1e-5 * largest * (1 + std::fabs(s.z[i])) / s.std)) return false;
  }
  return true;
}

double percentile(const std::vector<double>& values, double percent) {
  const double position = percent / 100 * static_cast<double>(values.size() - 1);
  const auto rank = static_cast<size_t>(position);
  const double below = of_rank(values, rank), above = of_rank(values, rank + 1);
  return below + (position - static_cast<double>(rank)) * (above - below);
}

std::vector<double> clipped(const Latents& l) {
  std::vector<double> centred, magnitudes;
  for (size_t f = 0; f < l.filters; ++f)
    for (size_t i = 0; i < l.count; ++i)
      centred.push_back(l.w[f * l.count + i] - mean(l.w.data() + f * l.count, l.count));
  for (const double c : centred) magnitudes.push_back(std::fabs(c));
  const double low = percentile(magnitudes, l.percent), high = percentile(magnitudes, 100 - l.percent);
  for (double& c : centred) c = std::fabs(c) < 1e-5 ? 0 : std::copysign(std::clamp(std::fabs(c), low, high), c);
  return centred;
}

bool is_clipped(const Floats& got, const std::vector<double>& expected) {
  for (size_t i = 0; i < got.size(); ++i)
    if (expected[i] != 0 && !(std::fabs(got[i] - expected[i]) <= 1e-5)) return false;
  return true;
}

// Bit for bit; a NaN may have any payload.
bool are_same(const Floats& a, const Floats& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return a.size() == b.size();
}

void check_latents(const Latents& l) {
  Floats first_bits, first_grad, first_clipped;
  for (size_t v = 0; siman_variant_name(v); ++v) {
    if (!siman_variant_supported(v)) continue;
    const char* variant = siman_variant_name(v);
    Floats bits(l.w.size()), grad(l.w.size()), weights = l.w;
    require(siman_binarize(l.w.data(), l.filters, l.count, variant, bits.data()));
    require(siman_binarize_backward(l.w.data(), l.grad.data(), l.filters, l.count, variant, grad.data()));
    require(siman_clip(weights.data(), l.filters, l.count, l.percent, variant));
    for (size_t f = 0; !l.odd && first_bits.empty() && f < l.filters; ++f) {
      const Standardized s = standardize(l.w.data() + f * l.count, l.count);
      require(are_bits(bits.data() + f * l.count, s.z), "bits of latent weights");
      require(is_gradient(grad.data() + f * l.count, l.grad.data() + f * l.count, s), "the gradient through bits");
    }
    if (first_bits.empty()) {
      if (!l.odd) require(is_clipped(weights, clipped(l)), "clipped weights");
      first_bits = bits, first_grad = grad, first_clipped = weights;
    }
    require(are_same(bits, first_bits) && are_same(grad, first_grad) && are_same(weights, first_clipped),
            "latent weights in each variant");
  }
}

}  // namespace

void check_training(Random& random, size_t cases) {
  for (size_t c = 0; c < cases; ++c) {
    check_latents(draw_latents(random));
    const Samples s = draw_samples(random);
    std::vector<double> expected;
    double largest = 0;
    for (size_t n = 0; n < s.samples; ++n) {
      const auto of_sample =
          gradient(s.x.data() + n * s.count, s.grad.data() + n * s.count, s.count, s.means[n], s.centred, largest);
      expected.insert(expected.end(), of_sample.begin(), of_sample.end());
    }
    Floats odd = draw_floats(random, s.x.size(), 4), signs(s.x.size()), got(s.x.size());
    for (size_t v = 0; siman_variant_name(v); ++v) {
      if (!siman_variant_supported(v)) continue;
      const char* variant = siman_variant_name(v);
      require(siman_sign_backward(s.x.data(), s.means.data(), s.grad.data(), s.samples, s.count, s.centred, variant,
                                  got.data()));
      require(near(got, expected, largest), "the gradient through signs");
      require(siman_signs(odd.data(), s.means.data(), s.samples, s.count, variant, signs.data()));
      for (size_t i = 0; i < odd.size(); ++i)
        require(signs[i] == (odd[i] >= s.means[i / s.count] ? 1.0f : -1.0f), "signs");
    }
  }
}

}  // namespace sweep
