// Clipping the latent weights of a layer by percentiles of their magnitudes.
#pragma once

#include "variant.h"

namespace siman {

// Centres each filter, then brings all magnitudes into [P_percent, P_(100-percent)] of the layer: binarize.py has it.
// At least one weight; percent in [0, 50). Throws std::bad_alloc.
void clip(float* weights, size_t filters, size_t count, double percent, const TrainingKernels& kernels);

}  // namespace siman
