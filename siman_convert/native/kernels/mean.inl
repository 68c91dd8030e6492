// The sum of up to kSumBlock floats in the one order that every runtime shares (DESIGN, "The method, exactly"):
// element i goes to partial sum i mod 32 in increasing i; then sums k and k+16 are added, k and k+8, ... down to 0
// and 1.
//
// Doubles: kLanes, Vec, zero(), add(Vec, Vec), widen(const float*), store(double*, Vec).

template <class Doubles>
double sum_block(const float* x, size_t count) {
  constexpr int kSums = 32, kVectors = kSums / Doubles::kLanes;
  typename Doubles::Vec sums[kVectors];
  for (auto& sum : sums) sum = Doubles::zero();
  size_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int k = 0; k < kVectors; ++k) sums[k] = Doubles::add(sums[k], Doubles::widen(x + i + k * Doubles::kLanes));
  double parts[kSums];
  for (int k = 0; k < kVectors; ++k) Doubles::store(parts + k * Doubles::kLanes, sums[k]);
  for (int k = 0; i < count; ++i, ++k) parts[k] += x[i];
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) parts[k] += parts[k + width];
  return parts[0];
}
