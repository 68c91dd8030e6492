// Any bytes as a convolution for the C interface, and as a node for the operators in an ONNX Runtime that is played
// here: nothing may crash, and every variant this processor has must agree, bit for bit.
//
// What is refused has to be refused before it is computed; what is not is kept small, so that its arrays are real.
#include <fuzzer/FuzzedDataProvider.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "siman.h"

extern "C" siman::ort::Status* RegisterCustomOps(siman::ort::SessionOptions*, const siman::ort::ApiBase*);

namespace {

using Ints = std::vector<int64_t>;
using Provider = FuzzedDataProvider;

constexpr int64_t kSmall = 1 << 12;  // elements of an array that is made
constexpr int64_t kOdd[] = {INT64_MIN,       -1,        0,        1, 2, 3, 5, 8, 255, 256, 518, 1 << 16,
                            (1ll << 31) - 1, 1ll << 31, INT64_MAX};
constexpr float kOddFloats[] = {0, -0.0f, 1, -1, 0.5f, 1e-45f, 3e38f, INFINITY, -INFINITY, NAN};

void require(bool holds) {
  if (!holds) std::abort();
}

int64_t number(Provider& p) {
  return p.ConsumeBool() ? p.ConsumeIntegralInRange<int64_t>(0, 9) : p.PickValueInArray(kOdd);
}

Ints numbers(Provider& p, size_t count) {
  Ints values(count);
  for (int64_t& value : values) value = number(p);
  return values;
}

// Elements, or -1 where one is negative or they are too many to be made.
int64_t elements(const Ints& dims) {
  int64_t count = 1;
  for (const int64_t dim : dims) {
    if (dim < 0 || dim > kSmall || (count *= dim) > kSmall) return -1;
  }
  return count;
}

std::vector<float> floats(Provider& p, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values)
    value = p.ConsumeBool() ? static_cast<float>(p.ConsumeIntegral<int8_t>()) / 16 : p.PickValueInArray(kOddFloats);
  return values;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::isnan(a[i]) && std::isnan(b[i])) && std::memcmp(&a[i], &b[i], sizeof(float))) return false;
  return a.size() == b.size();
}

void backwards(void*, siman_task task, void* context, size_t count) {
  while (count) task(context, --count);
}

// The C interface

// Whether this convolution of this image is done in a moment: outputs, before a pool too, times taps.
bool is_small(const siman_geometry& g, const int64_t* image) {
  double work = static_cast<double>(g.filters) * static_cast<double>(g.channels);
  for (int i = 0; i < 2; ++i) {
    const double padded = static_cast<double>(image[2 + i]) + static_cast<double>(g.pads[i] + g.pads[i + 2]);
    work *= (padded / static_cast<double>(g.strides[i]) + 1) * static_cast<double>(g.kernel[i]);
  }
  return work * static_cast<double>(image[0]) < 1 << 20;
}

void run_all(const std::vector<siman_conv*>& convs, const siman_geometry& g, Provider& p) {
  const Ints image = p.ConsumeBool()
                         ? Ints{p.ConsumeIntegralInRange<int64_t>(0, 3), g.channels * g.group,
                                p.ConsumeIntegralInRange<int64_t>(0, 12), p.ConsumeIntegralInRange<int64_t>(0, 12)}
                         : numbers(p, 4);
  int64_t output[4];
  if (siman_output_shape(convs[0], image.data(), output) != SIMAN_OK || !is_small(g, image.data())) return;
  const Ints shape(output, output + 4);
  const int64_t x_count = elements(image), y_count = elements(shape);
  if (x_count < 0 || y_count < 0) return;
  const bool full = p.ConsumeBool();
  const auto x = floats(p, x_count), residual = floats(p, full ? y_count : 1);
  std::vector<float> first;
  for (siman_conv* conv : convs) {
    std::vector<float> y(static_cast<size_t>(y_count), 12345);
    const auto parallel = conv == convs[0] ? nullptr : backwards;
    require(siman_run(conv, x.data(), image.data(), residual.data(), full, y.data(), parallel, nullptr) == SIMAN_OK);
    if (conv == convs[0]) first = y;
    require(same(first, y));
  }
}

void c_interface(Provider& p, bool quantized) {
  siman_geometry g{};
  int64_t* fields[] = {&g.filters,      &g.kernel[0],    &g.kernel[1], &g.channels, &g.strides[0],
                       &g.strides[1],   &g.pads[0],      &g.pads[1],   &g.pads[2],  &g.pads[3],
                       &g.dilations[0], &g.dilations[1], &g.group,     &g.center};
  for (int64_t* field : fields) *field = number(p);
  if (quantized && p.ConsumeBool()) g.dilations[0] = g.dilations[1] = g.group = 1, g.center = 0;
  siman_pool pool{};
  int64_t* sides[] = {&pool.kernel[0], &pool.kernel[1], &pool.strides[0], &pool.strides[1],
                      &pool.pads[0],   &pool.pads[1],   &pool.pads[2],    &pool.pads[3]};
  const bool pools = quantized && p.ConsumeBool();
  for (int64_t* side : sides) *side = pools ? number(p) : 0;
  const int64_t filters = elements({g.filters}), bytes = g.channels > 0 ? (g.channels - 1) / 8 + 1 : 0;
  int64_t count = elements({g.filters, g.kernel[0], g.kernel[1], quantized ? g.channels : bytes});
  if (quantized && count < 0) return;  // who calls has so many weights
  auto weights = p.ConsumeBytes<uint8_t>(static_cast<size_t>(count < 0 ? 64 : count));
  weights.resize(static_cast<size_t>(count < 0 ? 64 : count));
  if (filters < 0) return;
  const auto scale = floats(p, filters), bias = floats(p, filters), slope = floats(p, filters);
  const float x_scale = p.ConsumeBool() ? 0.5f : p.PickValueInArray(kOddFloats);
  const auto zero_point = static_cast<int32_t>(number(p));
  std::vector<siman_conv*> convs;
  siman_status first = SIMAN_OK;
  for (size_t v = 0; siman_variant_name(v); ++v) {
    if (!siman_variant_supported(v)) continue;
    const char* name = siman_variant_name(v);
    siman_conv* conv = nullptr;
    const auto* signed_weights = reinterpret_cast<const int8_t*>(weights.data());
    const siman_status status =
        quantized
            ? siman_create_quantized(&g, signed_weights, scale.data(), bias.data(), slope.data(), x_scale, zero_point,
                                     pools ? &pool : nullptr, name, &conv)
            : siman_create(&g, weights.data(), weights.size(), scale.data(), bias.data(), slope.data(), name, &conv);
    require((status == SIMAN_OK) == (conv != nullptr) && std::strlen(siman_message(status)));
    if (conv) convs.push_back(conv);
    require(convs.empty() ? status != SIMAN_OK : status == SIMAN_OK);
    first = status;
  }
  if (first == SIMAN_OK) run_all(convs, g, p);
  for (siman_conv* conv : convs) siman_destroy(conv);
}

// The operators, in an ONNX Runtime of these few records: an object is a pointer to one.

struct AnAttribute {
  int kind;  // 0 an integer, 1 a float, 2 integers
  Ints ints;
  float number;
};

struct ATensor {
  Ints dims;
  int type;
  bool is_constant;
  std::vector<uint8_t> data;
};

struct ANode {
  std::map<std::string, AnAttribute> attributes;
  std::vector<ATensor> inputs;
  ATensor output;
};

struct AShape {
  Ints dims;
  int type;
};

int live_shapes = 0, live_statuses = 0;
siman::ort::CustomOp* operators[2];
size_t operator_count = 0;

template <class To, class From>
To* as(From* from) {
  return reinterpret_cast<To*>(const_cast<std::remove_const_t<From>*>(from));
}

using siman::ort::Status;
Status* failed() { return ++live_statuses, as<Status>(new char[8]); }
Status* create_status(int, const char* message) { return require(std::strlen(message)), failed(); }
void release_status(Status* status) { --live_statuses, delete[] as<char>(status); }
Status* create_domain(const char*, void** domain) { return *domain = &operators, nullptr; }
Status* add_to_domain(void*, siman::ort::CustomOp* op) { return operators[operator_count++] = op, nullptr; }
Status* add_domain(void*, void*) { return nullptr; }
Status* tensor_data(ATensor* t, void** data) { return *data = t->data.data(), nullptr; }
Status* new_shape(AShape** shape) { return ++live_shapes, *shape = new AShape{}, nullptr; }
void release_shape(AShape* shape) { --live_shapes, delete shape; }
Status* set_type(AShape* shape, int type) { return shape->type = type, nullptr; }
Status* set_dims(AShape* shape, const int64_t* dims, size_t n) { return shape->dims.assign(dims, dims + n), nullptr; }
Status* get_type(const AShape* shape, int* type) { return *type = shape->type, nullptr; }
Status* dim_count(const AShape* shape, size_t* n) { return *n = shape->dims.size(), nullptr; }
Status* get_dims(const AShape* shape, int64_t* dims, size_t n) {
  return std::copy_n(shape->dims.begin(), std::min(n, shape->dims.size()), dims), nullptr;
}
Status* get_names(const AShape*, const char** names, size_t n) { return std::fill_n(names, n, "N"), nullptr; }
Status* set_names(AShape*, const char** names, size_t n) {
  for (size_t i = 0; i < n; ++i) require(std::strlen(names[i]) < 9);
  return nullptr;
}
Status* tensor_shape(const ATensor* t, AShape** shape) {
  return ++live_shapes, *shape = new AShape{t->dims, t->type}, nullptr;
}
Status* run_input(ANode* node, size_t i, ATensor** value) {
  return *value = i < node->inputs.size() ? &node->inputs[i] : nullptr, nullptr;
}
Status* run_output(ANode* node, size_t, const int64_t* dims, size_t n, ATensor** value) {
  const int64_t count = elements({dims, dims + n});
  if (count < 0) return failed();
  node->output = {{dims, dims + n}, 1, false, std::vector<uint8_t>(static_cast<size_t>(count) * sizeof(float))};
  return *value = &node->output, nullptr;
}
const AnAttribute* find(const ANode* node, const char* name, int kind) {
  const auto found = node->attributes.find(name);
  return found == node->attributes.end() || (kind >= 0 && found->second.kind != kind) ? nullptr : &found->second;
}
Status* float_attribute(const ANode* node, const char* name, float* value) {
  const AnAttribute* found = find(node, name, 1);
  return found ? (*value = found->number, nullptr) : failed();
}
Status* int_attribute(const ANode* node, const char* name, int64_t* value) {
  const AnAttribute* found = find(node, name, 0);
  return found ? (*value = found->ints[0], nullptr) : failed();
}
Status* ints_attribute(const ANode* node, const char* name, int64_t* values, size_t* n) {
  const AnAttribute* found = find(node, name, 2);
  if (!found) return failed();
  if (values && *n < found->ints.size()) return failed();
  if (values) std::copy(found->ints.begin(), found->ints.end(), values);
  return *n = found->ints.size(), nullptr;
}
Status* input_count(const ANode* node, size_t* n) { return *n = node->inputs.size(), nullptr; }
Status* constant_input(const ANode* node, size_t i, int* is_constant, const ATensor** value) {
  *is_constant = i < node->inputs.size() && node->inputs[i].is_constant;
  return *value = *is_constant ? &node->inputs[i] : nullptr, nullptr;
}
Status* input_shape(ANode* node, size_t i, AShape** shape) {
  static AShape held;  // belongs to the context
  if (i >= node->inputs.size()) return failed();
  return held = {node->inputs[i].dims, node->inputs[i].type}, *shape = &held, nullptr;
}
Status* shape_attribute(const ANode* node, const char* name, const AnAttribute** value) {
  return (*value = find(node, name, -1)) ? nullptr : failed();
}
Status* read_attribute(const AnAttribute* attribute, int, void* out, size_t bytes, size_t* found) {
  *found = attribute->ints.size() * sizeof(int64_t);
  if (attribute->kind != 2 || bytes < *found) return failed();
  return *found ? (std::memcpy(out, attribute->ints.data(), *found), nullptr) : nullptr;
}
Status* output_shape(const ANode*, size_t, const AShape* shape) { return require(shape->dims.size() == 4), nullptr; }
Status* run_parallel(const ANode*, siman_task task, size_t count, size_t, void* context) {
  return backwards(nullptr, task, context, count), nullptr;
}

const siman::ort::Api* runtime() {
  static void* table[400];
  const auto set = [](size_t index, auto* function) { table[index] = reinterpret_cast<void*>(function); };
  if (!table[0]) {
    set(0, create_status), set(26, create_domain), set(27, add_to_domain), set(28, add_domain), set(51, tensor_data);
    set(57, new_shape), set(58, set_type), set(59, set_dims), set(60, get_type), set(61, dim_count), set(62, get_dims);
    set(63, get_names), set(65, tensor_shape), set(85, float_attribute), set(86, int_attribute), set(90, run_input);
    set(91, run_output), set(93, release_status), set(99, release_shape), set(163, ints_attribute),
        set(230, input_count);
    set(249, constant_input), set(268, input_shape), set(269, shape_attribute), set(270, output_shape);
    set(271, set_names), set(272, read_attribute), set(274, run_parallel);
  }
  return as<const siman::ort::Api>(table);
}

ATensor tensor(Provider& p, const Ints& dims, int type) {
  ATensor made{dims, p.ConsumeIntegralInRange<int>(0, 15) ? type : p.ConsumeIntegralInRange<int>(1, 3), true, {}};
  made.is_constant = p.ConsumeIntegralInRange<int>(0, 15) != 0;
  if (made.dims.size() > 4) made.dims.resize(4);
  if (elements(made.dims) < 0) made.dims.assign(made.dims.size(), 1);
  const auto count = static_cast<size_t>(elements(made.dims));
  if (made.type == 1) {
    const auto values = floats(p, static_cast<int64_t>(count));
    made.data.resize(count * sizeof(float));
    if (count) std::memcpy(made.data.data(), values.data(), made.data.size());
  } else {
    made.data = p.ConsumeBytes<uint8_t>(count);
    made.data.resize(count);
  }
  return made;
}

Ints dims_near(Provider& p, const Ints& right) {
  if (p.ConsumeIntegralInRange<int>(0, 7)) return right;
  return numbers(p, p.ConsumeIntegralInRange<size_t>(0, 5));
}

ANode node_of(Provider& p, bool quantized) {
  ANode node;
  const auto small = [&] { return p.ConsumeIntegralInRange<int64_t>(1, 5); };
  const int64_t filters = small(), channels = p.ConsumeIntegralInRange<int64_t>(1, 20), h = small(), w = small();
  for (const char* name : {"strides", "dilations", "pool_kernel", "pool_strides", "pads", "pool_pads"}) {
    const bool four = !std::strcmp(name, "pads") || !std::strcmp(name, "pool_pads");
    const int what = p.ConsumeIntegralInRange<int>(0, 15);
    if (what == 0) continue;
    Ints values = numbers(p, what == 1 ? p.ConsumeIntegralInRange<size_t>(0, 6) : four ? 4 : 2);
    node.attributes[name] = {what == 2 ? 0 : 2, what == 2 && values.empty() ? Ints{1} : values, 0.5f};
  }
  for (const char* name : {"channels", "group", "center", "x_zero_point"}) {
    const int64_t right = !std::strcmp(name, "channels") ? channels
                          : !std::strcmp(name, "center") ? p.ConsumeBool()
                                                         : 1;
    const int what = p.ConsumeIntegralInRange<int>(0, 15);
    if (what) node.attributes[name] = {what == 1, {what == 2 ? number(p) : right}, 0.5f};
  }
  node.attributes["x_scale"] = {1, {1}, p.ConsumeBool() ? 0.5f : p.PickValueInArray(kOddFloats)};
  const Ints weights = quantized ? Ints{filters, channels, h, w} : Ints{filters, h, w, (channels - 1) / 8 + 1};
  const Ints image{p.ConsumeIntegralInRange<int64_t>(0, 2), channels, p.ConsumeIntegralInRange<int64_t>(1, 9),
                   p.ConsumeIntegralInRange<int64_t>(1, 9)};
  node.inputs = {tensor(p, dims_near(p, image), 1), tensor(p, dims_near(p, weights), quantized ? 3 : 2)};
  for (size_t i = 0; i < (quantized ? 3 : 4); ++i)
    node.inputs.push_back(tensor(p, dims_near(p, !quantized && i == 2 ? Ints{1, 1, 1, 1} : Ints{filters}), 1));
  if (!p.ConsumeIntegralInRange<int>(0, 15)) node.inputs.resize(p.ConsumeIntegralInRange<size_t>(0, 6), node.inputs[0]);
  return node;
}

// Whether a run of the node is done in a moment; what is wrong with it is for the operator to say.
bool is_small(const ANode& node) {
  int64_t beside = 0;
  for (const char* name : {"pads", "pool_pads"})
    if (const auto* found = find(&node, name, 2))
      for (const int64_t pad : found->ints) beside = std::max(beside, pad);
  return beside < 64;
}

void operators_of(Provider& p, bool quantized) {
  static const siman::ort::ApiBase base{[](uint32_t) { return runtime(); }, nullptr};
  if (!operator_count) require(!RegisterCustomOps(nullptr, &base) && operator_count == 2);
  const siman::ort::CustomOp* op = operators[quantized];
  ANode node = node_of(p, quantized);
  if (Status* status = op->infer_shape(op, as<siman::ort::ShapeContext>(&node))) release_status(status);
  void* kernel = nullptr;
  if (Status* status = op->create_kernel_v2(op, runtime(), as<siman::ort::KernelInfo>(&node), &kernel)) {
    release_status(status);
    require(!kernel);
  } else {
    require(kernel);
    if (is_small(node))
      if (Status* refused = op->compute_v2(kernel, as<siman::ort::KernelContext>(&node))) release_status(refused);
    op->destroy(kernel);
  }
  require(live_shapes == 0 && live_statuses == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Provider p(data, size);
  const bool quantized = p.ConsumeBool();
  p.ConsumeBool() ? c_interface(p, quantized) : operators_of(p, quantized);
  return 0;
}
