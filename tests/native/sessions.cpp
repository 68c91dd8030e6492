// Sessions come and go on two threads at once: siman_sessions ONNXRUNTIME MODEL KERNELS COUNT. Each thread opens COUNT
// sessions that have the kernels, runs them, and lets go of the kernels' library. All outputs must be equal, bit for
// bit. MODEL has one input, float32 with a free batch.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "examples/ort_host.h"

namespace {

using namespace siman::ort;
using Dims = std::vector<int64_t>;
using Floats = std::vector<float>;

constexpr int64_t kBatch = 3;

Dims input_shape(const Runtime& ort, const Session* session) {
  const auto type = ort.make<TypeInfo>(kSessionInputType, session, size_t{0});
  const auto* info = ort.get<const ShapeInfo*>(kTensorInfo, type.get());
  Dims dims(ort.get<size_t>(kDimensionCount, info));
  ort.call(kDimensions, info, dims.data(), dims.size());
  dims[0] = kBatch;
  return dims;
}

Floats random_floats(const Dims& dims) {
  size_t count = 1;
  for (const int64_t dim : dims) count *= static_cast<size_t>(dim);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = normal(random);
  return values;
}

Floats run(const Runtime& ort, Session* session) {
  const Dims dims = input_shape(ort, session);
  Floats values = random_floats(dims);
  const auto memory = ort.make<MemoryInfo>(kCreateCpuMemoryInfo, kDeviceAllocator, kDefaultMemory);
  const auto x = ort.make<Value>(kCreateTensor, memory.get(), values.data(), values.size() * sizeof(float), dims.data(),
                                 dims.size(), kFloat);
  const std::string x_name = ort.first_name(kSessionInputName, session);
  const std::string y_name = ort.first_name(kSessionOutputName, session);
  const char *x_names[] = {x_name.c_str()}, *y_names[] = {y_name.c_str()};
  const Value* const xs[] = {x.get()};
  const auto y = ort.make<Value>(kRun, session, nullptr, x_names, xs, size_t{1}, y_names, size_t{1});
  const auto info = ort.make<ShapeInfo>(kTensorShapeInfo, y.get());
  const auto* data = static_cast<const float*>(ort.get<void*>(kTensorData, y.get()));
  return {data, data + ort.get<size_t>(kElementCount, info.get())};
}

// Of two runs of one session.
std::vector<Floats> one_session(const Runtime& ort, const Env* env, char** argv) {
  void* kernels = nullptr;
  std::vector<Floats> outputs;
  {
    const auto options = ort.make<SessionOptions>(kCreateSessionOptions);
    ort.call(kSetThreads, options.get(), 2);
    ort.call(kRegisterLibrary, options.get(), argv[3], &kernels);
    const auto session = ort.make<Session>(kCreateSession, env, argv[2], options.get());
    for (int i = 0; i < 2; ++i) outputs.push_back(run(ort, session.get()));
  }
  dlclose(kernels);
  return outputs;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw Failure{kWrongInput, "usage: siman_sessions ONNXRUNTIME MODEL KERNELS COUNT"};
  const Runtime ort(argv[1]);
  const auto env = ort.make<Env>(kCreateEnv, kLogFatal, "sessions");
  const int count = std::atoi(argv[4]);
  std::vector<Floats> outputs[2];
  const auto work = [&](std::vector<Floats>& all) {
    for (int i = 0; i < count; ++i) {
      const auto two = one_session(ort, env.get(), argv);
      all.insert(all.end(), two.begin(), two.end());
    }
  };
  std::thread other([&] { work(outputs[1]); });
  work(outputs[0]);
  other.join();
  for (const auto& all : outputs)
    for (const Floats& output : all)
      if (output.empty() || output != outputs[0][0]) throw Failure{kRefused, "two sessions differ"};
  std::printf("%zu runs of %d sessions: all equal\n", outputs[0].size() + outputs[1].size(), 2 * count);
} catch (const Failure& failure) {
  std::fprintf(stderr, "siman_sessions: %s\n", failure.message.c_str());
  return failure.code;
}
