// Runs a planned chain over its data.
#pragma once

#include "cpu/chain_plan.h"

namespace res2net_fused {

struct ChainData {
  ConstView x;            // (N, H, W, s*w), channels side by side
  View out;               // (N, H/stride, W/stride, s*w)
  const float* winograd;  // winograd_floats(w) a step; null where the plan has no Winograd
  const float* direct;    // groups * direct_group_floats(w/groups) a step
  const float* bias;      // bias_floats(w) a step
};

void run_chain(const ChainProblem& problem, const ChainPlan& plan, const ChainData& data, const Kernels& kernels);

}  // namespace res2net_fused
