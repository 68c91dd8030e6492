// What we use of ONNX Runtime's custom-operator C ABI, declared by ourselves: its wheel carries no headers.
// Members are only ever appended there, so indices and offsets hold for every version from kApiVersion on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace siman::ort {

constexpr uint32_t kApiVersion = 19;

struct Api;  // a table of function pointers
struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;  // OrtTensorTypeAndShapeInfo
struct ShapeContext;
struct Attribute;

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3 };
enum AttributeType { kInts = 2 };

// One function of the table: kCall(api, arguments...).
template <size_t Index, class Signature>
struct Entry;
template <size_t Index, class Result, class... Args>
struct Entry<Index, Result(Args...)> {
  Result operator()(const Api* api, Args... args) const {
    return reinterpret_cast<Result (*const*)(Args...)>(api)[Index](args...);
  }
};

inline constexpr Entry<0, Status*(int, const char*)> kCreateStatus;
inline constexpr Entry<26, Status*(const char*, Domain**)> kCreateDomain;
inline constexpr Entry<27, Status*(Domain*, const struct CustomOp*)> kAddToDomain;
inline constexpr Entry<28, Status*(SessionOptions*, Domain*)> kAddDomain;
inline constexpr Entry<51, Status*(Value*, void**)> kTensorData;
inline constexpr Entry<57, Status*(ShapeInfo**)> kCreateShapeInfo;
inline constexpr Entry<58, Status*(ShapeInfo*, int)> kSetElementType;
inline constexpr Entry<59, Status*(ShapeInfo*, const int64_t*, size_t)> kSetDimensions;
inline constexpr Entry<60, Status*(const ShapeInfo*, int*)> kElementType;
inline constexpr Entry<61, Status*(const ShapeInfo*, size_t*)> kDimensionCount;
inline constexpr Entry<62, Status*(const ShapeInfo*, int64_t*, size_t)> kDimensions;
inline constexpr Entry<63, Status*(const ShapeInfo*, const char**, size_t)> kSymbolicDimensions;
inline constexpr Entry<65, Status*(const Value*, ShapeInfo**)> kTensorShapeInfo;
inline constexpr Entry<90, Status*(const KernelContext*, size_t, const Value**)> kInput;
inline constexpr Entry<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)> kOutput;
inline constexpr Entry<93, void(Status*)> kReleaseStatus;
inline constexpr Entry<99, void(ShapeInfo*)> kReleaseShapeInfo;
inline constexpr Entry<85, Status*(const KernelInfo*, const char*, float*)> kFloatAttribute;
inline constexpr Entry<86, Status*(const KernelInfo*, const char*, int64_t*)> kIntAttribute;
inline constexpr Entry<163, Status*(const KernelInfo*, const char*, int64_t*, size_t*)> kIntsAttribute;
inline constexpr Entry<230, Status*(const KernelInfo*, size_t*)> kInputCount;
inline constexpr Entry<249, Status*(const KernelInfo*, size_t, int*, const Value**)> kConstantInput;
inline constexpr Entry<268, Status*(const ShapeContext*, size_t, ShapeInfo**)> kInputShape;
inline constexpr Entry<269, Status*(const ShapeContext*, const char*, const Attribute**)> kShapeAttribute;
inline constexpr Entry<270, Status*(const ShapeContext*, size_t, const ShapeInfo*)> kSetOutputShape;
inline constexpr Entry<271, Status*(ShapeInfo*, const char**, size_t)> kSetSymbolicDimensions;
inline constexpr Entry<272, Status*(const Attribute*, int, void*, size_t, size_t*)> kReadAttribute;
inline constexpr Entry<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)> kParallelFor;

// The record that describes an operator; members we leave null are untyped.
struct CustomOp {
  uint32_t version;
  void* create_kernel;
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void* compute;
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic[4])(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, ShapeContext*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_in_place)(int** inputs, int** outputs);
  void (*release_in_place)(int* inputs, int* outputs);
  void* alias[2];
};
static_assert(offsetof(CustomOp, destroy) == 72 && offsetof(CustomOp, variadic) == 104);
static_assert(offsetof(CustomOp, create_kernel_v2) == 136 && offsetof(CustomOp, infer_shape) == 152);
static_assert(offsetof(CustomOp, may_in_place) == 176 && sizeof(CustomOp) == 208);

}  // namespace siman::ort
