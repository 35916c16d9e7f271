// The plan by itself, with a C interface for ctypes: where cases are cut for a GPU, nothing is emulated.
#include <cstring>

#include "cuda/plan/launch_plan.h"

using namespace res2net_fused::cuda;

extern "C" {
// The plan for a device with these limits; 0, or why there is none as text.
int plan_call(const int64_t* problem, const int64_t* device, int clusters, int64_t* plan, char* text, int size) {
    const std::vector<int64_t> found = plan_as_numbers(problem, device, text, size, clusters != 0);
    if (found.empty()) return -1;
    std::memcpy(plan, found.data(), found.size() * sizeof(int64_t));
    return 0;
}

// Bytes of shared memory that a launch takes, planned or cut by hand: `launch` is the first twelve numbers of a plan.
int shared_bytes(const int64_t* problem, const int64_t* launch) {
    const auto p = [&](int i) { return int(problem[i]); };
    const auto l = [&](int i) { return int(launch[i]); };
    const ChainProblem work{problem[0], p(1), p(2), p(3), p(4), p(5), p(6), p(7) != 0, DataType(p(9))};
    const ChainTile tile{l(1), l(2), l(3), l(4) != 0, l(5), l(6), l(7), l(8), l(9), l(10), l(11)};
    return geometry_of(work, tile, l(0)).shared_bytes;
}
}
