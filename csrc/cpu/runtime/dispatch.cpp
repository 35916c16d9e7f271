#include "cpu/runtime/dispatch.h"

namespace res2net_fused {
namespace {

const Kernels* find_avx2() {
#ifdef RES2NET_FUSED_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kernels;
#endif
  return nullptr;
}

const Kernels* find_avx512() {
#ifdef RES2NET_FUSED_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
    return &avx512::kernels;
  }
#endif
  return nullptr;
}

// The set that every processor of this kind has.
const Kernels* find_lowest(InstructionSet set) {
#ifdef RES2NET_FUSED_HAVE_NEON
  return set == InstructionSet::neon ? &neon::kernels : nullptr;
#else
  return set == InstructionSet::portable ? &portable::kernels : nullptr;
#endif
}

const Kernels* find_best() {
  if (const Kernels* found = find_avx512()) return found;
  if (const Kernels* found = find_avx2()) return found;
  if (const Kernels* found = find_lowest(InstructionSet::neon)) return found;
  return find_lowest(InstructionSet::portable);
}

}  // namespace

const Kernels* find_kernels(InstructionSet set) {
  static const Kernels* const best = find_best();
  switch (set) {
    case InstructionSet::best:
      return best;
    case InstructionSet::portable:
    case InstructionSet::neon:
      return find_lowest(set);
    case InstructionSet::avx2:
      return find_avx2();
    case InstructionSet::avx512:
      return find_avx512();
  }
  return nullptr;
}

}  // namespace res2net_fused
