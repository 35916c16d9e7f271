// Runs a planned chain over its data.
#pragma once

#include "cpu/chain/plan.h"

namespace res2net_fused {

struct ChainData {
  ConstView x;            // (N, H, W, s*w), channels side by side
  bool x_has_border;      // so many zero pixels as the dilation says lie around its images
  View out;               // (N, H/stride, W/stride, s*w)
  int64_t room;           // floats of a pixel of x and of out that may be touched: s*w, or more where padding follows
  const float* winograd;  // winograd_floats(w) a step; null where the plan has no Winograd, or takes `plain`
  const float* direct;    // groups * direct_group_floats(w/groups) a step; null: tiles that are not finite are reported
  const WeightView* plain = nullptr;  // one a step, packed by whoever needs them; for Schedule::channels
  const float* bias;                  // bias_floats(w) a step
};

// Takes up to plan.images images at a time through the whole chain on the calling thread; for Schedule::images.
class ImageChain {
 public:
  // scratch: scratch_floats(), of this thread alone.
  ImageChain(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels, float* scratch);
  static int64_t scratch_floats(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels);

  // The first `images` images of `data`; false as run_chain.
  bool run(const ChainData& data, int64_t images) const;

 private:
  const ChainProblem& problem_;
  const ChainPlan& plan_;
  const Kernels& kernels_;
  float* scratch_;
};

// Winograd's weights of all steps by all threads, winograd_floats(channels) a step.
void pack_ahead(const WeightView* weights, int64_t steps, int64_t channels, float* packed, const Kernels& kernels);

// How often all threads wait for each other in a block's chain.
int64_t chain_barriers(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels);

// False where Winograd's result is not finite and data.direct is null: the output is then worth nothing.
bool run_chain(const ChainProblem& problem, const ChainPlan& plan, const ChainData& data, const Kernels& kernels);

}  // namespace res2net_fused
