// Training, for one sample of `count` floats in any order: sign(x - mean), and the gradient that is passed through it.
//
// With c = x - mean, std = sqrt(sum(c^2) / (count - 1) + EPS) and q = grad * max(0, std - |c|), the surrogate of SiMaN:
//   dL/dx = (q - mean(q) - c * sum(q*c) / (std^2 * (count - 1))) * 2 / std^2
// (layers.py derives it). Not centred, the mean is 0 and std counts as a constant: dL/dx = 2*q / std^2. Three passes
// over a sample, which lies in the second-level cache after the first; an operator at a time they are twelve, over
// whole batches.
//
// Floats: kLanes, Vec, load, store, set, mul, add, larger(v, m), signs(Vec x, Vec threshold).

constexpr double kEps = 1e-5;  // binarize.EPS

template <class Floats>
double total(typename Floats::Vec v) {
  float lanes[Floats::kLanes];
  Floats::store(lanes, v);
  double sum = 0;
  for (const float lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

template <class Floats>
void signs_of(const SignTask& t, size_t begin, size_t end) {
  const auto threshold = Floats::set(t.mean);
  for (size_t i = begin; i < end; i += Floats::kLanes)
    Floats::store(t.out + i, Floats::signs(Floats::load(t.x + i), threshold));
}

struct Sums {
  double q, qc;
};

// A sample, in the notation above.
template <class Floats>
struct Surrogate {
  using Vec = typename Floats::Vec;
  static constexpr size_t kBlock = 64 * Floats::kLanes;  // that is added up in float32

  const SignTask& t;
  Vec minus_mean = Floats::set(-t.mean), minus_one = Floats::set(-1), zero = Floats::set(0);

  Vec c(size_t i) const { return Floats::add(Floats::load(t.x + i), minus_mean); }
  Vec q(size_t i, Vec c, Vec std) const {
    const Vec size = Floats::larger(c, Floats::mul(c, minus_one));
    const Vec room = Floats::add(std, Floats::mul(size, minus_one));
    return Floats::mul(Floats::larger(room, zero), Floats::load(t.grad + i));
  }

  // Whole vectors from here on, as all [begin, end) below.
  double squares(size_t begin, size_t end) const {
    double sum = 0;
    for (size_t at = begin; at < end; at += kBlock) {
      Vec part = zero;
      for (size_t i = at; i < end && i < at + kBlock; i += Floats::kLanes)
        part = Floats::add(part, Floats::mul(c(i), c(i)));
      sum += total<Floats>(part);
    }
    return sum;
  }

  Sums sums(size_t begin, size_t end, float of_std) const {
    const Vec std = Floats::set(of_std);
    Sums sums{0, 0};
    for (size_t at = begin; at < end; at += kBlock) {
      Vec part_q = zero, part_qc = zero;
      for (size_t i = at; i < end && i < at + kBlock; i += Floats::kLanes) {
        const Vec at_c = c(i), at_q = q(i, at_c, std);
        part_q = Floats::add(part_q, at_q);
        part_qc = Floats::add(part_qc, Floats::mul(at_q, at_c));
      }
      sums.q += total<Floats>(part_q);
      sums.qc += total<Floats>(part_qc);
    }
    return sums;
  }

  // (q - mean_q - slope*c) * scale
  void finish(size_t begin, size_t end, float of_std, float mean_q, float slope, float of_scale) const {
    const Vec std = Floats::set(of_std), scale = Floats::set(of_scale);
    const Vec minus_mean_q = Floats::set(-mean_q), minus_slope = Floats::set(-slope);
    for (size_t i = begin; i < end; i += Floats::kLanes) {
      const Vec at_c = c(i), centred = Floats::add(q(i, at_c, std), minus_mean_q);
      Floats::store(t.out + i, Floats::mul(Floats::add(centred, Floats::mul(minus_slope, at_c)), scale));
    }
  }
};

template <class Floats, class One>
void signs(const SignTask& t) {
  const size_t whole = t.count / Floats::kLanes * Floats::kLanes;
  signs_of<Floats>(t, 0, whole);
  signs_of<One>(t, whole, t.count);
}

template <class Floats, class One>
void sign_backward(const SignTask& t) {
  const size_t whole = t.count / Floats::kLanes * Floats::kLanes;
  const Surrogate<Floats> most{t};
  const Surrogate<One> rest{t};
  const double freedom = t.count > 1 ? static_cast<double>(t.count - 1) : 1;
  const double variance = (most.squares(0, whole) + rest.squares(whole, t.count)) / freedom + kEps;
  const auto std = static_cast<float>(__builtin_sqrt(variance)), scale = static_cast<float>(2 / variance);
  float mean_q = 0, slope = 0;
  if (t.centred) {
    const Sums a = most.sums(0, whole, std), b = rest.sums(whole, t.count, std);
    mean_q = static_cast<float>((a.q + b.q) / static_cast<double>(t.count));
    slope = static_cast<float>((a.qc + b.qc) / (variance * freedom));
  }
  most.finish(0, whole, std, mean_q, slope, scale);
  rest.finish(whole, t.count, std, mean_q, slope, scale);
}
