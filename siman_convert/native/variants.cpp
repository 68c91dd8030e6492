// Which variants there are, and which of them this processor can run.
#include <cstring>

#include "variant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if SIMAN_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace siman {

extern const Variant kScalar, kAvx2, kAvx512Vnni, kAvx512, kAmx, kNeon;

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// A feature counts only where the operating system saves the registers it uses: bits of XCR0.
constexpr uint32_t kYmmState = 0x06, kZmmState = 0xE6;

bool registers_are_saved(uint32_t state) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & state) == state;
}

bool has(uint32_t in_ebx, uint32_t in_ecx) {
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (b & in_ebx) == in_ebx && (c & in_ecx) == in_ecx;
}

bool has_avx2() { return registers_are_saved(kYmmState) && has(bit_AVX2, 0); }

bool has_avx512vnni() {
  return registers_are_saved(kZmmState) && has(bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512VL, bit_AVX512VNNI);
}

bool has_avx512() { return has_avx512vnni() && has(0, bit_AVX512VPOPCNTDQ); }

#if SIMAN_AMX
// The kernel has to be asked before a process may use the tiles; it refuses where it does not know them, or where a
// signal stack would be too small to save them on.
bool tiles_are_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch/x86/include/uapi/asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
  constexpr uint32_t kTiles = 1u << 24, kInt8 = 1u << 25, kTileState = 0x600E6;
  static const bool granted = [] {
    uint32_t a, b, c, d;
    const bool is_there = has_avx512() && registers_are_saved(kTileState) && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
                          (d & (kTiles | kInt8)) == (kTiles | kInt8);
    return is_there && tiles_are_granted();
  }();
  return granted;
}
#endif
#endif

}  // namespace

const NamedVariant kVariants[] = {
#if defined(__x86_64__)
#if SIMAN_AMX
    {&kAmx, has_amx},
#endif
    {&kAvx512, has_avx512}, {&kAvx512Vnni, has_avx512vnni},
    {&kAvx2, has_avx2},
#elif defined(__aarch64__)
    {&kNeon, always},
#endif
    {&kScalar, always},     {nullptr, nullptr},
};

const NamedVariant* find_variant(const char* name) {
  for (const NamedVariant* v = kVariants; v->kernels; ++v)
    if (name ? std::strcmp(name, v->kernels->name) == 0 : v->supported()) return v;
  return nullptr;
}

}  // namespace siman
