// Ops for kernels that look bits up: a unit is a nibble of 4 channels of two pixels, a vector holds the same nibble of
// kLanes filters, a byte each.
//
// Without an instruction that counts bits the usual way splits xor into nibbles and looks each up in a table of counts:
// 8 instructions for a vector of bits (xor, 2 and, shift, 2 shuffles, 2 adds). Here the table itself holds the xor, and
// that of two pixels: for activation nibbles a and b, entry w is popcount(a ^ w) + 16*popcount(b ^ w), and the
// shuffle's index is a nibble of weights. Sums of 3 units fit into the two halves of a byte, 3*4 < 2^4, and are then
// added to two sums: 9 instructions (3 shuffles, 2 adds; and, add, shift, add) for 6 vectors of nibbles, 3 for a vector
// of bits.
//
// One-bit multiplications a cycle without loads, measured on a Cascade Lake: 219 with AVX2, 267 with AVX-512,
// which shuffle on one port; with tables of one pixel (2 instructions for a vector of nibbles) 131 and 203.
//
// Vectors says what a vector is: kBytes, Vec, load(const uint8_t*), table(const uint8_t*), which is 16 bytes as often
// as they fit, set(uint16_t), look_up(Vec table, Vec indices), add_bytes, add, subtract, both (bitwise and),
// shifted_right<Bits>. All but add_bytes and look_up take lanes of 16 bits.

struct Tables {
  alignas(64) uint8_t counts[256 * 16];  // [activations of the second pixel, of the first, weight]

  constexpr Tables() : counts() {
    for (int a = 0; a < 256; ++a)
      for (int w = 0; w < 16; ++w) {
        const int first = __builtin_popcount((a & 15) ^ w), second = __builtin_popcount((a >> 4) ^ w);
        counts[16 * a + w] = static_cast<uint8_t>(first + 16 * second);
      }
  }
};

constexpr Tables kTables;

// In a pixel a unit is 16 bits that hold the offset of its table.
template <class Vectors>
struct NibbleOps : PlainWords {
  static constexpr int kLanes = Vectors::kBytes;
  static constexpr int kUnitChannels = 4, kUnitBytes = 2, kUnitPixels = 2, kStepUnits = 3;
  static constexpr int kVectorBytes = kLanes;
  static constexpr int64_t kUnitsPerFlush = 60,
                           kFlushes = 273;  // 60*4 < 2^8, 60*4*(1 + 16 + 256) < 2^16, 273*60*4 < 2^16

  using Vec = typename Vectors::Vec;
  using Weights = Vec;
  using Activation = Vec;
  struct Part {
    Vec first;   // sums of the first pixel, of as many filters as there are bytes
    Vec second;  // of 16 bits each: those of the second pixel, and 16 times `first` of the odd byte
  };
  struct Wide {
    Vec low, high;  // sums of one pixel, 16 bits each: the filters of the even bytes and of the odd ones
  };

  static Weights load(const uint8_t* bytes) { return Vectors::load(bytes); }
  static Activation broadcast(const uint8_t* unit) {
    uint16_t offset;
    __builtin_memcpy(&offset, unit, 2);
    return Vectors::table(kTables.counts + offset);
  }
  static void zero(Part& part) { part.first = part.second = Vectors::set(0); }
  static void zero(Wide& wide) { wide.low = wide.high = Vectors::set(0); }

  static Vec differing(Weights w, Activation table) { return Vectors::look_up(table, w); }
  static Vec plus(Vec a, Vec b) { return Vectors::add_bytes(a, b); }
  static void count(Part& part, Vec sum) {
    part.first = Vectors::add(part.first, Vectors::both(sum, Vectors::set(0x0F0F)));
    part.second = Vectors::add(part.second, Vectors::template shifted_right<4>(sum));
  }
  static void flush(Part& part, Wide& first, Wide& second) {
    const Vec odd = Vectors::both(Vectors::template shifted_right<4>(part.first), Vectors::set(0x0FF0));
    widen(part.first, first);
    widen(Vectors::subtract(part.second, odd), second);
    zero(part);
  }
  static void widen(Vec bytes, Wide& wide) {
    wide.low = Vectors::add(wide.low, Vectors::both(bytes, Vectors::set(0x00FF)));
    wide.high = Vectors::add(wide.high, Vectors::template shifted_right<8>(bytes));
  }

  static void pair(const PairTask& task) {
    const PairTask t = task;  // a store of units could change `task` for all the compiler knows
    const uint8_t* row = t.bits;
    uint8_t* out = t.units;
    const size_t pixel_bytes = t.words * kWordBytes, row_bytes = t.columns * pixel_bytes;
    const size_t partner = t.distance * pixel_bytes;
    for (size_t y = 0; y < t.rows; ++y, row += row_bytes) {
      for (size_t i = 0; i < t.partners * pixel_bytes; i += kWordBytes) out = store_units(0, word(row + i), out);
      for (size_t i = 0; i < row_bytes; i += kWordBytes)
        out = store_units(word(row + i), partner < row_bytes - i ? word(row + i + partner) : 0, out);
    }
  }
  static uint64_t word(const uint8_t* bytes) {
    uint64_t value;
    __builtin_memcpy(&value, bytes, kWordBytes);
    return value;
  }
  static uint8_t* store_units(uint64_t first, uint64_t second, uint8_t* out) {
    const __m128i a = _mm_cvtsi64_si128(static_cast<int64_t>(first)), upper = _mm_set1_epi8(static_cast<char>(0xF0));
    const __m128i b = _mm_cvtsi64_si128(static_cast<int64_t>(second)), lower = _mm_set1_epi8(0x0F);
    const __m128i even = _mm_or_si128(_mm_and_si128(a, lower), _mm_and_si128(_mm_slli_epi16(b, 4), upper));
    const __m128i odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(a, 4), lower), _mm_and_si128(b, upper));
    const __m128i tables = _mm_unpacklo_epi8(even, odd), zero = _mm_setzero_si128();
    auto* to = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(to, _mm_srli_epi16(_mm_unpacklo_epi8(zero, tables), 4));
    _mm_storeu_si128(to + 1, _mm_srli_epi16(_mm_unpackhi_epi8(zero, tables), 4));
    return out + 2 * sizeof(__m128i);
  }

  // Byte 2k of a vector is filter k, byte 2k+1 is filter kLanes/2 + k: flushing then leaves the filters in order.
  static void place(const uint8_t* tap, size_t tap_bytes, int lane, uint8_t* vector, size_t unit_stride) {
    uint8_t* at = vector + 2 * (lane % (kLanes / 2)) + lane / (kLanes / 2);
    for (size_t b = 0; b < tap_bytes; ++b, at += 2 * unit_stride) {
      at[0] = tap[b] & 15;
      if (tap[b] >> 4) at[unit_stride] = tap[b] >> 4;  // there may be no such unit; padding bits are 0
    }
  }
};
