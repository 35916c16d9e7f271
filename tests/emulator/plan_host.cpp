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
}
