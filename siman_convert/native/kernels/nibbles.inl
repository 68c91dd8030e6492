// Ops for kernels that look bits up: a unit is a nibble of 4 channels, a vector holds the same nibble of kLanes
// filters, a byte each.
//
// Without an instruction that counts bits the usual way splits xor into nibbles and looks each up in a table of counts:
// 8 instructions for a vector of bits (xor, 2 and, shift, 2 shuffles, 2 adds). Here the table itself holds the xor: for
// an activation nibble a, entry w is popcount(a ^ w), and the shuffle's index is a nibble of weights: 2 instructions
// (shuffle, add) for a vector of nibbles, 4 for a vector of bits.

struct Tables {
  alignas(16) uint8_t differing[16][16];  // [activation][weight]

  constexpr Tables() : differing() {
    for (int a = 0; a < 16; ++a)
      for (int w = 0; w < 16; ++w) differing[a][w] = static_cast<uint8_t>(__builtin_popcount(a ^ w));
  }
};

constexpr Tables kTables;

// In a pixel a unit is a byte that holds the offset of its table, 16 times the nibble.
template <int Lanes>
struct NibbleLayout {
  static constexpr int kLanes = Lanes;
  static constexpr int kUnitChannels = 4, kUnitBytes = 1, kWordBytes = 16, kVectorBytes = Lanes;
  static constexpr int64_t kUnitsPerFlush = 63, kFlushes = 260;  // 63*4 < 2^8, 260*63*4 < 2^16

  static __m128i table_of(const uint8_t* unit) {
    const auto* table = reinterpret_cast<const uint8_t*>(kTables.differing) + *unit;
    return _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  }

  static void store_word(uint8_t* out, uint64_t word) {
    const __m128i bytes = _mm_set_epi64x(0, static_cast<int64_t>(word)), upper = _mm_set1_epi8(static_cast<char>(0xF0));
    const __m128i even = _mm_and_si128(_mm_slli_epi16(bytes, 4), upper), odd = _mm_and_si128(bytes, upper);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(even, odd));
  }

  // Byte 2k of a vector is filter k, byte 2k+1 is filter Lanes/2 + k: flushing then leaves the filters in order.
  static void place(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride) {
    uint8_t* at = vector + 2 * (lane % (Lanes / 2)) + lane / (Lanes / 2);
    for (size_t b = 0; b < tap_bytes; ++b, at += 2 * unit_stride) {
      at[0] = tap[b] & 15;
      if (tap[b] >> 4) at[unit_stride] = tap[b] >> 4;  // there may be no such unit; padding bits are 0
    }
  }
};
