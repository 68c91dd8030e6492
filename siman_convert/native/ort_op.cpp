// siman.BinaryConv2d as a custom operator of ONNX Runtime: reads what a node says and calls the C interface.
//
// Inside, an error of ONNX Runtime or of ours is thrown as a Failure; each callback turns it back into a status.
#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "siman.h"

namespace siman::ort {
namespace {

enum Input { kX, kW, kScale, kBias, kResidual, kSlope, kInputs };
constexpr const char* kInputNames[kInputs] = {"X", "W", "scale", "bias", "residual", "slope"};

struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status) throw Failure{status};
}

[[noreturn]] void fail(const Api* api, const std::string& message) {
  throw Failure{kCreateStatus(api, kInvalidArgument, ("siman.BinaryConv2d: " + message).c_str())};
}

void check(const Api* api, siman_status status) {
  if (status != SIMAN_OK) fail(api, siman_message(status));
}

// Runs a callback's body; whatever it throws becomes the status it returns.
template <class Body>
Status* guarded(const Api* api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (...) {
    return kCreateStatus(api, kFail, "siman.BinaryConv2d: out of memory");
  }
}

using Dims = std::vector<int64_t>;

struct ReleaseShape {
  const Api* api;
  void operator()(ShapeInfo* info) const { kReleaseShapeInfo(api, info); }
};
using ShapePtr = std::unique_ptr<ShapeInfo, ReleaseShape>;

Dims dims_of(const Api* api, const ShapeInfo* info) {
  size_t count = 0;
  check(kDimensionCount(api, info, &count));
  Dims dims(count);
  check(kDimensions(api, info, dims.data(), count));
  return dims;
}

struct Tensor {
  Dims dims;
  const void* data;

  const float* floats() const { return static_cast<const float*>(data); }
};

Tensor read_tensor(const Api* api, const Value* value, Input input) {
  ShapeInfo* raw = nullptr;
  check(kTensorShapeInfo(api, value, &raw));
  const ShapePtr info(raw, {api});
  int type = 0;
  check(kElementType(api, info.get(), &type));
  if (type != (input == kW ? kUint8 : kFloat)) fail(api, std::string(kInputNames[input]) + " has the wrong type");
  void* data = nullptr;
  check(kTensorData(api, const_cast<Value*>(value), &data));
  return {dims_of(api, info.get()), data};
}

Tensor constant_input(const Api* api, const KernelInfo* info, Input input) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(kConstantInput(api, info, input, &is_constant, &value));
  if (!is_constant || !value) fail(api, std::string(kInputNames[input]) + " must be constant");
  return read_tensor(api, value, input);
}

int64_t read_int(const Api* api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  Status* status = kIntAttribute(api, info, name, &value);
  if (!status) return value;
  kReleaseStatus(api, status);
  fail(api, std::string(name) + " must be an integer");
}

template <size_t Count>
void read_ints(const Api* api, const KernelInfo* info, const char* name, int64_t (&out)[Count]) {
  size_t count = 0;
  for (int64_t* values : {static_cast<int64_t*>(nullptr), out}) {  // without room for them it says how many there are
    Status* status = kIntsAttribute(api, info, name, values, &count);
    if (status) kReleaseStatus(api, status);
    if (status || count != Count) fail(api, std::string(name) + " must be " + std::to_string(Count) + " integers");
  }
}

siman_geometry read_geometry(const Api* api, const KernelInfo* info, const Dims& w) {
  siman_geometry g{};
  g.channels = read_int(api, info, "channels");
  g.group = read_int(api, info, "group");
  g.center = read_int(api, info, "center");
  read_ints(api, info, "strides", g.strides);
  read_ints(api, info, "pads", g.pads);
  read_ints(api, info, "dilations", g.dilations);
  if (w.size() != 4) fail(api, "W must be (O, kH, kW, ceil(channels/8))");
  g.filters = w[0];
  g.kernel[0] = w[1];
  g.kernel[1] = w[2];
  if (g.channels > 0 && w[3] != (g.channels - 1) / 8 + 1) fail(api, siman_message(SIMAN_BAD_WEIGHT_BYTES));
  return g;
}

struct Kernel {
  const Api* api;
  siman_conv* conv;

  ~Kernel() { siman_destroy(conv); }
};

Status* create_kernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) {
  return guarded(api, [&] {
    size_t inputs = 0;
    check(kInputCount(api, info, &inputs));
    if (inputs != kInputs) fail(api, "6 inputs are needed");
    const Tensor w = constant_input(api, info, kW);
    const siman_geometry geometry = read_geometry(api, info, w.dims);
    std::array<Tensor, kInputs> vectors;
    for (Input input : {kScale, kBias, kSlope}) {
      vectors[input] = constant_input(api, info, input);
      if (vectors[input].dims != Dims{geometry.filters})
        fail(api, std::string(kInputNames[input]) + " must be (O,), one float for each filter of W");
    }
    size_t bytes = 1;  // no overflow: the tensor exists
    for (int64_t dim : w.dims) bytes *= static_cast<size_t>(dim);
    auto kernel = std::make_unique<Kernel>(api, nullptr);
    check(api, siman_create(&geometry, static_cast<const uint8_t*>(w.data), bytes, vectors[kScale].floats(),
                            vectors[kBias].floats(), vectors[kSlope].floats(), nullptr, &kernel->conv));
    *out = kernel.release();
  });
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

Tensor input(const Api* api, KernelContext* context, Input which) {
  const Value* value = nullptr;
  check(kInput(api, context, which, &value));
  if (!value) fail(api, std::string(kInputNames[which]) + " is missing");
  return read_tensor(api, value, which);
}

Status* compute(void* raw, KernelContext* context) {
  const auto* kernel = static_cast<const Kernel*>(raw);
  const Api* api = kernel->api;
  return guarded(api, [&] {
    const Tensor x = input(api, context, kX), residual = input(api, context, kResidual);
    if (x.dims.size() != 4) fail(api, siman_message(SIMAN_BAD_IMAGE));
    Dims shape(4);
    check(api, siman_output_shape(kernel->conv, x.dims.data(), shape.data()));
    const bool is_one = residual.dims == Dims{1, 1, 1, 1}, is_full = residual.dims == shape;
    if (!is_one && !is_full) fail(api, "residual must have the shape of Y, or (1, 1, 1, 1)");
    Value* y = nullptr;
    void* data = nullptr;
    check(kOutput(api, context, 0, shape.data(), shape.size(), &y));
    check(kTensorData(api, y, &data));
    Threads threads{api, context, nullptr};
    check(api, siman_run(kernel->conv, x.floats(), x.dims.data(), residual.floats(), is_full, static_cast<float*>(data),
                         parallel_for, &threads));
    check(threads.status);
  });
}

// A dimension is a number from 0 on, or negative with a name that may be empty.
struct KnownShape {
  Dims dims;
  std::vector<const char*> names;
};

KnownShape known_shape(const Api* api, const ShapeInfo* info) {
  KnownShape shape{dims_of(api, info), {}};
  shape.names.assign(shape.dims.size(), "");
  check(kSymbolicDimensions(api, info, shape.names.data(), shape.names.size()));
  return shape;
}

std::vector<int64_t> ints_of(const Api* api, const ShapeContext* context, const char* name, size_t count) {
  const Attribute* attribute = nullptr;
  check(kShapeAttribute(api, context, name, &attribute));
  std::vector<int64_t> values(count);
  size_t bytes = 0;
  check(kReadAttribute(api, attribute, kInts, values.data(), count * sizeof(int64_t), &bytes));
  if (bytes != count * sizeof(int64_t))
    fail(api, std::string(name) + " must be " + std::to_string(count) + " integers");
  return values;
}

// Positions along one axis, or -1 where that is not known; nonsense is left for create_kernel to refuse.
int64_t positions(int64_t in, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation) {
  constexpr int64_t kMost = 2147483647;
  for (int64_t value : {in, before, after})
    if (value < 0 || value > kMost) return -1;
  for (int64_t value : {kernel, stride, dilation})
    if (value < 1 || value > kMost) return -1;
  const int64_t room = before + in + after - dilation * (kernel - 1) - 1;
  return room < 0 ? -1 : room / stride + 1;
}

// The operator as one ONNX Runtime knows it. A process may hold several, as where a plug-in brings its own beside
// Python's; the shape callback is handed nothing else that tells them apart.
struct Registered : CustomOp {
  const Api* api;
  Domain* domain;
  const Registered* next;
};

Status* infer_shape(const CustomOp* op, ShapeContext* context) {
  const Api* api = static_cast<const Registered*>(op)->api;
  return guarded(api, [&] {
    ShapeInfo *x_info = nullptr, *w_info = nullptr, *raw_y = nullptr;  // the first two belong to the context
    check(kInputShape(api, context, kX, &x_info));
    check(kInputShape(api, context, kW, &w_info));
    const KnownShape x = known_shape(api, x_info), w = known_shape(api, w_info);
    if (x.dims.size() != 4 || w.dims.size() != 4) return;
    const auto strides = ints_of(api, context, "strides", 2), dilations = ints_of(api, context, "dilations", 2);
    const auto pads = ints_of(api, context, "pads", 4);
    Dims dims{x.dims[0], w.dims[0], -1, -1};
    for (size_t i = 0; i < 2; ++i)
      dims[2 + i] = positions(x.dims[2 + i], w.dims[1 + i], strides[i], pads[i], pads[2 + i], dilations[i]);
    const char* names[] = {x.names[0], w.names[0], "", ""};
    check(kCreateShapeInfo(api, &raw_y));
    const ShapePtr y_info(raw_y, {api});
    check(kSetElementType(api, raw_y, kFloat));
    check(kSetDimensions(api, raw_y, dims.data(), dims.size()));
    check(kSetSymbolicDimensions(api, raw_y, names, dims.size()));
    check(kSetOutputShape(api, context, 0, raw_y));
  });
}

const CustomOp kOp = {
    .version = kApiVersion,
    .create_kernel = nullptr,
    .name = [](const CustomOp*) { return "BinaryConv2d"; },
    .execution_provider = [](const CustomOp*) -> const char* { return nullptr; },
    .input_type = [](const CustomOp*, size_t i) -> int { return i == kW ? kUint8 : kFloat; },
    .input_count = [](const CustomOp*) -> size_t { return kInputs; },
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
    .in_place_and_alias = {},
};

// Session options and sessions keep pointers to the domain and the operator, so that both live as long as the process.
Domain* domain(const Api* api) {
  static std::mutex mutex;
  static const Registered* first = nullptr;
  const std::lock_guard lock(mutex);
  for (const Registered* known = first; known; known = known->next)
    if (known->api == api) return known->domain;
  auto fresh = std::make_unique<Registered>(Registered{kOp, api, nullptr, first});
  check(kCreateDomain(api, "siman", &fresh->domain));
  check(kAddToDomain(api, fresh->domain, fresh.get()));
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
