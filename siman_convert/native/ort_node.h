// What our operators share as custom operators of ONNX Runtime: errors, and what is read from a node. ort_op.cpp says
// what each of them is.
//
// Inside, an error of ONNX Runtime or of ours is thrown as a Failure; each callback turns it back into a status.
#pragma once

#include <string>
#include <vector>

#include "ort_abi.h"
#include "siman.h"

namespace siman::ort {

using Dims = std::vector<int64_t>;

struct Tensor {
  Dims dims;
  const void* data;

  const float* floats() const { return static_cast<const float*>(data); }
};

// What is constant in a node. Each of scale, bias and slope has one float for each filter.
struct Weights {
  Tensor w;
  const float *scale, *bias, *slope;
};

struct Op;

// One of our operators. Its inputs begin with X, W, scale and bias; those but W are floats.
struct Kind {
  const char* name;
  const char* inputs[6];
  size_t input_count;
  size_t residual, slope;  // which inputs they are; residual: 0 where there is none
  ElementType weight_type;
  const char* weight_shape;
  size_t kernel_axis;   // of W: the rows of the kernel, then its columns
  bool dilates, pools;  // by attributes; those of the pool may be left out
  siman_geometry (*geometry)(const Op& op, const KernelInfo* info, const Dims& w);
  siman_conv* (*create)(const Op& op, const KernelInfo* info, const siman_geometry& geometry, const Weights& weights);
};

enum Input { kX, kW, kScale, kBias };

// A kind as one ONNX Runtime knows it. A process may hold several, as where a plug-in brings its own beside Python's;
// the shape callback is handed nothing else that tells them apart.
struct Op : CustomOp {
  const Kind* kind;
  const Api* api;
};

struct Failure {
  Status* status;
};

void check(Status* status);
void check(const Op& op, siman_status status);
[[noreturn]] void fail(const Op& op, const std::string& message);
Status* out_of_memory(const Api* api);

// Runs a callback's body; whatever it throws becomes the status it returns.
template <class Body>
Status* guarded(const Api* api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (...) {
    return out_of_memory(api);
  }
}

Dims dims_of(const Api* api, const ShapeInfo* info);
Tensor read_tensor(const Op& op, const Value* value, size_t input);
Tensor constant_input(const Op& op, const KernelInfo* info, size_t input);
int64_t read_int(const Op& op, const KernelInfo* info, const char* name);
float read_float(const Op& op, const KernelInfo* info, const char* name);
void read_ints(const Op& op, const KernelInfo* info, const char* name, int64_t* out, size_t count);
// Leaves `out` as it is where the attribute is left out. One of another type looks the same here: infer_shape refuses
// it.
void read_optional_ints(const Op& op, const KernelInfo* info, const char* name, int64_t* out, size_t count);

// The callback that tells ONNX Runtime the shape of Y.
Status* infer_shape(const CustomOp* op, ShapeContext* context);

}  // namespace siman::ort
