#include "cpu/chain/weight_gradients.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>

namespace res2net_fused {
namespace {

constexpr int64_t kBlockFloats = 192 << 10;  // of V and Z together: three quarters of an L2 cache of 1 MB
constexpr uint32_t kExponent = 0x7f800000;   // all its bits are set in Inf and NaN
constexpr int64_t kFewestBlockTiles = 32;
constexpr int64_t kGrainFloats = 1 << 15;  // of weights: what pays for a second thread

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

torch::stable::Tensor empty_weights(int64_t channels, bool channels_last) {
  const int64_t sizes[4] = {channels, channels, 3, 3};
  return torch::stable::empty(
      {sizes, 4}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace

int64_t weight_block_tiles(int64_t channels) {
  const int64_t fitting = kBlockFloats / (2 * kPoints * round_up(channels, kUnit)) / 8 * 8;
  return std::clamp(fitting, kFewestBlockTiles, kMaxBlockTiles);
}

WeightGradients::WeightGradients(int64_t channels, bool channels_last)
    : weights(empty_weights(channels, channels_last)), bias(torch::stable::empty({channels}, ScalarType::Float)),
      weights_data(static_cast<float*>(weights.mutable_data_ptr())), bias_data(static_cast<float*>(bias.mutable_data_ptr())),
      channels(channels), channels_last(channels_last) {}

// rows, biases: of output channels first ... last.
bool WeightGradients::write(
    const float* rows, const float* biases, int64_t count, int64_t each, int64_t first, int64_t last) const {
  const int64_t padded = round_up(channels, kUnit);
  const int64_t tap_stride = channels_last ? channels : 1, stride = channels_last ? 1 : 9;
  uint32_t infinite = 0;  // not 0 where a sum is not finite
  for (int64_t o = first; o < last; o++) {
    for (int64_t tap = 0; tap < 9; tap++) {
      const float* const from = rows + ((o - first) * 9 + tap) * padded;
      float* const to = weights_data + o * 9 * channels + tap * tap_stride;
      for (int64_t k = 0; k < channels; k++) {
        float sum = from[k];
        for (int64_t i = 1; i < count; i++) sum += from[i * each + k];
        infinite |= static_cast<uint32_t>((std::bit_cast<uint32_t>(sum) & kExponent) == kExponent);
        to[k * stride] = sum;
      }
    }
    bias_data[o] = 0;
    for (int64_t i = 0; i < count; i++) bias_data[o] += biases[i * each + o - first];
  }
  return infinite == 0;
}

bool WeightGradients::gather(const float* totals, int64_t count, int64_t each) const {
  const int64_t grain = std::max<int64_t>(1, kGrainFloats / (9 * channels));
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, channels, grain, [&](int64_t first, int64_t last) {
    const float* const rows = totals + first * 9 * round_up(channels, kUnit);
    if (!write(rows, totals + bias_total(channels) + first, count, each, first, last)) finite = false;
  });
  return finite;
}

}  // namespace res2net_fused
