// torch.ops.res2net_fused_native.cpu_weight_gradient: of one 3x3 convolution (stride, dilation and groups 1), by Winograd.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/chain_plan.h"
#include "cpu/op_arguments.h"

namespace res2net_fused {
namespace {

constexpr int64_t kBlockFloats = 192 << 10;  // of V and Z together: three quarters of an L2 cache of 1 MB
constexpr int64_t kTilesWorthAPart = 16;     // fewer tiles than this pay neither for a thread's total nor for its taps

// How one call is shared out: tiles, and where these are too few the output channels too.
struct Shares {
  int64_t tiles, panels;
};

Shares share_out(int64_t all_tiles, int64_t all_panels, int64_t threads) {
  const int64_t tiles = std::clamp<int64_t>(all_tiles / kTilesWorthAPart, 1, std::max<int64_t>(threads, 1));
  return {tiles, std::clamp<int64_t>(threads / tiles, 1, all_panels)};
}

// Sums the parts' totals (9, w, w padded) of output channels first ... last into `to`, (o, 9, k) where channels_last, else
// (o, k, 9); whether all is finite.
bool gather_weights(
    const float* totals, int64_t parts, int64_t each, int64_t channels, int64_t first, int64_t last, bool channels_last,
    float* to) {
  const int64_t padded = round_up(channels, kUnit);
  bool finite = true;
  for (int64_t tap = 0; tap < 9; tap++) {
    for (int64_t k = 0; k < channels; k++) {
      const float* from = totals + (tap * channels + k) * padded;
      for (int64_t o = first; o < last; o++) {
        float sum = from[o];
        for (int64_t part = 1; part < parts; part++) sum += from[part * each + o];
        finite &= std::isfinite(sum);
        to[channels_last ? (o * 9 + tap) * channels + k : (o * channels + k) * 9 + tap] = sum;
      }
    }
  }
  return finite;
}

// [gradient of the weights (w, w, 3, 3), gradient of the bias (w,)]; nothing where a weight's is not finite: Winograd overflows
// earlier than a convolution does, and makes NaN of Inf.
std::vector<Tensor> weight_gradient(
    const Tensor& dz_given, const Tensor& u_given, bool channels_last, int64_t instruction_set) {
  STD_TORCH_CHECK(
      dz_given.is_cpu() && u_given.is_cpu() && dz_given.dim() == 4 && u_given.dim() == 4,
      "dz and u must be four-dimensional tensors on the CPU");
  const Tensor dz = as_nhwc_floats(dz_given), u = as_nhwc_floats(u_given);
  const int64_t batch = u.size(0), channels = u.size(1), height = u.size(2), width = u.size(3);
  STD_TORCH_CHECK(
      dz.size(0) == batch && dz.size(1) == channels && dz.size(2) == height && dz.size(3) == width && batch >= 1 &&
          channels >= 1 && height >= 2 && width >= 2,
      "dz and u must be of one shape, with at least one image of 2 x 2 pixels");
  const Kernels& kernels = kernels_of(instruction_set);
  const TileGrid grid = covering_tiles(height, width);
  const int64_t padded = round_up(channels, kUnit), all_tiles = batch * grid.per_image();
  const int64_t panels = panel_count(channels);
  const Shares shares = share_out(all_tiles, panels, torch::stable::get_num_threads());

  Step step{};
  step.in_height = step.height = height;
  step.in_width = step.width = width;
  step.channels = channels;
  step.groups = step.stride = step.row_dilation = step.column_dilation = 1;
  step.source = {static_cast<const float*>(u.const_data_ptr()), u.stride(0), u.stride(2), u.stride(3)};
  step.source_full_vectors = channels == padded;
  const ConstView gradient{static_cast<const float*>(dz.const_data_ptr()), dz.stride(0), dz.stride(2), dz.stride(3)};

  const int64_t fitting = kBlockFloats / (2 * kPoints * padded) / 8 * 8;
  const int64_t block_tiles = std::min({std::clamp<int64_t>(fitting, 16, kMaxBlockTiles), all_tiles});
  const int64_t v_floats = round_up(kPoints * point_pitch(block_tiles, padded), 16);
  const int64_t each = round_up((9 * channels + 1) * padded, 16), parts = shares.tiles * shares.panels;
  const int64_t work = round_up(2 * v_floats + kWeightSums, 1024) + 16;
  const Scratch scratch(shares.tiles * each + parts * work);
  float* const totals = scratch.data();
  std::memset(totals, 0, static_cast<size_t>(shares.tiles * each) * sizeof(float));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t last_part) {
    for (int64_t part = first_part; part < last_part; part++) {
      const int64_t i = part / shares.panels, j = part % shares.panels;
      float* const v = totals + shares.tiles * each + part * work;
      float* const z = v + v_floats;
      const int64_t first = all_tiles * i / shares.tiles, last = all_tiles * (i + 1) / shares.tiles;
      const int64_t blocks = (last - first + block_tiles - 1) / block_tiles;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t from = first + (last - first) * b / blocks, to = first + (last - first) * (b + 1) / blocks;
        const Block block{from, to - from};
        kernels.winograd_input(step, grid, block, v, 0, padded);
        kernels.winograd_weights(
            gradient, channels, grid, block, v, z, z + v_floats, totals + i * each, panels * j / shares.panels,
            panels * (j + 1) / shares.panels);
      }
    }
  });

  const int64_t sizes[4] = {channels, channels, 3, 3};
  Tensor weights = torch::stable::empty(
      {sizes, 4}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const Tensor rows = new_floats(1, channels);
  const Tensor bias = torch::stable::view(rows, {channels});
  float* const to = static_cast<float*>(weights.mutable_data_ptr());
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, panels, std::max<int64_t>(1, 4096 / channels), [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      const int64_t end = std::min((panel + 1) * kPanel, channels);
      if (!gather_weights(totals, shares.tiles, each, channels, panel * kPanel, end, channels_last, to)) finite = false;
    }
  });
  float* const biases = static_cast<float*>(bias.mutable_data_ptr());
  for (int64_t c = 0; c < channels; c++) {
    biases[c] = 0;
    for (int64_t i = 0; i < shares.tiles; i++) biases[c] += totals[i * each + 9 * channels * padded + c];
  }
  if (!finite) return {};
  return {weights, bias};
}

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def("cpu_weight_gradient(Tensor dz, Tensor u, bool channels_last, int instruction_set) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) {
  m.impl("cpu_weight_gradient", TORCH_BOX(&res2net_fused::weight_gradient));
}
