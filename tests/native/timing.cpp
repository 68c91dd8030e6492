// Time of one 3x3 convolution: siman_timing VARIANT CHANNELS SIZE. Prints milliseconds, the best of many single-thread
// runs, with and without the mean: `siman_timing avx2 64 56` -> "0.21 0.20".
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "siman.h"

namespace {

double best_ms(const siman_geometry& geometry, const char* variant, int64_t size, const std::vector<float>& residual) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> weights(static_cast<size_t>(geometry.filters * 9 * geometry.channels / 8));
  for (auto& byte : weights) byte = static_cast<uint8_t>(random());
  const std::vector<float> ones(static_cast<size_t>(geometry.filters), 1.0f);
  siman_conv* conv = nullptr;
  const siman_status status =
      siman_create(&geometry, weights.data(), weights.size(), ones.data(), ones.data(), ones.data(), variant, &conv);
  if (status != SIMAN_OK) {
    std::fprintf(stderr, "%s\n", siman_message(status));
    std::exit(1);
  }
  const int64_t image[] = {1, geometry.channels, size, size};
  std::vector<float> x(static_cast<size_t>(geometry.channels * size * size)), y(residual.size());
  for (auto& value : x) value = normal(random);
  double best = 1e9;
  for (int i = 0; i < 300; ++i) {
    const auto start = std::chrono::steady_clock::now();
    siman_run(conv, x.data(), image, residual.data(), 1, y.data(), nullptr, nullptr);
    best = std::min(best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  siman_destroy(conv);
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: siman_timing VARIANT CHANNELS SIZE\n");
    return 2;
  }
  const int64_t channels = std::atoi(argv[2]), size = std::atoi(argv[3]);
  siman_geometry geometry{channels, {3, 3}, channels, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1, 1};
  const std::vector<float> residual(static_cast<size_t>(channels * size * size), 0.5f);
  const double centred = best_ms(geometry, argv[1], size, residual);
  geometry.center = 0;
  std::printf("%.4f %.4f\n", centred, best_ms(geometry, argv[1], size, residual));
}
