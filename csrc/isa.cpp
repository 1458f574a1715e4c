// Chooses the table once: the best the machine has, or what SAMV2_ISA asks for.
#include "isa.h"

#include <cstdlib>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rle {

extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

namespace {

#if defined(__x86_64__)
// Not among the names that every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool has(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && has_f16c();
  if (name == std::string("avx2")) return avx2;
  if (name == std::string("avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vpopcntdq");
#endif
  return name == std::string("scalar");
}

const Isa& choose() {
  const Isa* const tables[] = {
#if defined(__x86_64__)
      &kAvx512, &kAvx2,
#endif
      &kScalar};
  const char* wanted = std::getenv("SAMV2_ISA");
  std::string offered;
  for (const Isa* table : tables) {
    if (!has(table->name)) continue;
    if (wanted == nullptr || *wanted == '\0' || table->name == std::string(wanted))
      return *table;
    offered += (offered.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("SAMV2_ISA is '" + std::string(wanted) +
                              "', this machine offers " + offered +
                              "; unset it for the fastest");
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace rle
