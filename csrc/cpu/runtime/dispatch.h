// The instruction set that the kernels run with.
#pragma once

#include "cpu/kernels/kernels.h"

namespace res2net_fused {

// neon: in the place of portable on aarch64, where every processor has it. The codes are those that Python passes:
// res2net_fused/backends/cpu/settings.py.
enum class InstructionSet : int64_t { best = -1, portable = 0, avx2 = 1, avx512 = 2, neon = 3 };

// The kernels, or null where this processor or this build has none of that set. `best` never gives null.
const Kernels* find_kernels(InstructionSet set);

}  // namespace res2net_fused
