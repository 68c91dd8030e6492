// All kernels of one instruction set, to be included in the unnamed namespace of its file.
#include "mean.inl"
#include "pack.inl"
#include "epilogue.inl"
#include "convolve.inl"
#include "ceiling.inl"

// The entry of this instruction set: all of its kernels and the layout they want.
template <class Ops, class Floats, class One, class Doubles>
constexpr Variant variant(const char* name) {
  return {name,
          Ops::kLanes,
          Ops::kVectors,
          Ops::kFewVectors,
          Ops::kUnitChannels,
          Ops::kUnitBytes,
          Ops::kVectorBytes,
          sum_block<Doubles>,
          pack<Floats, One, Ops>,
          Ops::place,
          convolve<Ops, Floats>,
          count_registers<Ops>};
}
