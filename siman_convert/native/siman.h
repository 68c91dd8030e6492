/* siman: binary and 8-bit convolutions on a CPU. A plain C interface; nothing here throws, and nothing is kept outside
   a siman_conv.

   Y = siman.BinaryConv2d(X): signs of X against the mean of its sample, times weights of +-1, then scale, bias,
   residual and slope. Y = siman.QuantizedConv2d(X): X in steps, clipped to 8 bits, times weights of 8 bits, then scale,
   bias, slope and a max pool if one is asked for. The meaning of both is written down in
   siman_convert/runtime/reference.py, and the results are the same bit for bit, whatever the variant and the number of
   threads. */
#ifndef SIMAN_H_
#define SIMAN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define SIMAN_API __declspec(dllexport)
#else
#define SIMAN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct siman_conv siman_conv; /* immutable after creation: any number of threads may run it at once */

/* Sizes and attributes of the operator, by its names. pads: top, left, bottom, right; the others: rows, columns. */
typedef struct siman_geometry {
  int64_t filters;
  int64_t kernel[2];
  int64_t channels; /* per group */
  int64_t strides[2];
  int64_t pads[4];
  int64_t dilations[2];
  int64_t group;
  int64_t center; /* 1: compare with the mean of the sample, 0: with zero */
} siman_geometry;

/* A max pool. kernel, strides: rows, columns; pads: top, left, bottom, right, each below its side of the kernel. */
typedef struct siman_pool {
  int64_t kernel[2];
  int64_t strides[2];
  int64_t pads[4];
} siman_pool;

typedef enum siman_status {
  SIMAN_OK = 0,
  SIMAN_NULL_ARGUMENT,
  SIMAN_BAD_FILTERS,
  SIMAN_BAD_KERNEL,
  SIMAN_BAD_CHANNELS,
  SIMAN_BAD_STRIDES,
  SIMAN_BAD_PADS,
  SIMAN_BAD_DILATIONS,
  SIMAN_BAD_GROUP,
  SIMAN_BAD_CENTER,
  SIMAN_TOO_MANY_TAPS,
  SIMAN_BAD_WEIGHT_BYTES,
  SIMAN_PADDING_BITS_SET,
  SIMAN_BAD_IMAGE,
  SIMAN_KERNEL_LARGER_THAN_IMAGE,
  SIMAN_TOO_MANY_ELEMENTS,
  SIMAN_UNKNOWN_VARIANT,
  SIMAN_UNSUPPORTED_VARIANT,
  SIMAN_NOT_PLAIN,
  SIMAN_TOO_MANY_QUANTIZED_TAPS,
  SIMAN_BAD_WEIGHT,
  SIMAN_BAD_X_SCALE,
  SIMAN_BAD_X_ZERO_POINT,
  SIMAN_BAD_POOL,
  SIMAN_POOL_LARGER_THAN_IMAGE,
  SIMAN_BAD_SECONDS,
  SIMAN_BAD_PERCENT,
  SIMAN_NO_MEMORY
} siman_status;

/* One line for people; valid for ever. */
SIMAN_API const char* siman_message(siman_status status);

/* Calls task(context, i) once for each i below count, in any order, on any threads, and returns when all are done. */
typedef void (*siman_task)(void* context, size_t i);
typedef void (*siman_parallel_for)(void* pool, siman_task task, void* context, size_t count);

/* weights: (filters, kernel_h, kernel_w, ceil(channels / 8)) bytes, `weight_bytes` in all, laid out as bits.py says.
   scale, bias, slope: one float for each filter. All are copied. variant: a name from siman_variant_name; null takes
   the environment variable SIMAN_ISA, or where that is unset or empty the first supported one. */
SIMAN_API siman_status siman_create(const siman_geometry* geometry, const uint8_t* weights, size_t weight_bytes,
                                    const float* scale, const float* bias, const float* slope, const char* variant,
                                    siman_conv** conv);

/* The same for siman.QuantizedConv2d. geometry: group 1, dilations 1, center 0. weights: (filters, channels, kernel_h,
   kernel_w), each in -127..127. x_scale, x_zero_point: a step of X, and the 8-bit code of 0. pool: null for none. It
   has no residual: where one is asked for, hand over a single 0. */
SIMAN_API siman_status siman_create_quantized(const siman_geometry* geometry, const int8_t* weights, const float* scale,
                                              const float* bias, const float* slope, float x_scale,
                                              int32_t x_zero_point, const siman_pool* pool, const char* variant,
                                              siman_conv** conv);
SIMAN_API void siman_destroy(siman_conv* conv);

/* image: N, C, H, W of X; output: N, O, Ho, Wo of Y. */
SIMAN_API siman_status siman_output_shape(const siman_conv* conv, const int64_t image[4], int64_t output[4]);

/* residual: as large as Y where residual_is_full, and then it may be y itself, else one float. parallel_for may be
 * null: then all is done here. */
SIMAN_API siman_status siman_run(const siman_conv* conv, const float* x, const int64_t image[4], const float* residual,
                                 int residual_is_full, float* y, siman_parallel_for parallel_for, void* pool);

/* The variant a convolution was created with. */
SIMAN_API const char* siman_variant(const siman_conv* conv);

/* Variants this library holds, the fastest first; null from the first index that has none. */
SIMAN_API const char* siman_variant_name(size_t index);
SIMAN_API int siman_variant_supported(size_t index); /* 1 where this CPU can run it */

/* One-bit multiplications a second that this core reaches with the inner step of a variant on registers alone, the best
   of many short runs in about `seconds`, above 0 and at most 3600: the ceiling of its convolutions. variant: as in
   siman_create. */
SIMAN_API siman_status siman_measure_ceiling(const char* variant, double seconds, double* per_second);

/* Training. Of each of `samples` samples of `count` floats, in any order: signs, +1 where x >= means[i], else -1; and
   the gradient of x, from that of the signs, as kernels/surrogate.inl has it. means: one float for each sample; they
   are x's own where `centred`, else 0. No output may overlap an input. variant: as in siman_create. */
SIMAN_API siman_status siman_signs(const float* x, const float* means, size_t samples, size_t count,
                                   const char* variant, float* signs);
SIMAN_API siman_status siman_sign_backward(const float* x, const float* means, const float* grad_signs, size_t samples,
                                           size_t count, int centred, const char* variant, float* grad_x);

/* Training, of a layer's latent weights: `filters` rows of `count` floats, as siman_convert/binarize.py has it. Bits,
   +1 for the half of a row with the larger magnitudes, else -1; the gradient of the weights from that of the bits; and
   the clip by percentiles of magnitudes, in place, percent in [0, 50). The same bits whatever the variant. No output
   may overlap an input. variant: as in siman_create. */
SIMAN_API siman_status siman_binarize(const float* weights, size_t filters, size_t count, const char* variant,
                                      float* bits);
SIMAN_API siman_status siman_binarize_backward(const float* weights, const float* grad_bits, size_t filters,
                                               size_t count, const char* variant, float* grad_weights);
SIMAN_API siman_status siman_clip(float* weights, size_t filters, size_t count, double percent, const char* variant);

#ifdef __cplusplus
}
#endif

#endif
