// torch.ops.res2net_fused_native.cpu_weight_gradient: dK and db by Winograd of one 3x3 convolution, stride, dilation and groups 1.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "cpu/chain/plan.h"
#include "cpu/chain/weight_gradients.h"
#include "cpu/ops/op_arguments.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/work_split.h"

namespace res2net_fused {
namespace {

// How one call is shared out: blocks of tiles, which all lie in memory at once where the parts share them.
struct Shares {
  bool by_channels;  // each part takes all tiles to its own output channels; else its own tiles to a total of all channels
  int64_t parts, block_tiles, blocks;
};

Shares share_out(int64_t tiles, int64_t channels, int64_t threads) {
  threads = std::max<int64_t>(threads, 1);
  const bool by_channels = shares_channels(tiles, channels, threads);
  const int64_t most = by_channels ? kSharedBlockTiles : weight_block_tiles(channels);
  const int64_t parts = by_channels ? threads : std::clamp<int64_t>(tiles / kTilesWorthAPart, 1, threads);
  const int64_t each = by_channels ? tiles : (tiles + parts - 1) / parts, blocks = (each + most - 1) / most;
  return {by_channels, parts, (each + blocks - 1) / blocks, blocks};
}

// [gradient of the weights (w, w, 3, 3), gradient of the bias (w,)]; nothing where one of a weight is not finite.
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
  const int64_t padded = round_up(channels, kUnit), tiles = batch * grid.per_image(), panels = panel_count(channels);
  const Shares shares = share_out(tiles, channels, torch::stable::get_num_threads());

  Step step{};
  step.in_height = step.height = height;
  step.in_width = step.width = width;
  step.channels = channels;
  step.groups = step.stride = step.row_dilation = step.column_dilation = 1;
  step.source = {static_cast<const float*>(u.const_data_ptr()), u.stride(0), u.stride(2), u.stride(3)};
  step.source_full_vectors = channels == padded;
  const ConstView gradient{static_cast<const float*>(dz.const_data_ptr()), dz.stride(0), dz.stride(2), dz.stride(3)};

  const WeightGradients gradients(channels, channels_last);
  const int64_t block_floats = PointLayout::panels_first(shares.block_tiles, channels).floats();
  const int64_t blocks = shares.by_channels ? shares.blocks : shares.parts, each = total_floats(channels);
  const int64_t own = shares.by_channels ? form_floats(channels) : each + kWeightSums;
  const Scratch scratch(2 * blocks * block_floats + shares.parts * own);
  float *const v = scratch.data(), *const z = v + blocks * block_floats, *const rest = z + blocks * block_floats;
  std::atomic<bool> finite{true};
  const WorkSplit split{shares.parts};
  if (!shares.by_channels) {
    float *const totals = rest, *const sums = rest + shares.parts * each;
    split.for_each([&](int64_t part) {
      float *const own_v = v + part * block_floats, *const own_z = z + part * block_floats, *const total = totals + part * each;
      for_each_block(split.share(tiles, part), split.share(tiles, part + 1), shares.block_tiles, [&](Block block, int64_t b) {
        kernels.winograd_input(step, grid, block, own_v, PointLayout::panels_first(block.count, channels), 0, padded);
        kernels.winograd_gradient(gradient, channels, grid, block, own_z, 0, padded);
        kernels.winograd_weight_gradient(
            channels, grid, block, own_v, own_z, sums + part * kWeightSums, total, total + bias_total(channels), 0, channels,
            b > 0);
      });
    });
    finite = gradients.gather(totals, shares.parts, each);
  } else {
    const auto blockwise = [&](const auto& f) {
      for_each_block(0, tiles, shares.block_tiles, [&](Block block, int64_t b) { f(block, b * block_floats); });
    };
    const auto first_of = [&](int64_t part) { return split.share(panels, part) * kPanel; };
    split.for_each([&](int64_t part) {
      const int64_t first = first_of(part), last = std::min(first_of(part + 1), padded);
      blockwise([&](Block block, int64_t at) {
        kernels.winograd_input(step, grid, block, v + at, PointLayout::panels_first(block.count, channels), first, last);
        kernels.winograd_gradient(gradient, channels, grid, block, z + at, first, last);
      });
    });
    split.for_each([&](int64_t part) {
      const int64_t first = first_of(part), last = std::min(first_of(part + 1), channels);
      if (!gradients.form(kernels, grid, blockwise, v, z, rest + part * own, first, last)) finite = false;
    });
  }
  return finite ? std::vector<Tensor>{gradients.weights, gradients.bias} : std::vector<Tensor>{};
}

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def("cpu_weight_gradient(Tensor dz, Tensor u, bool channels_last, int instruction_set) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) {
  m.impl("cpu_weight_gradient", TORCH_BOX(&res2net_fused::weight_gradient));
}
