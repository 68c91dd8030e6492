// What a host calls of ONNX Runtime's C API, declared by ourselves, beyond what ../ort_abi.h declares for the operator.
//
// The source of every index is `struct OrtApi` in ONNX Runtime's public header onnxruntime_c_api.h, whose members are
// counted from 0 (CreateStatus); of every number, the enumeration named beside it. All of these are in the part of the
// table that has not changed since version 1, and get_api(kApiVersion) answers null where a library is older than we
// ask for.
#pragma once

#include "../ort_abi.h"

namespace siman::ort {

struct Env;
struct Session;
struct RunOptions;
struct MemoryInfo;
struct Allocator;
struct TypeInfo;

enum LoggingLevel { kLogFatal = 4 };          // OrtLoggingLevel
enum AllocatorType { kDeviceAllocator = 0 };  // OrtAllocatorType
enum MemoryType { kDefaultMemory = 0 };       // OrtMemType

inline constexpr Entry<2, const char*(const Status*)> kErrorMessage;
inline constexpr Entry<3, Status*(int, const char*, Env**)> kCreateEnv;
inline constexpr Entry<7, Status*(const Env*, const char*, const SessionOptions*, Session**)> kCreateSession;
inline constexpr Entry<9, Status*(Session*, const RunOptions*, const char* const*, const Value* const*, size_t,
                                  const char* const*, size_t, Value**)>
    kRun;
inline constexpr Entry<10, Status*(SessionOptions**)> kCreateSessionOptions;
inline constexpr Entry<24, Status*(SessionOptions*, int)> kSetThreads;  // SetIntraOpNumThreads
inline constexpr Entry<29, Status*(SessionOptions*, const char*, void**)> kRegisterLibrary;
inline constexpr Entry<30, Status*(const Session*, size_t*)> kSessionInputCount;
inline constexpr Entry<33, Status*(const Session*, size_t, TypeInfo**)> kSessionInputType;
inline constexpr Entry<36, Status*(const Session*, size_t, Allocator*, char**)> kSessionInputName;
inline constexpr Entry<37, Status*(const Session*, size_t, Allocator*, char**)> kSessionOutputName;
inline constexpr Entry<49, Status*(const MemoryInfo*, void*, size_t, const int64_t*, size_t, int, Value**)>
    kCreateTensor;                                                                    // over memory of ours
inline constexpr Entry<55, Status*(const TypeInfo*, const ShapeInfo**)> kTensorInfo;  // null unless a tensor
inline constexpr Entry<64, Status*(const ShapeInfo*, size_t*)> kElementCount;
inline constexpr Entry<69, Status*(int, int, MemoryInfo**)> kCreateCpuMemoryInfo;
inline constexpr Entry<76, Status*(Allocator*, void*)> kAllocatorFree;
inline constexpr Entry<78, Status*(Allocator**)> kDefaultAllocator;  // nobody's to release
inline constexpr Entry<92, void(Env*)> kReleaseEnv;
inline constexpr Entry<94, void(MemoryInfo*)> kReleaseMemoryInfo;
inline constexpr Entry<95, void(Session*)> kReleaseSession;
inline constexpr Entry<96, void(Value*)> kReleaseValue;
inline constexpr Entry<98, void(TypeInfo*)> kReleaseTypeInfo;
inline constexpr Entry<100, void(SessionOptions*)> kReleaseSessionOptions;

}  // namespace siman::ort
