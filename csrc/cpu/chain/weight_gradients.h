// The gradients of one convolution's weights and bias as the kernels leave them, and as the caller gets them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels/kernels.h"

namespace res2net_fused {

// The total of one part's tiles: (w, 9 taps, w padded) of the weights, then (w padded,) of the bias.
constexpr int64_t bias_total(int64_t channels) { return channels * 9 * round_up(channels, kUnit); }
constexpr int64_t total_floats(int64_t channels) { return round_up(bias_total(channels) + round_up(channels, kUnit), 16); }

// Scratch of WeightGradients::form.
constexpr int64_t form_floats(int64_t channels) { return kWeightSums + kWeightRows * 9 * round_up(channels, kUnit) + 16; }

// Fewer tiles do not pay for a total of a part's own.
constexpr int64_t kTilesWorthAPart = 16;

// Tiles of a block that are taken to the weights' gradient together: V and Z stay in cache, and the taps have enough of them.
int64_t weight_block_tiles(int64_t channels);

// The caller's gradients: of the weights (w, w, 3, 3) in the memory format asked for, and of the bias (w,).
struct WeightGradients {
  torch::stable::Tensor weights, bias;
  float *weights_data, *bias_data;
  int64_t channels;
  bool channels_last;

  WeightGradients(int64_t channels, bool channels_last);

  // Writes the sum of `count` totals, `each` floats apart. False where one of a weight is not finite: Winograd overflows
  // earlier than a convolution does, and makes NaN of Inf.
  bool gather(const float* totals, int64_t count, int64_t each) const;

  // Forms those of output channels first ... last from V of u and Z of all tiles, without a total of all channels.
  // for_each_block(f): calls f(Block, floats from v to its V and from z to its Z). False as `gather`.
  template <class Blocks>
  bool form(
      const Kernels& kernels, const TileGrid& grid, const Blocks& for_each_block, const float* v, const float* z, float* memory,
      int64_t first, int64_t last) const {
    float *const rows = memory + kWeightSums, *const biases = rows + kWeightRows * 9 * round_up(channels, kUnit);
    bool finite = true;
    for (int64_t o = first; o < last; o += kWeightRows) {
      const int64_t end = o + kWeightRows < last ? o + kWeightRows : last;
      bool add = false;
      for_each_block([&](Block block, int64_t at) {
        kernels.winograd_weight_gradient(channels, grid, block, v + at, z + at, memory, rows, biases, o, end, add);
        add = true;
      });
      finite &= write(rows, biases, 1, 0, o, end);
    }
    return finite;
  }

 private:
  bool write(const float* rows, const float* biases, int64_t count, int64_t each, int64_t first, int64_t last) const;
};

}  // namespace res2net_fused
