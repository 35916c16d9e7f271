// The whole Bottle2neck in eval mode: conv1, the chain and conv3, some images at a time, which stay in cache.
#pragma once

#include "cpu/chain/forward.h"

namespace res2net_fused {

// Pixels of all tensors are dense: channels side by side, then columns, rows and images.
struct BlockData {
  const float* x;  // (N, H, W, inplanes)
  int64_t inplanes;
  const float *conv1, *conv1_bias;        // pointwise_floats(s*w, inplanes), bias_floats(s*w)
  const float *winograd, *direct, *bias;  // as in ChainData
  const float *conv3, *conv3_bias;        // pointwise_floats(outplanes, s*w), bias_floats(outplanes)
  const float* shortcut;                  // (N, H/stride, W/stride, outplanes), or null, or what is projected:
  const float* projection;                // pointwise_floats(outplanes, shortcut_planes), its bias added to conv3's; or null
  int64_t shortcut_planes, shortcut_height, shortcut_width, projection_stride;
  float* out;  // likewise
  int64_t outplanes;
  bool relu;  // at the end
};

void run_block(const ChainProblem& problem, const ChainPlan& plan, const BlockData& data, const Kernels& kernels);

}  // namespace res2net_fused
