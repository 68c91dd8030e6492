// Training, for the latent weights w of one filter: what binarize.py has. With c = w - mean(w), std = sqrt(sum(c^2) /
// (count - 1) + EPS) and z = c / std:
//   bits            +1 where |z| exceeds its lower median, else -1
//   their gradient  (s - mean(s) - z * sum(s*z) / (count - 1)) / std,  s = grad * sign(z)
// Sums are taken in the order of mean.inl, of floats that were rounded one by one: the results are the same bits
// whatever the variant. A filter lies in the cache from the first pass on.
//
// Floats: kLanes, Vec, load, store, set, mul, add, larger(v, m), which is m where there is a NaN, signs(x, threshold);
// Bits, no_bits, tally(Bits, Vec x, Vec bound): counts of 32 bits, 1 more where x <= bound.

// body(Floats{}, i) for whole vectors, then body(One{}, i) for what is left.
template <class Floats, class One, class Body>
SIMAN_INLINE void for_each(size_t count, const Body& body) {
  const size_t whole = count / Floats::kLanes * Floats::kLanes;
  for (size_t i = 0; i < whole; i += Floats::kLanes) body(Floats{}, i);
  for (size_t i = whole; i < count; ++i) body(One{}, i);
}

template <class Doubles>
double sum_of(const float* x, size_t count) {
  double sum = 0;
  for (size_t i = 0; i < count; i += kSumBlock)
    sum += sum_block<Doubles>(x + i, count - i < kSumBlock ? count - i : kSumBlock);
  return sum;
}

template <class Doubles>
float mean_of(const float* x, size_t count) {
  return static_cast<float>(sum_of<Doubles>(x, count) / static_cast<double>(count));
}

template <class F>
SIMAN_INLINE typename F::Vec negative(typename F::Vec v) {
  return F::mul(v, F::set(-1));
}

template <class F>
SIMAN_INLINE typename F::Vec magnitude(typename F::Vec v) {
  return F::larger(v, negative<F>(v));
}

// 1, -1, and 0 for zero and NaN.
template <class F>
SIMAN_INLINE typename F::Vec sign_of(typename F::Vec v) {
  const auto zero = F::set(0);
  return F::mul(F::add(F::signs(v, zero), negative<F>(F::signs(negative<F>(v), zero))), F::set(0.5f));
}

// How many are at most `bound`.
template <class Floats>
size_t count_at_most(const float* x, size_t count, float bound) {
  constexpr int kTallies = 4;
  constexpr size_t kStep = kTallies * Floats::kLanes, kBlock = size_t{1} << 30;  // of whole steps: a tally has 32 bits
  const auto limit = Floats::set(bound);
  size_t found = 0, i = 0;
  while (i + kStep <= count) {
    const size_t end = count - i < kBlock ? i + (count - i) / kStep * kStep : i + kBlock;
    typename Floats::Bits tallies[kTallies];
    for (auto& tally : tallies) tally = Floats::no_bits();
    for (; i < end; i += kStep)
      for (int k = 0; k < kTallies; ++k)
        tallies[k] = Floats::tally(tallies[k], Floats::load(x + i + k * Floats::kLanes), limit);
    uint32_t counts[kTallies * sizeof(typename Floats::Bits) / 4];
    __builtin_memcpy(counts, tallies, sizeof(tallies));
    for (const uint32_t each : counts) found += each;
  }
  for (; i < count; ++i) found += x[i] <= bound;
  return found;
}

SIMAN_INLINE float from_pattern(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The value of a 0-based rank among values that are not below 0, as the bit pattern that it is; `low` and `high`
// enclose it. Their range is halved until it is one: in a cache faster than a partition, whose every comparison is a
// guess.
template <class Floats>
uint32_t select(const float* x, size_t count, size_t rank, uint32_t low, uint32_t high) {
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (count_at_most<Floats>(x, count, from_pattern(middle)) > rank)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// z = (w + minus_mean) * over_std
struct Moments {
  float minus_mean, over_std;
};

template <class F>
SIMAN_INLINE typename F::Vec centred(const float* w, float minus_mean) {
  return F::add(F::load(w), F::set(minus_mean));
}

template <class F>
SIMAN_INLINE typename F::Vec standardized(const float* w, const Moments& m) {
  return F::mul(centred<F>(w, m.minus_mean), F::set(m.over_std));
}

template <class Floats, class One, class Doubles>
Moments moments(const float* w, size_t count, float* scratch) {
  const float minus_mean = -mean_of<Doubles>(w, count);
  for_each<Floats, One>(count, [=]<class F>(F, size_t i) {
    const auto c = centred<F>(w + i, minus_mean);
    F::store(scratch + i, F::mul(c, c));
  });
  const auto freedom = static_cast<double>(count > 1 ? count - 1 : 1);
  const double variance = sum_of<Doubles>(scratch, count) / freedom + kEps;
  return {minus_mean, static_cast<float>(1 / __builtin_sqrt(variance))};
}

template <class Floats, class One, class Doubles>
void binarize(const LatentTask& t) {
  constexpr uint32_t kInfinity = 0x7F800000;
  const Moments m = moments<Floats, One, Doubles>(t.w, t.count, t.out);
  for_each<Floats, One>(t.count,
                        [=]<class F>(F, size_t i) { F::store(t.out + i, magnitude<F>(standardized<F>(t.w + i, m))); });
  const float median = from_pattern(select<Floats>(t.out, t.count, (t.count - 1) / 2, 0, kInfinity));
  for_each<Floats, One>(t.count, [=]<class F>(F, size_t i) {
    F::store(t.out + i, negative<F>(F::signs(F::set(median), F::load(t.out + i))));
  });
}

template <class Floats, class One, class Doubles>
void binarize_backward(const LatentTask& t) {
  const Moments m = moments<Floats, One, Doubles>(t.w, t.count, t.out);
  for_each<Floats, One>(t.count, [=]<class F>(F, size_t i) {
    F::store(t.out + i, F::mul(F::load(t.grad + i), sign_of<F>(standardized<F>(t.w + i, m))));
  });
  const float mean = mean_of<Doubles>(t.out, t.count);
  for_each<Floats, One>(t.count, [=]<class F>(F, size_t i) {
    const auto z = standardized<F>(t.w + i, m);
    F::store(t.out + i, F::mul(F::mul(F::load(t.grad + i), sign_of<F>(z)), z));
  });
  const auto freedom = static_cast<double>(t.count > 1 ? t.count - 1 : 1);
  const auto slope = static_cast<float>(sum_of<Doubles>(t.out, t.count) / freedom);
  for_each<Floats, One>(t.count, [=]<class F>(F, size_t i) {
    const auto z = standardized<F>(t.w + i, m);
    const auto s = F::mul(F::load(t.grad + i), sign_of<F>(z));
    const auto straight = F::add(s, F::set(-mean));
    F::store(t.out + i, F::mul(F::add(straight, F::mul(z, F::set(-slope))), F::set(m.over_std)));
  });
}

template <class Floats, class One, class Doubles>
void centre(float* w, size_t count) {
  const float minus_mean = -mean_of<Doubles>(w, count);
  for_each<Floats, One>(count, [=]<class F>(F, size_t i) { F::store(w + i, centred<F>(w + i, minus_mean)); });
}

// Magnitudes into [low, high]; zero, of whichever sign, and NaN stay what they are.
template <class Floats, class One>
void clamp(float* w, size_t count, float low, float high) {
  for_each<Floats, One>(count, [=]<class F>(F, size_t i) {
    const auto at = F::load(w + i), raised = F::larger(F::set(low), magnitude<F>(at));
    const auto lowered = negative<F>(F::larger(F::set(-high), negative<F>(raised)));
    F::store(w + i, F::mul(sign_of<F>(at), lowered));
  });
}
