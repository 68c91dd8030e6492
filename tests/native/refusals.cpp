// What the C interface refuses, with the status that says why; and convolutions that come and go.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "siman.h"

namespace {

// 3 filters of 2x2 taps and 9 channels, whose weights are 2 bytes a tap with 7 padding bits.
struct Case {
  siman_geometry geometry{3, {2, 2}, 9, {1, 1}, {0, 1, 1, 0}, {1, 1}, 1, 1};
  std::vector<uint8_t> weights = std::vector<uint8_t>(24, 1);
  std::vector<float> floats = std::vector<float>(3, 0.5f);
};

constexpr int64_t kImage[] = {2, 9, 4, 5};

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void expect(siman_status got, siman_status expected) {
  require(got == expected, (std::string("expected: ") + siman_message(expected)).c_str());
}

siman_status try_create(const Case& c, const char* variant, siman_conv** conv) {
  const float* f = c.floats.data();
  return siman_create(&c.geometry, c.weights.data(), c.weights.size(), f, f, f, variant, conv);
}

template <class AnyCase>
siman_conv* create(const AnyCase& c, const char* variant) {
  siman_conv* conv = nullptr;
  expect(try_create(c, variant, &conv), SIMAN_OK);
  return conv;
}

void check_refused_geometries() {
  struct {
    int64_t siman_geometry::*field;
    siman_status expected;
  } fields[] = {{&siman_geometry::filters, SIMAN_BAD_FILTERS},
                {&siman_geometry::channels, SIMAN_BAD_CHANNELS},
                {&siman_geometry::group, SIMAN_BAD_GROUP},
                {&siman_geometry::center, SIMAN_BAD_CENTER}};
  siman_conv* conv = nullptr;
  for (const int64_t value : {INT64_MIN, int64_t{-1}, int64_t{1} << 31, INT64_MAX}) {
    for (const auto& [field, expected] : fields) {
      Case c;
      c.geometry.*field = value;
      expect(try_create(c, "scalar", &conv), expected);
    }
    for (int i = 0; i < 4; ++i) {
      Case kernel, strides, pads, dilations;
      kernel.geometry.kernel[i % 2] = strides.geometry.strides[i % 2] = value;
      pads.geometry.pads[i] = dilations.geometry.dilations[i % 2] = value;
      expect(try_create(kernel, "scalar", &conv), SIMAN_BAD_KERNEL);
      expect(try_create(strides, "scalar", &conv), SIMAN_BAD_STRIDES);
      expect(try_create(pads, "scalar", &conv), SIMAN_BAD_PADS);
      expect(try_create(dilations, "scalar", &conv), SIMAN_BAD_DILATIONS);
    }
  }
  require(!conv, "nothing was made");
}

void check_refused_creations() {
  const Case c;
  siman_conv* conv = nullptr;
  Case odd = c;
  odd.weights[3] = 128;
  expect(try_create(odd, nullptr, &conv), SIMAN_PADDING_BITS_SET);
  odd.weights.pop_back();
  expect(try_create(odd, nullptr, &conv), SIMAN_BAD_WEIGHT_BYTES);
  odd.geometry.channels = 1 << 23;
  expect(try_create(odd, nullptr, &conv), SIMAN_TOO_MANY_TAPS);
  expect(try_create(c, "", &conv), SIMAN_UNKNOWN_VARIANT);
  for (const char* name : {"amx", "avx512", "avx512vnni", "avx2", "neon", "scalar"}) {
    bool is_here = false;
    for (size_t i = 0; siman_variant_name(i); ++i)
      is_here = is_here || (siman_variant_supported(i) && !std::strcmp(siman_variant_name(i), name));
    if (!is_here) expect(try_create(c, name, &conv), SIMAN_UNSUPPORTED_VARIANT);
  }
  const float* f = c.floats.data();
  expect(siman_create(nullptr, c.weights.data(), 24, f, f, f, nullptr, &conv), SIMAN_NULL_ARGUMENT);
  expect(siman_create(&c.geometry, nullptr, 24, f, f, f, nullptr, &conv), SIMAN_NULL_ARGUMENT);
  expect(siman_create(&c.geometry, c.weights.data(), 24, f, nullptr, f, nullptr, &conv), SIMAN_NULL_ARGUMENT);
  expect(siman_create(&c.geometry, c.weights.data(), 24, f, f, f, nullptr, nullptr), SIMAN_NULL_ARGUMENT);
  require(!conv, "nothing was made");
}

void check_refused_runs() {
  const Case c;
  siman_conv* conv = create(c, "scalar");
  const float* f = c.floats.data();
  int64_t y_shape[4];
  std::vector<float> y(1000);
  const int64_t images[][4] = {{-1, 9, 4, 5}, {2, 8, 4, 5}, {2, 9, 0, 5}, {2, 9, 4, INT64_MAX}, {INT64_MIN, 9, 4, 5}};
  for (const auto& image : images) expect(siman_output_shape(conv, image, y_shape), SIMAN_BAD_IMAGE);
  for (const auto& image : images) expect(siman_run(conv, f, image, f, 0, y.data(), nullptr, nullptr), SIMAN_BAD_IMAGE);
  const int64_t many[] = {1 << 20, 9, 4, 1 << 20};
  expect(siman_output_shape(conv, many, y_shape), SIMAN_TOO_MANY_ELEMENTS);
  expect(siman_output_shape(nullptr, kImage, y_shape), SIMAN_NULL_ARGUMENT);
  expect(siman_output_shape(conv, nullptr, y_shape), SIMAN_NULL_ARGUMENT);
  expect(siman_output_shape(conv, kImage, nullptr), SIMAN_NULL_ARGUMENT);
  expect(siman_run(nullptr, f, kImage, f, 0, y.data(), nullptr, nullptr), SIMAN_NULL_ARGUMENT);
  expect(siman_run(conv, nullptr, kImage, f, 0, y.data(), nullptr, nullptr), SIMAN_NULL_ARGUMENT);
  expect(siman_run(conv, f, kImage, f, 0, nullptr, nullptr, nullptr), SIMAN_NULL_ARGUMENT);
  siman_destroy(conv);
}

// 3 filters of 2x2 taps and 9 channels of 8-bit weights.
struct QuantizedCase {
  siman_geometry geometry{3, {2, 2}, 9, {1, 1}, {0, 1, 1, 0}, {1, 1}, 1, 0};
  std::vector<int8_t> weights = std::vector<int8_t>(3 * 9 * 4, -127);
  std::vector<float> floats = std::vector<float>(3, 0.5f);
  float x_scale = 0.5f;
  int32_t x_zero_point = 7;
  siman_pool pool{{3, 2}, {2, 1}, {2, 1, 0, 1}};
};

siman_status try_create(const QuantizedCase& c, const char* variant, siman_conv** conv) {
  const float* f = c.floats.data();
  return siman_create_quantized(&c.geometry, c.weights.data(), f, f, f, c.x_scale, c.x_zero_point, &c.pool, variant,
                                conv);
}

void check_refused_quantized_geometries() {
  siman_conv* conv = nullptr;
  const auto refused = [&](siman_status expected, auto change) {
    QuantizedCase c;
    change(c.geometry);
    expect(try_create(c, "scalar", &conv), expected);
  };
  refused(SIMAN_BAD_FILTERS, [](siman_geometry& g) { g.filters = 0; });
  refused(SIMAN_BAD_STRIDES, [](siman_geometry& g) { g.strides[1] = int64_t{1} << 31; });
  refused(SIMAN_BAD_PADS, [](siman_geometry& g) { g.pads[2] = -1; });
  refused(SIMAN_NOT_PLAIN, [](siman_geometry& g) { g.group = 3; });
  refused(SIMAN_NOT_PLAIN, [](siman_geometry& g) { g.dilations[1] = 2; });
  refused(SIMAN_NOT_PLAIN, [](siman_geometry& g) { g.center = 1; });
  refused(SIMAN_TOO_MANY_QUANTIZED_TAPS, [](siman_geometry& g) { g.channels = 130; });
  refused(SIMAN_TOO_MANY_QUANTIZED_TAPS, [](siman_geometry& g) { g.channels = 1 << 22; });
  refused(SIMAN_TOO_MANY_ELEMENTS, [](siman_geometry& g) { g.filters = 1 << 26; });
  require(!conv, "nothing was made");
}

void check_refused_quantized_creations() {
  siman_conv* conv = nullptr;
  QuantizedCase c;
  c.weights.back() = -128;
  expect(try_create(c, nullptr, &conv), SIMAN_BAD_WEIGHT);
  c.weights.back() = 127;
  for (const float x_scale : {0.0f, -0.0f, -1.0f, INFINITY, NAN}) {
    c.x_scale = x_scale;
    expect(try_create(c, nullptr, &conv), SIMAN_BAD_X_SCALE);
  }
  c.x_scale = 1e-45f;
  for (const int32_t zero_point : {-1, 256, INT32_MIN, INT32_MAX}) {
    c.x_zero_point = zero_point;
    expect(try_create(c, nullptr, &conv), SIMAN_BAD_X_ZERO_POINT);
  }
  c.x_zero_point = 255;
  const auto refused_pool = [&](auto change) {
    QuantizedCase pooled;
    change(pooled.pool);
    expect(try_create(pooled, "scalar", &conv), SIMAN_BAD_POOL);
  };
  refused_pool([](siman_pool& p) { p.kernel[1] = 0; });
  refused_pool([](siman_pool& p) { p.kernel[0] = int64_t{1} << 31; });
  refused_pool([](siman_pool& p) { p.strides[0] = -1; });
  refused_pool([](siman_pool& p) { p.pads[3] = -1; });
  refused_pool([](siman_pool& p) { p.pads[0] = 3; });
  refused_pool([](siman_pool& p) { p.pads[3] = 2; });
  expect(try_create(c, "", &conv), SIMAN_UNKNOWN_VARIANT);
  const float* f = c.floats.data();
  const int8_t* w = c.weights.data();
  expect(siman_create_quantized(nullptr, w, f, f, f, 1, 0, nullptr, nullptr, &conv), SIMAN_NULL_ARGUMENT);
  expect(siman_create_quantized(&c.geometry, nullptr, f, f, f, 1, 0, nullptr, nullptr, &conv), SIMAN_NULL_ARGUMENT);
  expect(siman_create_quantized(&c.geometry, w, f, f, nullptr, 1, 0, nullptr, nullptr, &conv), SIMAN_NULL_ARGUMENT);
  expect(siman_create_quantized(&c.geometry, w, f, f, f, 1, 0, nullptr, nullptr, nullptr), SIMAN_NULL_ARGUMENT);
  require(!conv, "nothing was made");
  expect(try_create(c, nullptr, &conv), SIMAN_OK);
  int64_t output[4];
  const int64_t enough[] = {1, 9, 2, 2}, too_narrow[] = {1, 9, 3, 1}, none[] = {1, 9, 1, 0};
  expect(siman_output_shape(conv, enough, output), SIMAN_OK);
  require(output[2] == 1 && output[3] == 3, "rows and columns of the pool");
  expect(siman_output_shape(conv, none, output), SIMAN_BAD_IMAGE);
  siman_destroy(conv);
  c.pool = {{5, 4}, {1, 1}, {0, 0, 0, 0}};
  expect(try_create(c, nullptr, &conv), SIMAN_OK);
  expect(siman_output_shape(conv, too_narrow, output), SIMAN_POOL_LARGER_THAN_IMAGE);
  siman_destroy(conv);
  constexpr int64_t kFar = int64_t{1} << 30;
  c.pool = {{kFar, kFar}, {1, 1}, {kFar - 1, kFar - 1, kFar - 1, kFar - 1}};
  expect(try_create(c, nullptr, &conv), SIMAN_OK);
  expect(siman_output_shape(conv, enough, output), SIMAN_TOO_MANY_ELEMENTS);
  siman_destroy(conv);
}

void check_names() {
  for (int status = 0; status <= SIMAN_NO_MEMORY + 1; ++status)
    require(std::strlen(siman_message(static_cast<siman_status>(status))) > 0, "a message for every number");
  require(!siman_variant(nullptr) && !siman_variant_name(1000) && !siman_variant_supported(1000), "nothing is there");
}

void check_lifetimes() {
  const Case binary;
  const QuantizedCase quantized;
  for (int i = 0; i < 1000; ++i) {
    for (size_t v = 0; siman_variant_name(v); ++v) {
      if (!siman_variant_supported(v)) continue;
      siman_destroy(create(binary, siman_variant_name(v)));
      siman_destroy(create(quantized, siman_variant_name(v)));
    }
  }
  siman_destroy(nullptr);
}

void check_refused_training() {
  float f[8] = {}, *none = nullptr;
  expect(siman_signs(f, f, 1, 4, "", f), SIMAN_UNKNOWN_VARIANT);
  expect(siman_sign_backward(f, f, f, 1, 4, 1, "", f), SIMAN_UNKNOWN_VARIANT);
  for (const auto& [x, means, grad, out] :
       {std::array{none, f, f, f}, {f, none, f, f}, {f, f, none, f}, {f, f, f, none}})
    expect(siman_sign_backward(x, means, grad, 1, 4, 1, nullptr, out), SIMAN_NULL_ARGUMENT);
  for (const auto& [x, means, out] : {std::array{none, f, f}, {f, none, f}, {f, f, none}})
    expect(siman_signs(x, means, 1, 4, nullptr, out), SIMAN_NULL_ARGUMENT);
  expect(siman_binarize(f, 1, 4, "", f), SIMAN_UNKNOWN_VARIANT);
  expect(siman_binarize_backward(f, f, 1, 4, "", f), SIMAN_UNKNOWN_VARIANT);
  expect(siman_clip(f, 1, 4, 15, ""), SIMAN_UNKNOWN_VARIANT);
  expect(siman_binarize(none, 1, 4, nullptr, f), SIMAN_NULL_ARGUMENT);
  expect(siman_binarize(f, 1, 4, nullptr, none), SIMAN_NULL_ARGUMENT);
  for (const auto& [w, grad, out] : {std::array{none, f, f}, std::array{f, none, f}, std::array{f, f, none}})
    expect(siman_binarize_backward(w, grad, 1, 4, nullptr, out), SIMAN_NULL_ARGUMENT);
  expect(siman_clip(none, 1, 4, 15, nullptr), SIMAN_NULL_ARGUMENT);
  for (const double percent : {-1.0, 50.0, std::nan("")})
    expect(siman_clip(f, 1, 4, percent, nullptr), SIMAN_BAD_PERCENT);
  expect(siman_signs(none, none, 0, 4, nullptr, none), SIMAN_OK);
  for (const auto& [filters, count] : {std::array<size_t, 2>{0, 4}, std::array<size_t, 2>{4, 0}}) {
    expect(siman_binarize(none, filters, count, nullptr, none), SIMAN_OK);
    expect(siman_binarize_backward(none, none, filters, count, nullptr, none), SIMAN_OK);
    expect(siman_clip(none, filters, count, 15, nullptr), SIMAN_OK);
  }
  expect(siman_sign_backward(none, none, none, 4, 0, 1, nullptr, none), SIMAN_OK);
}

void check_refused_ceilings() {
  double per_second = 0;
  for (const double seconds : {0.0, -1.0, 1e9, double{INFINITY}, double{NAN}})
    expect(siman_measure_ceiling("scalar", seconds, &per_second), SIMAN_BAD_SECONDS);
  expect(siman_measure_ceiling("scalar", 0.01, nullptr), SIMAN_NULL_ARGUMENT);
  expect(siman_measure_ceiling("", 0.01, &per_second), SIMAN_UNKNOWN_VARIANT);
  require(per_second == 0, "nothing was measured");
}

}  // namespace

int main() {
  check_refused_geometries();
  check_refused_creations();
  check_refused_runs();
  check_refused_ceilings();
  check_refused_training();
  check_refused_quantized_geometries();
  check_refused_quantized_creations();
  check_names();
  check_lifetimes();
  std::puts("all refused as they should be");
}
