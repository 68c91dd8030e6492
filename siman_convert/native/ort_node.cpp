#include "ort_node.h"

#include <memory>

namespace siman::ort {

void check(Status* status) {
  if (status) throw Failure{status};
}

void check(const Op& op, siman_status status) {
  if (status != SIMAN_OK) fail(op, siman_message(status));
}

void fail(const Op& op, const std::string& message) {
  const std::string line = std::string("siman.") + op.kind->name + ": " + message;
  throw Failure{kCreateStatus(op.api, kInvalidArgument, line.c_str())};
}

Status* out_of_memory(const Api* api) { return kCreateStatus(api, kFail, "siman: out of memory"); }

namespace {

struct ReleaseShape {
  const Api* api;
  void operator()(ShapeInfo* info) const { kReleaseShapeInfo(api, info); }
};
using ShapePtr = std::unique_ptr<ShapeInfo, ReleaseShape>;

}  // namespace

Dims dims_of(const Api* api, const ShapeInfo* info) {
  size_t count = 0;
  check(kDimensionCount(api, info, &count));
  Dims dims(count);
  check(kDimensions(api, info, dims.data(), count));
  return dims;
}

Tensor read_tensor(const Op& op, const Value* value, size_t input) {
  ShapeInfo* raw = nullptr;
  check(kTensorShapeInfo(op.api, value, &raw));
  const ShapePtr info(raw, {op.api});
  int type = 0;
  check(kElementType(op.api, info.get(), &type));
  if (type != (input == kW ? op.kind->weight_type : kFloat))
    fail(op, std::string(op.kind->inputs[input]) + " has the wrong type");
  void* data = nullptr;
  check(kTensorData(op.api, const_cast<Value*>(value), &data));
  return {dims_of(op.api, info.get()), data};
}

Tensor constant_input(const Op& op, const KernelInfo* info, size_t input) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(kConstantInput(op.api, info, input, &is_constant, &value));
  if (!is_constant || !value) fail(op, std::string(op.kind->inputs[input]) + " must be constant");
  return read_tensor(op, value, input);
}

int64_t read_int(const Op& op, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  Status* status = kIntAttribute(op.api, info, name, &value);
  if (!status) return value;
  kReleaseStatus(op.api, status);
  fail(op, std::string(name) + " must be an integer");
}

float read_float(const Op& op, const KernelInfo* info, const char* name) {
  float value = 0;
  Status* status = kFloatAttribute(op.api, info, name, &value);
  if (!status) return value;
  kReleaseStatus(op.api, status);
  fail(op, std::string(name) + " must be a float");
}

void read_ints(const Op& op, const KernelInfo* info, const char* name, int64_t* out, size_t count) {
  size_t found = 0;
  for (int64_t* values : {static_cast<int64_t*>(nullptr), out}) {  // without room for them it says how many there are
    Status* status = kIntsAttribute(op.api, info, name, values, &found);
    if (status) kReleaseStatus(op.api, status);
    if (status || found != count) fail(op, std::string(name) + " must be " + std::to_string(count) + " integers");
  }
}

void read_optional_ints(const Op& op, const KernelInfo* info, const char* name, int64_t* out, size_t count) {
  size_t found = 0;
  if (Status* status = kIntsAttribute(op.api, info, name, nullptr, &found)) return kReleaseStatus(op.api, status);
  read_ints(op, info, name, out, count);
}

namespace {

// A dimension is a number from 0 on, or negative with a name that may be empty.
struct KnownShape {
  Dims dims;
  std::vector<const char*> names;
};

KnownShape known_shape(const Op& op, const ShapeContext* context, Input input) {
  ShapeInfo* info = nullptr;  // belongs to the context
  check(kInputShape(op.api, context, input, &info));
  KnownShape shape{dims_of(op.api, info), {}};
  shape.names.assign(shape.dims.size(), "");
  check(kSymbolicDimensions(op.api, info, shape.names.data(), shape.names.size()));
  return shape;
}

Dims ints_of(const Op& op, const Attribute* attribute, const char* name, size_t count) {
  Dims values(count);
  size_t bytes = 0;
  Status* status = kReadAttribute(op.api, attribute, kInts, values.data(), count * sizeof(int64_t), &bytes);
  if (status) kReleaseStatus(op.api, status);
  if (status || bytes != count * sizeof(int64_t))
    fail(op, std::string(name) + " must be " + std::to_string(count) + " integers");
  return values;
}

Dims ints_of(const Op& op, const ShapeContext* context, const char* name, size_t count) {
  const Attribute* attribute = nullptr;
  check(kShapeAttribute(op.api, context, name, &attribute));
  return ints_of(op, attribute, name, count);
}

// `otherwise` where the attribute is left out.
Dims ints_or(const Op& op, const ShapeContext* context, const char* name, const Dims& otherwise) {
  const Attribute* attribute = nullptr;
  Status* status = kShapeAttribute(op.api, context, name, &attribute);
  if (!status) return ints_of(op, attribute, name, otherwise.size());
  kReleaseStatus(op.api, status);
  return otherwise;
}

// Positions along one axis, or -1 where that is not known; nonsense is left for the creation of the kernel to refuse.
int64_t positions(int64_t in, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation) {
  constexpr int64_t kMost = 2147483647;
  for (int64_t value : {in, before, after})
    if (value < 0 || value > kMost) return -1;
  for (int64_t value : {kernel, stride, dilation})
    if (value < 1 || value > kMost) return -1;
  const int64_t room = before + in + after - dilation * (kernel - 1) - 1;
  return room < 0 ? -1 : room / stride + 1;
}

void set_output_shape(const Op& op, ShapeContext* context, const Dims& dims, const char* batch, const char* filters) {
  ShapeInfo* raw = nullptr;
  check(kCreateShapeInfo(op.api, &raw));
  const ShapePtr info(raw, {op.api});
  const char* names[] = {batch, filters, "", ""};
  check(kSetElementType(op.api, raw, kFloat));
  check(kSetDimensions(op.api, raw, dims.data(), dims.size()));
  check(kSetSymbolicDimensions(op.api, raw, names, dims.size()));
  check(kSetOutputShape(op.api, context, 0, raw));
}

}  // namespace

Status* infer_shape(const CustomOp* custom, ShapeContext* context) {
  const Op& op = *static_cast<const Op*>(custom);
  return guarded(op.api, [&] {
    const auto pool = [&](const char* name, const Dims& none) {
      return op.kind->pools ? ints_or(op, context, name, none) : none;
    };
    const Dims sides = pool("pool_kernel", {1, 1}), steps = pool("pool_strides", {1, 1});
    const Dims beside = pool("pool_pads", {0, 0, 0, 0});
    const KnownShape x = known_shape(op, context, kX), w = known_shape(op, context, kW);
    if (x.dims.size() != 4 || w.dims.size() != 4) return;
    const auto strides = ints_of(op, context, "strides", 2), pads = ints_of(op, context, "pads", 4);
    const auto dilations = op.kind->dilates ? ints_of(op, context, "dilations", 2) : Dims{1, 1};
    Dims dims{x.dims[0], w.dims[0], -1, -1};
    for (size_t i = 0; i < 2; ++i) {
      const int64_t convolved =
          positions(x.dims[2 + i], w.dims[op.kind->kernel_axis + i], strides[i], pads[i], pads[2 + i], dilations[i]);
      dims[2 + i] = positions(convolved, sides[i], steps[i], beside[i], beside[2 + i], 1);
    }
    set_output_shape(op, context, dims, x.names[0], w.names[0]);
  });
}

}  // namespace siman::ort
