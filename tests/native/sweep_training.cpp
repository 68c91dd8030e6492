// The kernels of training against plain loops in double.
#include <algorithm>
#include <cmath>

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

}  // namespace

void check_training(Random& random, size_t cases) {
  for (size_t c = 0; c < cases; ++c) {
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
