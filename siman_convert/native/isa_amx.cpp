// AMX: the binary convolution as a product of matrices of bytes, 16 x 64 times 64 x 16 an instruction; the rest as
// AVX-512 does it.
//
// Bits cost an eighth of the memory, yet this is faster: on one core of a Granite Rapids, on registers, xor, count and
// add come to 1430 G one-bit MAC/s, TDPBSSD to 3874.
#include <immintrin.h>

#include "variant.h"

namespace siman {
namespace {

#include "kernels/variant.inl"
#include "kernels/matrix.inl"
#include "kernels/one_lane.inl"
#include "kernels/words.inl"
#include "kernels/codes.inl"
#include "kernels/avx512.inl"
#include "kernels/vpopcnt.inl"

// Tile registers 0 to 3 hold sums, 4 to 6 pixels, 7 weights. GCC's intrinsics do not say that they touch memory.
struct Tiles {
  static constexpr int kLanes = 16, kPixels = 16, kMostTiles = 4;
  static constexpr size_t kUnit = 64, kWeightBits = kUnit * kLanes / 8, kWeightBytes = kUnit * kLanes;

  // What a tap does not fill of its only unit is left out.
  explicit Tiles(const ConvTask& t) : Tiles(t.units > 1 ? kUnit : static_cast<size_t>(t.channels + 3) / 4 * 4) {}
  explicit Tiles(size_t unit) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    for (int pixels = 4; pixels < 7; ++pixels) config.row_bytes[pixels] = static_cast<uint16_t>(unit);
    config.rows[7] = static_cast<uint8_t>(unit / 4);
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // +1 where a bit is set, else -1.
  SIMAN_INLINE static __m512i signs(uint64_t bits) {
    return _mm512_mask_mov_epi8(_mm512_set1_epi8(-1), _cvtu64_mask64(bits), _mm512_set1_epi8(1));
  }

  // 64 bits to as many bytes, 0 where `valid` is not set.
  static void expand(uint64_t bits, uint64_t valid, uint8_t* to) {
    _mm512_storeu_si512(to, _mm512_maskz_mov_epi8(_cvtu64_mask64(valid), signs(bits)));
  }

  // The weights of one unit, as a tile wants them: a row is 4 channels of 16 filters.
  SIMAN_INLINE static void expand_weights(const uint8_t* bits, uint8_t* to) {
    for (int row = 0; row < 16; ++row) {
      uint64_t word;
      __builtin_memcpy(&word, bits + 8 * row, 8);
      _mm512_store_si512(to + 64 * row, signs(word));
    }
  }

  static void place(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride) {
    for (size_t c = 0; c < 8 * tap_bytes; ++c) {
      const size_t in_unit = c % kUnit, bit = static_cast<size_t>(4 * lane) + in_unit % 4;
      const int value = tap[c / 8] >> (c % 8) & 1;
      vector[c / kUnit * unit_stride + in_unit / 4 * 8 + bit / 8] |= static_cast<uint8_t>(value << bit % 8);
    }
  }

  template <int T>
  SIMAN_INLINE static void clear() {
    __asm__ volatile("tilezero %tmm0");
    if (T > 1) __asm__ volatile("tilezero %tmm1");
    if (T > 2) __asm__ volatile("tilezero %tmm2");
    if (T > 3) __asm__ volatile("tilezero %tmm3");
  }

  // A unit of 16*T pixels, `step` bytes apart.
  template <int T>
  SIMAN_INLINE static void add(const uint8_t* pixels, size_t step, const uint8_t* weights) {
    const size_t tile = 16 * step;
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(weights), "r"(size_t{64}) : "memory");
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm4\n\ttdpbssd %%tmm7, %%tmm4, %%tmm0" ::"r"(pixels), "r"(step)
                     : "memory");
    if (T > 1)
      __asm__ volatile("tileloadd (%0,%1,1), %%tmm5\n\ttdpbssd %%tmm7, %%tmm5, %%tmm1" ::"r"(pixels + tile), "r"(step)
                       : "memory");
    if (T > 2)
      __asm__ volatile("tileloadd (%0,%1,1), %%tmm6\n\ttdpbssd %%tmm7, %%tmm6, %%tmm2" ::"r"(pixels + 2 * tile),
                       "r"(step)
                       : "memory");
    if (T > 3)
      __asm__ volatile("tileloadd (%0,%1,1), %%tmm4\n\ttdpbssd %%tmm7, %%tmm4, %%tmm3" ::"r"(pixels + 3 * tile),
                       "r"(step)
                       : "memory");
  }

  // The sums of 16*T pixels, 16 filters each.
  template <int T>
  SIMAN_INLINE static void store(int32_t* sums) {
    __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(sums), "r"(size_t{64}) : "memory");
    if (T > 1) __asm__ volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(sums + 256), "r"(size_t{64}) : "memory");
    if (T > 2) __asm__ volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(sums + 512), "r"(size_t{64}) : "memory");
    if (T > 3) __asm__ volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(sums + 768), "r"(size_t{64}) : "memory");
  }

  // For quantized.inl: the sums of 16 pixels and 16*F filters, which begin as `base`.
  template <int F>
  SIMAN_INLINE static void load_base(const int32_t* base) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(base), "r"(size_t{0}) : "memory");
    if (F == 1) return;
    __asm__ volatile(
        "tileloadd (%0,%3,1), %%tmm1\n\ttileloadd (%1,%3,1), %%tmm2\n\ttileloadd (%2,%3,1), %%tmm3" ::"r"(base + 16),
        "r"(base + 32), "r"(base + 48), "r"(size_t{0})
        : "memory");
  }
  template <int F>
  SIMAN_INLINE static void add_codes(const uint8_t* pixels, size_t step, const uint8_t* weights) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(pixels), "r"(step) : "memory");
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm7\n\ttdpbusd %%tmm7, %%tmm4, %%tmm0" ::"r"(weights), "r"(size_t{64})
                     : "memory");
    if (F == 1) return;
    __asm__ volatile(
        "tileloadd (%0,%3,1), %%tmm7\n\ttdpbusd %%tmm7, %%tmm4, %%tmm1\n\t"
        "tileloadd (%1,%3,1), %%tmm7\n\ttdpbusd %%tmm7, %%tmm4, %%tmm2\n\t"
        "tileloadd (%2,%3,1), %%tmm7\n\ttdpbusd %%tmm7, %%tmm4, %%tmm3" ::"r"(weights + 1024),
        "r"(weights + 2048), "r"(weights + 3072), "r"(size_t{64})
        : "memory");
  }
  template <int F>
  SIMAN_INLINE static void store_codes(int32_t* acc) {
    __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(acc), "r"(size_t{64 * F}) : "memory");
    if (F == 1) return;
    __asm__ volatile(
        "tilestored %%tmm1, (%0,%3,1)\n\ttilestored %%tmm2, (%1,%3,1)\n\ttilestored %%tmm3, (%2,%3,1)" ::"r"(acc + 16),
        "r"(acc + 32), "r"(acc + 48), "r"(size_t{64 * F})
        : "memory");
  }

  // The step on registers alone: see ceiling.inl.
  static int64_t count_registers(int64_t steps, int32_t* sink) {
    const Tiles tiles(kUnit);
    alignas(64) int32_t sums[kMostTiles * kPixels * kLanes];
    clear<4>();
    __asm__ volatile("tilezero %%tmm4\n\ttilezero %%tmm7" ::);
    for (int64_t s = 0; s < steps; ++s)
      __asm__ volatile(
          "tdpbssd %%tmm7, %%tmm4, %%tmm0\n\ttdpbssd %%tmm7, %%tmm4, %%tmm1\n\t"
          "tdpbssd %%tmm7, %%tmm4, %%tmm2\n\ttdpbssd %%tmm7, %%tmm4, %%tmm3" ::);
    store<4>(sums);
    *sink += sums[0];
    return steps * kMostTiles * kPixels * kLanes * static_cast<int64_t>(kUnit);
  }
};

// Codes as AVX-512 has them, 64 of a kernel row and 16 pixels times 16 filters an instruction.
struct TileCodes {
  using Code = uint8_t;
  static constexpr int kLanes = 16, kVectors = 4, kFewVectors = 1, kPixels = 16, kUnitPixels = 1;
  static constexpr int kUnitChannels = 64, kUnitBytes = 64, kVectorBytes = 1024;

  static void place(const int8_t* tap, size_t channels, int lane, uint8_t* vector, size_t unit_stride) {
    for (size_t c = 0; c < channels; ++c)
      vector[c / 64 * unit_stride + c % 64 / 4 * 64 + static_cast<size_t>(4 * lane) + c % 4] =
          static_cast<uint8_t>(tap[c]);
  }
};

// Always 16 pixels, some of them beyond the row: the tiles keep their shape. What is read beyond the image is dropped.
template <class Codes, int F>
struct TileRow {
  static constexpr bool kAlwaysWhole = true;

  const ConvTask& t;
  int64_t y;

  explicit TileRow(const ConvTask& task) : t(task) {}
  void start(int64_t at) { y = at; }

  template <int P>
  SIMAN_NOINLINE void tile(int64_t x, int32_t* acc) const {
    static_assert(P == Tiles::kPixels && (F == 1 || F == 4));
    const int64_t units = t.units, in_y = y * t.rows.stride, in_x = x * t.columns.stride;
    const size_t step = static_cast<size_t>(t.columns.stride) * t.pixel_bytes;
    const uint8_t* weights = t.weights;
    const uint8_t* row = t.packed + static_cast<size_t>(in_y) * t.row_bytes + static_cast<size_t>(in_x) * t.pixel_bytes;
    Tiles::load_base<F>(t.base);
    for (int64_t i = 0; i < t.rows.kernel; ++i, row += t.row_bytes)
      for (int64_t u = 0; u < units; ++u, weights += F * Codes::kVectorBytes)
        Tiles::add_codes<F>(row + u * Codes::kUnitBytes, step, weights);
    Tiles::store_codes<F>(acc);
  }
};

void convolve_codes(const ConvTask& t) {
  const Tiles tiles(t);
  convolve_quantized<TileRow, TileCodes, SixteenFloats>(t);
}

}  // namespace

extern const Variant kAmx;
const Variant kAmx = variant<Ops, SixteenFloats, OneFloat, EightDoubles>(
    "amx", quantized<TileCodes, SixteenFloats>(convolve_codes), matrix<Tiles, SixteenFloats>());

}  // namespace siman
