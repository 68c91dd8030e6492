// The C interface: null pointers and names are checked here, sizes in geometry.cpp; no exception leaves.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <string_view>

#include "binary_conv.h"
#include "clip.h"
#include "quantized_conv.h"

struct siman_conv {
  std::unique_ptr<siman::Conv> conv;
};

namespace {

const char* const kMessages[] = {
    "ok",
    "a pointer that must be set is null",
    "the number of filters must be in 1..2147483647",
    "kernel rows and columns must be in 1..2147483647",
    "channels must be in 1..2147483647",
    "strides must be in 1..2147483647",
    "pads must be in 0..2147483647",
    "dilations must be in 1..2147483647",
    "group must be at least 1 and divide the number of filters",
    "center must be 0 or 1",
    "channels*kH*kW must be at most 16777216, so that sums are exact in float32",
    "W must hold filters*kH*kW*ceil(channels/8) bytes",
    "W: padding bits beyond the last channel must be 0; the data is damaged or `channels` is wrong",
    "X must be (N, channels*group, H, W) with H and W at least 1",
    "the dilated kernel is larger than the padded image of X",
    "X, W or Y has more than 2147483647 elements",
    "SIMAN_ISA or variant: unknown name; known are amx, avx512, avx512vnni, avx2, neon and scalar",
    "SIMAN_ISA or variant: processor or build cannot run it; known are amx, avx512, avx512vnni, avx2, neon and scalar",
    "a quantized convolution has group 1, dilations 1 and center 0",
    "channels*kH*kW must be at most 518, so that sums of 8-bit products are exact in float32",
    "W must be in -127..127",
    "x_scale must be finite and greater than 0",
    "x_zero_point must be in 0..255",
    "pool_kernel and pool_strides must be in 1..2147483647, pool_pads from 0 and below pool_kernel",
    "the pool is larger than the padded image that it reads",
    "seconds must be above 0 and at most 3600",
    "percent must be at least 0 and below 50",
    "out of memory",
};
static_assert(sizeof(kMessages) / sizeof(kMessages[0]) == SIMAN_NO_MEMORY + 1);

constexpr const char* kKnown[] = {"amx", "avx512", "avx512vnni", "avx2", "neon", "scalar"};

bool is_known(const char* name) {
  for (const char* known : kKnown)
    if (std::string_view(known) == name) return true;
  return false;
}

siman_status choose(const char* name, const siman::Variant** variant) {
  if (!name) {
    name = std::getenv("SIMAN_ISA");
    if (name && !*name) name = nullptr;
  }
  const siman::NamedVariant* found = siman::find_variant(name);
  if (!found) return is_known(name) ? SIMAN_UNSUPPORTED_VARIANT : SIMAN_UNKNOWN_VARIANT;
  if (!found->supported()) return SIMAN_UNSUPPORTED_VARIANT;
  *variant = found->kernels;
  return SIMAN_OK;
}

size_t variant_count() {
  size_t count = 0;
  while (siman::kVariants[count].kernels) ++count;
  return count;
}

}  // namespace

const char* siman_message(siman_status status) {
  return status >= SIMAN_OK && status <= SIMAN_NO_MEMORY ? kMessages[status] : "unknown status";
}

siman_status siman_create(const siman_geometry* geometry, const uint8_t* weights, size_t weight_bytes,
                          const float* scale, const float* bias, const float* slope, const char* variant,
                          siman_conv** conv) try {
  if (!geometry || !conv) return SIMAN_NULL_ARGUMENT;
  const siman::Variant* chosen = nullptr;
  siman_status status = siman::check_geometry(*geometry);
  if (status == SIMAN_OK && (!weights || !scale || !bias || !slope)) status = SIMAN_NULL_ARGUMENT;
  if (status == SIMAN_OK) status = siman::check_weights(*geometry, weights, weight_bytes);
  if (status == SIMAN_OK) status = choose(variant, &chosen);
  if (status != SIMAN_OK) return status;
  *conv = new siman_conv{siman::make_binary_conv(*geometry, weights, scale, bias, slope, *chosen)};
  return SIMAN_OK;
} catch (const std::bad_alloc&) {
  return SIMAN_NO_MEMORY;
}

siman_status siman_create_quantized(const siman_geometry* geometry, const int8_t* weights, const float* scale,
                                    const float* bias, const float* slope, float x_scale, int32_t x_zero_point,
                                    const siman_pool* pool, const char* variant, siman_conv** conv) try {
  if (!geometry || !conv) return SIMAN_NULL_ARGUMENT;
  const siman::Variant* chosen = nullptr;
  siman_status status = siman::check_quantized_geometry(*geometry);
  if (status == SIMAN_OK && (!weights || !scale || !bias || !slope)) status = SIMAN_NULL_ARGUMENT;
  if (status == SIMAN_OK) status = siman::check_quantized_weights(*geometry, weights);
  if (status == SIMAN_OK) status = siman::check_steps(x_scale, x_zero_point);
  if (status == SIMAN_OK && pool) status = siman::check_pool(*pool);
  if (status == SIMAN_OK) status = choose(variant, &chosen);
  if (status != SIMAN_OK) return status;
  *conv = new siman_conv{std::make_unique<siman::QuantizedConv>(*geometry, weights, scale, bias, slope, x_scale,
                                                                x_zero_point, pool ? *pool : siman::kNoPool, *chosen)};
  return SIMAN_OK;
} catch (const std::bad_alloc&) {
  return SIMAN_NO_MEMORY;
}

void siman_destroy(siman_conv* conv) { delete conv; }

siman_status siman_output_shape(const siman_conv* conv, const int64_t image[4], int64_t output[4]) {
  if (!conv || !image || !output) return SIMAN_NULL_ARGUMENT;
  return conv->conv->output_shape(image, output);
}

siman_status siman_run(const siman_conv* conv, const float* x, const int64_t image[4], const float* residual,
                       int residual_is_full, float* y, siman_parallel_for parallel_for, void* pool) try {
  if (!conv || !image) return SIMAN_NULL_ARGUMENT;
  if (image[0] != 0 && (!x || !residual || !y)) return SIMAN_NULL_ARGUMENT;
  const siman::Run run{x, {image[0], image[1], image[2], image[3]}, residual, residual_is_full != 0, y};
  return conv->conv->run(run, {parallel_for, pool});
} catch (const std::bad_alloc&) {
  return SIMAN_NO_MEMORY;
}

const char* siman_variant(const siman_conv* conv) { return conv ? conv->conv->variant().name : nullptr; }

const char* siman_variant_name(size_t index) {
  return index < variant_count() ? siman::kVariants[index].kernels->name : nullptr;
}

int siman_variant_supported(size_t index) { return index < variant_count() && siman::kVariants[index].supported(); }

siman_status siman_measure_ceiling(const char* variant, double seconds, double* per_second) {
  constexpr int64_t kSteps = 1 << 13;  // well under a millisecond: some runs are not interrupted
  if (!per_second) return SIMAN_NULL_ARGUMENT;
  if (!(seconds > 0 && seconds <= 3600)) return SIMAN_BAD_SECONDS;
  const siman::Variant* chosen = nullptr;
  if (const siman_status status = choose(variant, &chosen); status != SIMAN_OK) return status;
  using Clock = std::chrono::steady_clock;
  const auto count = chosen->matrix.kernel.convolve ? chosen->matrix.count_registers : chosen->binary.count_registers;
  int32_t sink = 0;
  *per_second = 0;
  for (const auto begin = Clock::now(); std::chrono::duration<double>(Clock::now() - begin).count() < seconds;) {
    const auto start = Clock::now();
    const auto products = static_cast<double>(count(kSteps, &sink));
    *per_second = std::max(*per_second, products / std::chrono::duration<double>(Clock::now() - start).count());
  }
  return SIMAN_OK;
}

siman_status siman_signs(const float* x, const float* means, size_t samples, size_t count, const char* variant,
                         float* signs) {
  const siman::Variant* chosen = nullptr;
  if (const siman_status status = choose(variant, &chosen); status != SIMAN_OK) return status;
  if (samples && count && (!x || !means || !signs)) return SIMAN_NULL_ARGUMENT;
  for (size_t i = 0; count && i < samples; ++i)
    chosen->training.signs({x + i * count, nullptr, count, means[i], false, signs + i * count});
  return SIMAN_OK;
}

siman_status siman_sign_backward(const float* x, const float* means, const float* grad_signs, size_t samples,
                                 size_t count, int centred, const char* variant, float* grad_x) {
  const siman::Variant* chosen = nullptr;
  if (const siman_status status = choose(variant, &chosen); status != SIMAN_OK) return status;
  if (samples && count && (!x || !means || !grad_signs || !grad_x)) return SIMAN_NULL_ARGUMENT;
  for (size_t i = 0; count && i < samples; ++i)
    chosen->training.sign_backward(
        {x + i * count, grad_signs + i * count, count, means[i], centred != 0, grad_x + i * count});
  return SIMAN_OK;
}

siman_status siman_binarize(const float* weights, size_t filters, size_t count, const char* variant, float* bits) {
  const siman::Variant* chosen = nullptr;
  if (const siman_status status = choose(variant, &chosen); status != SIMAN_OK) return status;
  if (filters && count && (!weights || !bits)) return SIMAN_NULL_ARGUMENT;
  for (size_t f = 0; count && f < filters; ++f)
    chosen->training.binarize({weights + f * count, nullptr, count, bits + f * count});
  return SIMAN_OK;
}

siman_status siman_binarize_backward(const float* weights, const float* grad_bits, size_t filters, size_t count,
                                     const char* variant, float* grad_weights) {
  const siman::Variant* chosen = nullptr;
  if (const siman_status status = choose(variant, &chosen); status != SIMAN_OK) return status;
  if (filters && count && (!weights || !grad_bits || !grad_weights)) return SIMAN_NULL_ARGUMENT;
  for (size_t f = 0; count && f < filters; ++f)
    chosen->training.binarize_backward({weights + f * count, grad_bits + f * count, count, grad_weights + f * count});
  return SIMAN_OK;
}

siman_status siman_clip(float* weights, size_t filters, size_t count, double percent, const char* variant) try {
  if (!(percent >= 0 && percent < 50)) return SIMAN_BAD_PERCENT;
  const siman::Variant* chosen = nullptr;
  if (const siman_status status = choose(variant, &chosen); status != SIMAN_OK) return status;
  if (!filters || !count) return SIMAN_OK;
  if (!weights) return SIMAN_NULL_ARGUMENT;
  siman::clip(weights, filters, count, percent, chosen->training);
  return SIMAN_OK;
} catch (const std::bad_alloc&) {
  return SIMAN_NO_MEMORY;
}
