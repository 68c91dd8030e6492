// All kernels of one instruction set, to be included in the unnamed namespace of its file.
#include "mean.inl"
#include "pack.inl"
#include "epilogue.inl"
#include "convolve.inl"
#include "binary.inl"
#include "quantized.inl"
#include "pool.inl"
#include "ceiling.inl"

template <class Ops>
constexpr Kernel kernel(void (*convolve)(const ConvTask&)) {
  return {Ops::kLanes,     Ops::kVectors,     Ops::kFewVectors, Ops::kUnitChannels,
          Ops::kUnitBytes, Ops::kVectorBytes, convolve};
}

// The entry of this instruction set: all of its kernels and the layout they want.
template <class BinaryOps, class QuantizedOps, class Floats, class One, class Doubles>
constexpr Variant variant(const char* name) {
  return {name,
          {kernel<BinaryOps>(convolve<BinaryRow, BinaryOps, Floats>), sum_block<Doubles>, pack<Floats, One, BinaryOps>,
           BinaryOps::place, count_registers<BinaryOps>},
          {kernel<QuantizedOps>(convolve_quantized<QuantizedOps, Floats>), sizeof(typename QuantizedOps::Code),
           quantize<Floats, QuantizedOps>, QuantizedOps::place}};
}
