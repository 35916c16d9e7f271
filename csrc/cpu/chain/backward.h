// The backward of a whole chain without batch statistics, where every convolution and its gradients run by Winograd.
#pragma once

#include "cpu/chain/plan.h"
#include "cpu/chain/weight_gradients.h"

namespace res2net_fused {

struct BackwardData {
  ConstView x, out, grad;            // (N, H, W, s*w), channels side by side
  View grad_x;                       // as x; of the groups that are convolved
  int64_t room;                      // floats of a pixel of each: s*w
  const WeightView* weights;         // one a step, turned
  const WeightGradients* gradients;  // one a step, or null
};

// How the work of a backward is cut: what ChainPlan is to a forward.
struct BackwardPlan {
  Schedule schedule;
  TileGrid grid;
  int64_t parts, block_tiles;
  int64_t images, weight_tiles;  // Schedule::images: at a time, of one part; of a block to the weights' gradient
};

// Whether chain_backward runs a problem at all, and faster than one operator after the other.
bool backward_covers(const ChainProblem& problem, int64_t threads);

BackwardPlan plan_backward(const ChainProblem& problem, int64_t threads);

// need_x: whether all of grad_x is asked for. False where a gradient is not finite; then what it wrote is worth nothing.
bool run_backward(
    const ChainProblem& problem, const BackwardPlan& plan, const BackwardData& data, bool need_x, const Kernels& kernels);

}  // namespace res2net_fused
