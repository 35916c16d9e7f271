// torch.ops.res2net_fused_native.cuda_chain_plan and .cuda_chain_refusal: the plan of the CUDA chain kernel, in the CPU library,
// so that it can be asked for where there is no GPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <string>
#include <vector>

#include "cuda/plan/launch_plan.h"

namespace {

std::vector<int64_t> plan(const std::vector<int64_t>& problem, const std::vector<int64_t>& device, std::string& reason) {
  STD_TORCH_CHECK(problem.size() == 10, "problem: expected 10 numbers, got ", problem.size());
  STD_TORCH_CHECK(device.size() == 9, "device: expected 9 numbers, got ", device.size());
  for (size_t i = 0; i < 7; i++)
    STD_TORCH_CHECK(problem[i] >= 1 && problem[i] <= int64_t(1) << 40, "problem: number ", i, " is ", problem[i],
                    "; expected 1 or more");
  STD_TORCH_CHECK(problem[9] >= 0 && problem[9] < res2net_fused::cuda::DATA_TYPES, "problem: number 9 is ", problem[9],
                  "; expected a type from 0 to ", res2net_fused::cuda::DATA_TYPES - 1);
  char text[400];
  std::vector<int64_t> found = res2net_fused::cuda::plan_as_numbers(problem.data(), device.data(), text, sizeof text);
  reason = text;
  return found;
}

std::vector<int64_t> cuda_chain_plan(std::vector<int64_t> problem, std::vector<int64_t> device) {
  std::string reason;
  return plan(problem, device, reason);
}

std::string cuda_chain_refusal(std::vector<int64_t> problem, std::vector<int64_t> device) {
  std::string reason;
  plan(problem, device, reason);
  return reason;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  // The numbers are named in cuda/plan/launch_plan.h; empty where there is no plan.
  m.def("cuda_chain_plan(int[] problem, int[] device) -> int[]");
  m.def("cuda_chain_refusal(int[] problem, int[] device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_chain_plan", TORCH_BOX(&cuda_chain_plan));
  m.impl("cuda_chain_refusal", TORCH_BOX(&cuda_chain_refusal));
}
