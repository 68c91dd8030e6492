// The step of the inner loop on registers alone: no loop over taps, no load, no epilogue can make it faster.

// Adds up a tile `steps` times and returns the one-bit multiplications that this was. `sink` keeps the compiler from
// dropping them, opaque() from seeing that it adds the same every time and from reordering what fits the registers.
template <class Ops>
int64_t count_registers(int64_t steps, int32_t* sink) {
  constexpr int F = Ops::kVectors, P = Ops::kPixels;
  const uint8_t bytes[Ops::kVectorBytes] = {};
  typename Ops::Weights w[Ops::kStepUnits][F];
  for (auto& unit : w)
    for (auto& vector : unit) vector = Ops::opaque(Ops::load(bytes));
  typename Ops::Activation a[Ops::kStepUnits];
  for (auto& unit : a) unit = Ops::broadcast(bytes);
  const int32_t zeros[F * Ops::kLanes] = {};
  const int32_t* base[P];
  for (auto& from : base) from = zeros;
  int32_t acc[P * F * Ops::kLanes];
  Tile<Ops, F, P> tile(base, acc);
  for (int64_t s = 0; s < steps; ++s) {
    for (int g = 0; g < tile.kGroups; ++g) {
      for (auto& unit : a) unit = Ops::opaque(unit);
      tile.template count<Ops::kStepUnits>(g, w, a);
      for (int f = 0; f < F; ++f) tile.part[f][g] = Ops::opaque(tile.part[f][g]);
    }
  }
  tile.finish();
  for (const int32_t value : acc) *sink += value;
  return steps * F * P * Ops::kLanes * Ops::kStepUnits * Ops::kUnitChannels;
}
