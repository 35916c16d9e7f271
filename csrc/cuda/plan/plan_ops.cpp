// torch.ops.res2net_fused_native.cuda_chain_plan and .cuda_chain_refusal: the plan of the CUDA chain kernel, in the CPU
// library, so that it can be asked for where there is no GPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/named_arguments.h"
#include "cuda/plan/launch_plan.h"

namespace {

using namespace res2net_fused::cuda;

// The fields of PlanRequest in res2net_fused/backends/cuda/plan.py, then those of DeviceLimits in
// res2net_fused/_native/library.py, then how many plans are faster than the one asked for.
#define RES2NET_PLAN_ARGUMENTS(INT, BOOL, FLOAT)                                                                             \
  INT(images), INT(height), INT(width), INT(channels), INT(steps), INT(stride), INT(dilation), BOOL(adds), BOOL(passes),     \
      INT(type), INT(slot), INT(capability_major), INT(capability_minor), INT(multiprocessors), INT(shared_per_block_optin), \
      INT(shared_per_multiprocessor), INT(registers_per_multiprocessor), INT(l2_bytes), INT(wgmma), INT(code), INT(rank)

std::vector<int64_t> plan(std::string& reason, RES2NET_PARAMETERS(RES2NET_PLAN_ARGUMENTS)) {
  const auto checked = [](const char* name, int64_t value) {
    STD_TORCH_CHECK(value >= 1 && value <= int64_t(1) << 40, name, ": ", value, "; expected 1 or more");
    return value;
  };
  const auto narrow = [&](const char* name, int64_t value) {
    return int(std::min<int64_t>(checked(name, value), 1 << 30));  // more is refused either way
  };
  STD_TORCH_CHECK(type >= 0 && type < DATA_TYPES, "type: ", type, "; expected 0 to ", DATA_TYPES - 1);
  const ChainProblem problem{
      .images = checked("images", images),
      .height = narrow("height", height),
      .width = narrow("width", width),
      .channels = narrow("channels", channels),
      .steps = narrow("steps", steps),
      .stride = narrow("stride", stride),
      .dilation = narrow("dilation", dilation),
      .adds = adds,
      .type = DataType(type),
      .slot = narrow("slot", slot)};
  const DeviceLimits device{
      .major = int(capability_major),
      .minor = int(capability_minor),
      .multiprocessors = int(multiprocessors),
      .shared_per_block = int(shared_per_block_optin),
      .shared_per_multiprocessor = int(shared_per_multiprocessor),
      .registers_per_multiprocessor = int(registers_per_multiprocessor),
      .l2_bytes = int(l2_bytes),
      .wgmma = int(wgmma),
      .code = int(code)};
  STD_TORCH_CHECK(rank >= 0 && rank < 1 << 30, "rank: ", rank, "; expected 0 or more");
  return plan_as_numbers(problem, passes, device, reason, true, int(rank));
}

std::vector<int64_t> cuda_chain_plan(RES2NET_PARAMETERS(RES2NET_PLAN_ARGUMENTS)) {
  std::string reason;
  return plan(reason, RES2NET_VALUES(RES2NET_PLAN_ARGUMENTS));
}

std::string cuda_chain_refusal(RES2NET_PARAMETERS(RES2NET_PLAN_ARGUMENTS)) {
  std::string reason;
  plan(reason, RES2NET_VALUES(RES2NET_PLAN_ARGUMENTS));
  return reason;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def("cuda_chain_plan(" RES2NET_SCHEMA(RES2NET_PLAN_ARGUMENTS) ") -> int[]");  // empty where there is no plan
  m.def("cuda_chain_refusal(" RES2NET_SCHEMA(RES2NET_PLAN_ARGUMENTS) ") -> str");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_chain_plan", TORCH_BOX(&cuda_chain_plan));
  m.impl("cuda_chain_refusal", TORCH_BOX(&cuda_chain_refusal));
}
