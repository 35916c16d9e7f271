// What the operator res2net_fused_native::cuda_chain does, for callers in C++.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "common/named_arguments.h"

// What `launch_chain` in res2net_fused/backends/cuda/chain.py passes: how a plan cuts the launch, then the chain, with the
// group that passes or -1; pixel and slot: pitches of x and of out, in elements; fill_channels: of a slot of out, that are
// written; add_passed: whether the passed group is added to the first convolved one; overlaps: whether the kernel may begin while
// the one before it ends; weights_stand: whether that one writes neither weights nor biases.
#define RES2NET_LAUNCH_ARGUMENTS(INT, BOOL, FLOAT)                                                                         \
  INT(instance), INT(rows), INT(columns), INT(images), INT(whole), INT(warps_m), INT(warps_n), INT(slices), INT(stages),   \
      INT(row_parts), INT(channel_parts), INT(warps_k), INT(channels), INT(steps), INT(stride), INT(dilation), BOOL(adds), \
      INT(first_group), INT(passed_group), INT(pool), INT(x_pixel), INT(x_slot), INT(out_pixel), INT(out_slot),            \
      INT(fill_channels), BOOL(add_passed), BOOL(overlaps), BOOL(weights_stand)

namespace res2net_fused::cuda {

void cuda_chain(
    torch::stable::Tensor x, torch::stable::Tensor weight, torch::stable::Tensor bias, torch::stable::Tensor out,
    RES2NET_PARAMETERS(RES2NET_LAUNCH_ARGUMENTS), double lower, double upper);

}  // namespace res2net_fused::cuda
