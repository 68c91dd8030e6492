// All kernels of one instruction set, to be included in the unnamed namespace of its file.
#include "mean.inl"
#include "pack.inl"
#include "epilogue.inl"
#include "convolve.inl"
#include "binary.inl"
#include "quantized.inl"
#include "pool.inl"
#include "surrogate.inl"
#include "latents.inl"
#include "ceiling.inl"

template <class Ops>
constexpr Kernel kernel(void (*convolve)(const ConvTask&)) {
  return {Ops::kLanes,     Ops::kVectors,     Ops::kFewVectors, Ops::kUnitChannels,
          Ops::kUnitBytes, Ops::kVectorBytes, convolve};
}

template <class Ops>
constexpr auto pair_of() -> void (*)(const PairTask&) {
  if constexpr (Ops::kUnitPixels > 1) return Ops::pair;
  return nullptr;
}

template <class Ops, class Floats>
constexpr QuantizedKernels quantized(void (*convolve)(const ConvTask&)) {
  return {kernel<Ops>(convolve), sizeof(typename Ops::Code), quantize<Floats, Ops>, Ops::place};
}

template <class Floats, class One, class Doubles>
constexpr TrainingKernels training() {
  return {signs<Floats, One>,
          sign_backward<Floats, One>,
          binarize<Floats, One, Doubles>,
          binarize_backward<Floats, One, Doubles>,
          centre<Floats, One, Doubles>,
          select<Floats>,
          clamp<Floats, One>};
}

// The entry of this instruction set: all of its kernels and the layout they want.
template <class Ops, class Floats, class One, class Doubles>
constexpr Variant variant(const char* name, QuantizedKernels quantized, MatrixKernels matrix = {}) {
  return {name,
          {kernel<Ops>(convolve<BinaryRow, Ops, Floats>), sum_block<Doubles>, pack<Floats, One, Ops>, pair_of<Ops>(),
           Ops::place, count_registers<Ops>},
          quantized,
          matrix,
          training<Floats, One, Doubles>()};
}
