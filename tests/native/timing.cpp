// Milliseconds of one convolution, the best of many single-thread runs. A residual lies in Y's memory, as it mostly
// does in ONNX Runtime.
//   siman_timing VARIANT CHANNELS SIZE                     binary, 3x3, with and without the mean:
//     siman_timing avx2 64 56 -> "0.21 0.20"
//   siman_timing VARIANT CHANNELS SIZE FILTERS KERNEL STRIDE PAD    quantized, as the first of ResNet-18:
//     siman_timing avx2 3 224 64 7 2 3 -> "2.24"
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "siman.h"

namespace {

using Floats = std::vector<float>;
using Random = std::mt19937;

void require(siman_status status) {
  if (status == SIMAN_OK) return;
  std::fprintf(stderr, "%s\n", siman_message(status));
  std::exit(1);
}

template <class Value>
std::vector<Value> random_bytes(Random& random, int64_t count) {
  std::vector<Value> bytes(static_cast<size_t>(count));
  for (auto& byte : bytes) byte = static_cast<Value>(random() % 255 - 127);
  return bytes;
}

double best_ms(siman_conv* conv, Random& random, int64_t channels, int64_t size, bool residual_is_full) {
  const int64_t image[] = {1, channels, size, size};
  int64_t output[4];
  require(siman_output_shape(conv, image, output));
  std::normal_distribution<float> normal;
  Floats x(static_cast<size_t>(channels * size * size)), y(static_cast<size_t>(output[1] * output[2] * output[3]));
  for (auto& value : x) value = normal(random);
  const float zero = 0;
  double best = 1e9;
  for (int i = 0; i < 300; ++i) {
    const auto start = std::chrono::steady_clock::now();
    require(siman_run(conv, x.data(), image, residual_is_full ? y.data() : &zero, residual_is_full, y.data(), nullptr,
                      nullptr));
    best = std::min(best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  siman_destroy(conv);
  return best;
}

double binary_ms(const char* variant, int64_t channels, int64_t size, int64_t center) {
  const siman_geometry geometry{channels, {3, 3}, channels, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1, center};
  Random random(1);
  const auto weights = random_bytes<uint8_t>(random, channels * 9 * channels / 8);
  const Floats ones(static_cast<size_t>(channels), 1.0f);
  siman_conv* conv = nullptr;
  require(
      siman_create(&geometry, weights.data(), weights.size(), ones.data(), ones.data(), ones.data(), variant, &conv));
  return best_ms(conv, random, channels, size, true);
}

double quantized_ms(const char* variant, int64_t channels, int64_t size, const int64_t (&more)[4]) {
  const auto [filters, kernel, stride, pad] = more;
  const siman_geometry geometry{filters, {kernel, kernel}, channels, {stride, stride}, {pad, pad, pad, pad}, {1, 1}, 1,
                                0};
  Random random(1);
  const auto weights = random_bytes<int8_t>(random, filters * channels * kernel * kernel);
  const Floats ones(static_cast<size_t>(filters), 1.0f);
  siman_conv* conv = nullptr;
  require(siman_create_quantized(&geometry, weights.data(), ones.data(), ones.data(), ones.data(), 0.0186f, 114,
                                 nullptr, variant, &conv));
  return best_ms(conv, random, channels, size, false);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 8) {
    std::fprintf(stderr, "usage: siman_timing VARIANT CHANNELS SIZE [FILTERS KERNEL STRIDE PAD]\n");
    return 2;
  }
  const int64_t channels = std::atoi(argv[2]), size = std::atoi(argv[3]);
  if (argc == 4) {
    std::printf("%.4f %.4f\n", binary_ms(argv[1], channels, size, 1), binary_ms(argv[1], channels, size, 0));
    return 0;
  }
  const int64_t more[] = {std::atoi(argv[4]), std::atoi(argv[5]), std::atoi(argv[6]), std::atoi(argv[7])};
  std::printf("%.4f\n", quantized_ms(argv[1], channels, size, more));
}
