// Which variants there are, and which of them this processor can run.
#include <cstring>

#include "variant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace siman {

extern const Variant kScalar, kAvx2, kAvx512, kNeon;

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

bool has_avx512() {
  return registers_are_saved(kZmmState) &&
         has(bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512VL, bit_AVX512VPOPCNTDQ | bit_AVX512VNNI);
}
#endif

}  // namespace

const NamedVariant kVariants[] = {
#if defined(__x86_64__)
    {&kAvx512, has_avx512},
    {&kAvx2, has_avx2},
#elif defined(__aarch64__)
    {&kNeon, always},
#endif
    {&kScalar, always},
    {nullptr, nullptr},
};

const NamedVariant* find_variant(const char* name) {
  for (const NamedVariant* v = kVariants; v->kernels; ++v)
    if (name ? std::strcmp(name, v->kernels->name) == 0 : v->supported()) return v;
  return nullptr;
}

}  // namespace siman
