// ONNX Runtime for a C++ host: its library loaded, every status checked, everything it made released.
//
// Loaded, not linked: the symbol in libonnxruntime.so carries its version, which would bind a program to that one.
#pragma once

#include <dlfcn.h>

#include <memory>
#include <string>

#include "ort_host_abi.h"

namespace siman::ort {

enum ExitCode { kRefused = 1, kWrongInput = 2 };  // by ONNX Runtime, by us

struct Failure {
  ExitCode code;
  std::string message;
};

struct Release {
  const Api* api;
  void operator()(Env* p) const { kReleaseEnv(api, p); }
  void operator()(Session* p) const { kReleaseSession(api, p); }
  void operator()(SessionOptions* p) const { kReleaseSessionOptions(api, p); }
  void operator()(MemoryInfo* p) const { kReleaseMemoryInfo(api, p); }
  void operator()(TypeInfo* p) const { kReleaseTypeInfo(api, p); }
  void operator()(ShapeInfo* p) const { kReleaseShapeInfo(api, p); }
  void operator()(Value* p) const { kReleaseValue(api, p); }
  void operator()(Status* p) const { kReleaseStatus(api, p); }
};
template <class T>
using Owned = std::unique_ptr<T, Release>;

// The table of functions of a library that stays loaded to the end.
class Runtime {
 public:
  explicit Runtime(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw Failure{kWrongInput, dlerror()};
    const auto get_base = reinterpret_cast<const ApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    if (!get_base) throw Failure{kWrongInput, path + ": not ONNX Runtime's library, OrtGetApiBase is missing"};
    api_ = get_base()->get_api(kApiVersion);
    if (!api_) throw Failure{kWrongInput, path + ": ONNX Runtime 1.19 or later is needed"};
  }

  template <class Entry, class... Args>
  void call(const Entry& entry, Args... args) const {
    const Owned<Status> status(entry(api_, args...), {api_});
    if (status) throw Failure{kRefused, kErrorMessage(api_, status.get())};
  }

  // What a function returns through its last argument.
  template <class T, class Entry, class... Args>
  T get(const Entry& entry, Args... args) const {
    T value{};
    call(entry, args..., &value);
    return value;
  }

  template <class T, class Entry, class... Args>
  Owned<T> make(const Entry& entry, Args... args) const {
    return {get<T*>(entry, args...), {api_}};
  }

  // The name of the first input or output.
  template <class Entry>
  std::string first_name(const Entry& entry, const Session* session) const {
    auto* allocator = get<Allocator*>(kDefaultAllocator);
    char* text = get<char*>(entry, session, size_t{0}, allocator);
    const std::string name = text;
    call(kAllocatorFree, allocator, text);
    return name;
  }

 private:
  const Api* api_;
};

}  // namespace siman::ort
