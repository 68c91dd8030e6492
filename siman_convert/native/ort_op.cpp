// siman.BinaryConv2d and siman.QuantizedConv2d as custom operators of ONNX Runtime: they read what a node says and call
// the C interface.
#include <memory>
#include <mutex>

#include "ort_node.h"

namespace siman::ort {
namespace {

siman_geometry binary_geometry(const Op& op, const KernelInfo* info, const Dims& w) {
  siman_geometry g{};
  g.channels = read_int(op, info, "channels");
  g.group = read_int(op, info, "group");
  g.center = read_int(op, info, "center");
  read_ints(op, info, "dilations", g.dilations, 2);
  if (g.channels > 0 && w[3] != (g.channels - 1) / 8 + 1) fail(op, siman_message(SIMAN_BAD_WEIGHT_BYTES));
  return g;
}

siman_conv* create_binary(const Op& op, const KernelInfo*, const siman_geometry& geometry, const Weights& weights) {
  size_t bytes = 1;  // no overflow: the tensor exists
  for (int64_t dim : weights.w.dims) bytes *= static_cast<size_t>(dim);
  siman_conv* conv = nullptr;
  check(op, siman_create(&geometry, static_cast<const uint8_t*>(weights.w.data), bytes, weights.scale, weights.bias,
                         weights.slope, nullptr, &conv));
  return conv;
}

siman_geometry quantized_geometry(const Op&, const KernelInfo*, const Dims& w) {
  siman_geometry g{};
  g.channels = w[1];
  g.dilations[0] = g.dilations[1] = g.group = 1;
  return g;
}

siman_conv* create_quantized(const Op& op, const KernelInfo* info, const siman_geometry& geometry,
                             const Weights& weights) {
  const float x_scale = read_float(op, info, "x_scale");
  const int64_t x_zero_point = read_int(op, info, "x_zero_point");
  if (x_zero_point < 0 || x_zero_point > 255) fail(op, siman_message(SIMAN_BAD_X_ZERO_POINT));
  siman_pool pool{{1, 1}, {1, 1}, {0, 0, 0, 0}};
  read_optional_ints(op, info, "pool_kernel", pool.kernel, 2);
  read_optional_ints(op, info, "pool_strides", pool.strides, 2);
  read_optional_ints(op, info, "pool_pads", pool.pads, 4);
  siman_conv* conv = nullptr;
  check(op, siman_create_quantized(&geometry, static_cast<const int8_t*>(weights.w.data), weights.scale, weights.bias,
                                   weights.slope, x_scale, static_cast<int32_t>(x_zero_point), &pool, nullptr, &conv));
  return conv;
}

constexpr Kind kKinds[] = {
    {.name = "BinaryConv2d",
     .inputs = {"X", "W", "scale", "bias", "residual", "slope"},
     .input_count = 6,
     .residual = 4,
     .slope = 5,
     .weight_type = kUint8,
     .weight_shape = "(O, kH, kW, ceil(channels/8))",
     .kernel_axis = 1,
     .dilates = true,
     .pools = false,
     .geometry = binary_geometry,
     .create = create_binary},
    {.name = "QuantizedConv2d",
     .inputs = {"X", "W", "scale", "bias", "slope"},
     .input_count = 5,
     .residual = 0,
     .slope = 4,
     .weight_type = kInt8,
     .weight_shape = "(O, C, kH, kW)",
     .kernel_axis = 2,
     .dilates = false,
     .pools = true,
     .geometry = quantized_geometry,
     .create = create_quantized},
};
constexpr size_t kKindCount = sizeof(kKinds) / sizeof(kKinds[0]);

const Kind& kind_of(const CustomOp* op) { return *static_cast<const Op*>(op)->kind; }

struct Kernel {
  const Op& op;
  siman_conv* conv;

  ~Kernel() { siman_destroy(conv); }
};

Status* create_kernel(const CustomOp* custom, const Api*, const KernelInfo* info, void** out) {
  const Op& op = *static_cast<const Op*>(custom);
  return guarded(op.api, [&] {
    const Kind& kind = *op.kind;
    size_t inputs = 0;
    check(kInputCount(op.api, info, &inputs));
    if (inputs != kind.input_count) fail(op, std::to_string(kind.input_count) + " inputs are needed");
    Weights weights{constant_input(op, info, kW), nullptr, nullptr, nullptr};
    const Dims& w = weights.w.dims;
    if (w.size() != 4) fail(op, std::string("W must be ") + kind.weight_shape);
    siman_geometry geometry = kind.geometry(op, info, w);
    geometry.filters = w[0];
    for (size_t i = 0; i < 2; ++i) geometry.kernel[i] = w[kind.kernel_axis + i];
    read_ints(op, info, "strides", geometry.strides, 2);
    read_ints(op, info, "pads", geometry.pads, 4);
    const auto vector = [&](size_t input) {
      const Tensor read = constant_input(op, info, input);
      if (read.dims != Dims{geometry.filters})
        fail(op, std::string(kind.inputs[input]) + " must be (O,), one float for each filter of W");
      return read.floats();
    };
    weights.scale = vector(kScale);
    weights.bias = vector(kBias);
    weights.slope = vector(kind.slope);
    std::unique_ptr<Kernel> kernel(new Kernel{op, nullptr});  // clang before 16 makes no aggregate by make_unique
    kernel->conv = kind.create(op, info, geometry, weights);
    *out = kernel.release();
  });
}

// The residual's memory may become Y's, where nothing else needs it: two tensors of a layer fit a cache that three do
// not. Called without the operator; ONNX Runtime only reads the numbers, and there is nothing to release.
size_t residual_in_place(int** inputs, int** outputs) {
  static int residual = 4, y = 0;
  *inputs = &residual;
  *outputs = &y;
  return 1;
}

// ONNX Runtime's pool, and what it answered: its loop cannot be left by an exception.
struct Threads {
  const Api* api;
  KernelContext* context;
  Status* status;
};

void parallel_for(void* pool, siman_task task, void* context, size_t count) {
  auto* threads = static_cast<Threads*>(pool);
  if (threads->status) return;
  threads->status = kParallelFor(threads->api, threads->context, task, count, 0, context);
}

Tensor input(const Op& op, KernelContext* context, size_t which) {
  const Value* value = nullptr;
  check(kInput(op.api, context, which, &value));
  if (!value) fail(op, std::string(op.kind->inputs[which]) + " is missing");
  return read_tensor(op, value, which);
}

Status* compute(void* raw, KernelContext* context) {
  const auto* kernel = static_cast<const Kernel*>(raw);
  const Op& op = kernel->op;
  return guarded(op.api, [&] {
    const float zero = 0;
    const Tensor x = input(op, context, kX);
    const Tensor residual = op.kind->residual ? input(op, context, op.kind->residual) : Tensor{{1, 1, 1, 1}, &zero};
    if (x.dims.size() != 4) fail(op, siman_message(SIMAN_BAD_IMAGE));
    Dims shape(4);
    check(op, siman_output_shape(kernel->conv, x.dims.data(), shape.data()));
    const bool is_one = residual.dims == Dims{1, 1, 1, 1}, is_full = residual.dims == shape;
    if (!is_one && !is_full) fail(op, "residual must have the shape of Y, or (1, 1, 1, 1)");
    Value* y = nullptr;
    void* data = nullptr;
    check(kOutput(op.api, context, 0, shape.data(), shape.size(), &y));
    check(kTensorData(op.api, y, &data));
    Threads threads{op.api, context, nullptr};
    check(op, siman_run(kernel->conv, x.floats(), x.dims.data(), residual.floats(), is_full, static_cast<float*>(data),
                        parallel_for, &threads));
    check(threads.status);
  });
}

const CustomOp kRecord = {
    .version = kApiVersion,
    .create_kernel = nullptr,
    .name = [](const CustomOp* op) { return kind_of(op).name; },
    .execution_provider = [](const CustomOp*) -> const char* { return nullptr; },
    .input_type = [](const CustomOp* op, size_t i) -> int { return i == kW ? kind_of(op).weight_type : kFloat; },
    .input_count = [](const CustomOp* op) { return kind_of(op).input_count; },
    .output_type = [](const CustomOp*, size_t) -> int { return kFloat; },
    .output_count = [](const CustomOp*) -> size_t { return 1; },
    .compute = nullptr,
    .destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); },
    .input_characteristic = [](const CustomOp*, size_t) { return 0; },
    .output_characteristic = [](const CustomOp*, size_t) { return 0; },
    .input_memory = [](const CustomOp*, size_t) { return 0; },
    .variadic = {[](const CustomOp*) { return 0; }, [](const CustomOp*) { return 0; },
                 [](const CustomOp*) { return 0; }, [](const CustomOp*) { return 0; }},
    .create_kernel_v2 = create_kernel,
    .compute_v2 = compute,
    .infer_shape = infer_shape,
    .start_version = [](const CustomOp*) { return 1; },
    .end_version = [](const CustomOp*) { return 1; },
    .may_in_place = nullptr,
    .release_in_place = [](int*, int*) {},
    .alias = {},
};

// The operators as one ONNX Runtime knows them.
struct Registered {
  const Api* api;
  Domain* domain;
  const Registered* next;
  Op ops[kKindCount];
};

// Session options and sessions keep pointers to the domain and the operators, so that all live as long as the process.
Domain* domain(const Api* api) {
  static std::mutex mutex;
  static const Registered* first = nullptr;
  const std::lock_guard lock(mutex);
  for (const Registered* known = first; known; known = known->next)
    if (known->api == api) return known->domain;
  auto fresh = std::make_unique<Registered>(Registered{api, nullptr, first, {}});
  check(kCreateDomain(api, "siman", &fresh->domain));
  for (size_t i = 0; i < kKindCount; ++i) {
    fresh->ops[i] = {kRecord, &kKinds[i], api};
    if (kKinds[i].residual) fresh->ops[i].may_in_place = residual_in_place;
    check(kAddToDomain(api, fresh->domain, &fresh->ops[i]));
  }
  first = fresh.release();
  return first->domain;
}

}  // namespace
}  // namespace siman::ort

extern "C" SIMAN_API siman::ort::Status* RegisterCustomOps(siman::ort::SessionOptions* options,
                                                           const siman::ort::ApiBase* base) {
  using namespace siman::ort;
  const Api* api = base->get_api(kApiVersion);
  if (!api) return kCreateStatus(base->get_api(1), kFail, "siman_native needs ONNX Runtime 1.19 or later");
  return guarded(api, [&] { check(kAddDomain(api, options, domain(api))); });
}
