// Classifies one image with an exported model.onnx: a host of ONNX Runtime in C++, without its headers.
//
//   g++ -std=c++20 -O2 classify.cpp -o classify -ldl
//   ./classify ONNXRUNTIME MODEL IMAGE [KERNELS [THREADS]]
//
// ONNXRUNTIME  its shared object: libonnxruntime.so of a release, or onnxruntime/capi/libonnxruntime.so.* of pip's
// IMAGE        for a model that takes pixels (uint8 N,H,W,C): a binary PPM or PGM file; else raw float32 numbers
//              C,H,W, normalised as the model's metadata say
// KERNELS      libsiman_native.so; without it the binary convolutions run as ordinary ones
// THREADS      of ONNX Runtime's pool; 0 or nothing: as it likes
//
// Prints class and logit of the five best. Exits with 2 for wrong usage or an image that does not fit, with 1 where
// ONNX Runtime refuses; one line on stderr says why.
#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "ort_host.h"

namespace {

using namespace siman::ort;
using Dims = std::vector<int64_t>;

[[noreturn]] void fail(const std::string& message) { throw Failure{kWrongInput, message}; }

Owned<Session> open_session(const Runtime& ort, const Env* env, const char* model, const char* kernels, int threads) {
  const auto options = ort.make<SessionOptions>(kCreateSessionOptions);
  ort.call(kSetThreads, options.get(), threads);
  if (kernels) ort.get<void*>(kRegisterLibrary, options.get(), kernels);  // as ONNX Runtime, loaded to the end
  return ort.make<Session>(kCreateSession, env, model, options.get());
}

struct TensorType {
  int element;
  Dims dims;  // -1: free
};

TensorType type_of(const Runtime& ort, const ShapeInfo* info) {
  TensorType type{ort.get<int>(kElementType, info), Dims(ort.get<size_t>(kDimensionCount, info))};
  ort.call(kDimensions, info, type.dims.data(), type.dims.size());
  return type;
}

// One image a run: a free batch becomes 1.
TensorType input_of(const Runtime& ort, const Session* session) {
  const auto count = ort.get<size_t>(kSessionInputCount, session);
  if (count != 1) fail("the model has " + std::to_string(count) + " inputs, not one");
  const auto owner = ort.make<TypeInfo>(kSessionInputType, session, size_t{0});
  const auto* info = ort.get<const ShapeInfo*>(kTensorInfo, owner.get());
  TensorType type = info ? type_of(ort, info) : TensorType{};
  if (type.dims.size() != 4 || std::abs(type.dims[0]) != 1 || (type.element != kFloat && type.element != kUint8))
    fail("the model does not take one image, float32 (1, C, H, W) or uint8 (1, H, W, C)");
  type.dims[0] = 1;
  return type;
}

std::string text_of(const Dims& dims) {
  std::string text;
  for (const int64_t dim : dims) text += (text.empty() ? "" : "x") + (dim < 0 ? "?" : std::to_string(dim));
  return text;
}

struct Image {
  Dims dims;
  std::string bytes;
};

// Binary PPM and PGM: "P6" or "P5", then width, height and 255, with white space and # comments between, one space,
// pixels.
Image parse_pixels(const std::string& file) {
  size_t at = 2;
  int64_t header[3] = {};
  if (!file.starts_with("P6") && !file.starts_with("P5")) fail("IMAGE is not a binary PPM or PGM file");
  for (int64_t& number : header) {
    while (at < file.size() && (std::isspace(static_cast<unsigned char>(file[at])) || file[at] == '#'))
      at = file[at] == '#' ? std::min(file.find('\n', at), file.size()) : at + 1;
    const auto [end, error] = std::from_chars(file.data() + at, file.data() + file.size(), number);
    if (error != std::errc() || number < 1 || number > 65535) fail("IMAGE has a damaged header");
    at = static_cast<size_t>(end - file.data());
  }
  if (header[2] != 255) fail("IMAGE must have 8 bits a value");
  return {{1, header[1], header[0], file[1] == '6' ? 3 : 1}, file.substr(std::min(at + 1, file.size()))};
}

std::string read_file(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) fail(std::string(path) + ": " + std::strerror(errno));
  return {std::istreambuf_iterator<char>(stream), {}};
}

Image read_image(const char* path, const TensorType& wanted) {
  const bool is_float = wanted.element == kFloat;
  std::string file = read_file(path);
  Image image = is_float ? Image{wanted.dims, std::move(file)} : parse_pixels(file);
  const auto fits = [](int64_t has, int64_t wants) { return has > 0 && (has == wants || wants == -1); };
  const bool is_right = std::equal(image.dims.begin(), image.dims.end(), wanted.dims.begin(), fits);
  size_t bytes = is_float ? sizeof(float) : 1;
  for (const int64_t dim : image.dims) bytes *= static_cast<size_t>(dim);
  if (!is_right || image.bytes.size() != bytes)
    fail(std::string(path) + ": " + std::to_string(image.bytes.size()) + " bytes as " + text_of(image.dims) +
         " do not fit the model's " + (is_float ? "float32 " : "uint8 ") + text_of(wanted.dims));
  return image;
}

std::vector<float> logits_of(const Runtime& ort, Session* session, const TensorType& input, Image& image) {
  const auto memory = ort.make<MemoryInfo>(kCreateCpuMemoryInfo, kDeviceAllocator, kDefaultMemory);
  const auto x = ort.make<Value>(kCreateTensor, memory.get(), image.bytes.data(), image.bytes.size(), image.dims.data(),
                                 image.dims.size(), input.element);
  const std::string x_name = ort.first_name(kSessionInputName, session);
  const std::string y_name = ort.first_name(kSessionOutputName, session);
  const char *x_names[] = {x_name.c_str()}, *y_names[] = {y_name.c_str()};
  const Value* const xs[] = {x.get()};
  const auto y = ort.make<Value>(kRun, session, nullptr, x_names, xs, size_t{1}, y_names, size_t{1});
  const auto info = ort.make<ShapeInfo>(kTensorShapeInfo, y.get());
  if (ort.get<int>(kElementType, info.get()) != kFloat) fail("the model's output is not float32");
  const auto* data = static_cast<const float*>(ort.get<void*>(kTensorData, y.get()));
  return {data, data + ort.get<size_t>(kElementCount, info.get())};
}

void print_best(const std::vector<float>& logits) {
  std::vector<size_t> classes(logits.size());
  std::iota(classes.begin(), classes.end(), size_t{0});
  const auto is_better = [&](size_t a, size_t b) {  // any number before a NaN, or nothing could be sorted
    return logits[a] > logits[b] || (std::isnan(logits[b]) && !std::isnan(logits[a]));
  };
  const auto count = std::min<size_t>(5, classes.size());
  std::partial_sort(classes.begin(), classes.begin() + static_cast<std::ptrdiff_t>(count), classes.end(), is_better);
  for (size_t i = 0; i < count; ++i) std::printf("%zu %.9g\n", classes[i], static_cast<double>(logits[classes[i]]));
}

int thread_count(std::string_view text) {
  int threads = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), threads);
  if (error != std::errc() || end != text.data() + text.size() || threads < 0)
    fail("THREADS must be a number from 0 on");
  return threads;
}

void classify(int argc, char** argv) {
  if (argc < 4 || argc > 6) fail("usage: classify ONNXRUNTIME MODEL IMAGE [KERNELS [THREADS]]");
  const int threads = argc > 5 ? thread_count(argv[5]) : 0;
  const Runtime ort(argv[1]);
  const auto env = ort.make<Env>(kCreateEnv, kLogFatal, "classify");  // errors are ours to print
  const auto session = open_session(ort, env.get(), argv[2], argc > 4 ? argv[4] : nullptr, threads);
  const TensorType input = input_of(ort, session.get());
  Image image = read_image(argv[3], input);
  print_best(logits_of(ort, session.get(), input, image));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    classify(argc, argv);
    return 0;
  } catch (Failure& failure) {
    std::replace(failure.message.begin(), failure.message.end(), '\n', ' ');
    std::fprintf(stderr, "classify: %s\n", failure.message.c_str());
    return failure.code;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return kRefused;
  }
}
