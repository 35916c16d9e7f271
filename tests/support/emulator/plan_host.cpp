// The plan by itself, with a C interface for ctypes: where cases are cut for a GPU, nothing is emulated.
#include <cstdio>
#include <cstring>

#include "cuda/plan/launch_plan.h"

using namespace res2net_fused::cuda;

namespace {
// Numbers in the order of PlanRequest in res2net_fused/backends/cuda/plan.py; numbers[8] is read by plan_call.
ChainProblem problem_of(const int64_t* numbers) {
  const auto p = [&](int i) { return int(numbers[i]); };
  return {numbers[0], p(1), p(2), p(3), p(4), p(5), p(6), p(7) != 0, DataType(p(9)), p(10)};
}
}  // namespace

extern "C" {
// The plan for a device with these limits; 0, or why there is none as text.
int plan_call(const int64_t* problem, const int64_t* device, int clusters, int64_t* plan, char* text, int size) {
  const auto d = [&](int i) { return int(device[i]); };
  const DeviceLimits limits{d(0), d(1), d(2), d(3), d(4), d(5), d(6), d(7), d(8)};
  std::string reason;
  const std::vector<int64_t> found = plan_as_numbers(problem_of(problem), problem[8] != 0, limits, reason, clusters != 0);
  std::snprintf(text, size, "%s", reason.c_str());
  if (found.empty()) return -1;
  std::memcpy(plan, found.data(), found.size() * sizeof(int64_t));
  return 0;
}

// Bytes of shared memory that a launch takes, planned or cut by hand: `launch` is the first twelve numbers of a plan.
int shared_bytes(const int64_t* problem, const int64_t* launch) {
  const auto l = [&](int i) { return int(launch[i]); };
  const ChainTile tile{l(1), l(2), l(3), l(4) != 0, l(5), l(6), l(7), l(8), l(9), l(10), l(11)};
  return geometry_of(problem_of(problem), tile, l(0)).shared_bytes;
}
}
