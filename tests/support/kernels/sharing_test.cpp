// How work on one image is shared out among many threads, counted by kernels that compute nothing.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/chain/block.h"
#include "cpu/chain/stem.h"

namespace {

using namespace res2net_fused;

// What one parallel loop gave its parts: the work of each unit, in rows or tiles times panels.
struct Region {
  int64_t number;
  const char* kind;
  std::vector<int64_t> units;

  // Of the time of all threads, the share that is work, where none waits for a unit of another size.
  double busy(int64_t threads) const {
    int64_t sum = 0;
    for (const int64_t unit : units) sum += unit;
    const int64_t rounds = divide_up(static_cast<int64_t>(units.size()), threads);
    return static_cast<double>(sum) / static_cast<double>(threads * rounds * *std::max_element(units.begin(), units.end()));
  }
};

std::vector<Region> regions;

void note(const char* kind, int64_t work) {
  const int64_t now = torch::stable::sharing.regions;
  if (regions.empty() || regions.back().number != now) regions.push_back({now, kind, {}});
  regions.back().units.push_back(work);
}

Kernels counting_kernels(int64_t panels_per_pass) {
  Kernels k{};
  k.panels_per_pass = panels_per_pass;
  k.winograd_input = [](const Step&, const TileGrid&, Block, float*, const PointLayout&, int64_t, int64_t) {};
  k.winograd_output = [](const Step&, const TileGrid&, Block block, const float*, float*, float*, int64_t first, int64_t last) {
    note("chain", block.count * (last - first));
    return true;
  };
  k.direct_rows = [](const Step&, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
    note("chain", (last - first) * (last_panel - first_panel));
  };
  k.copy_rows = [](ConstView, ConstView, View, int64_t, int64_t, int64_t, int64_t, int64_t) {};
  k.pass_rows = [](ConstView, int64_t, int64_t, View, int64_t, int64_t, int64_t, int64_t, Pool, int64_t, int64_t) {};
  k.pointwise_rows = [](const Pointwise&, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
    note("1x1", (last - first) * (last_panel - first_panel));
  };
  k.convolve_row = [](const RowConvolution&, const float* const*, float*, int64_t) {};
  k.max_row = [](const MaxRow&, const float* const*, float*) { note("stem", 1); };
  return k;
}

bool barriers_are_known = true;  // of every block so far, beside those of its 1x1 convolutions

// The first block of a stage, which projects its shortcut, or one behind it, on one image.
std::vector<Region> block_regions(int64_t width, int64_t scale, int64_t stage, bool first, const Kernels& kernels) {
  static std::vector<float> memory(1 << 20);  // nothing is read there
  const int64_t planes = 256 << stage, stride = first && stage > 0 ? 2 : 1, size = (56 >> stage) * stride;
  const ChainProblem problem{
      1, size, size, width << stage, scale - 1, stride, 1, 1, !first, Passthrough::last, first ? Pool::avg3 : Pool::none,
      {Activation::relu}};
  BlockData data{};
  data.x = data.shortcut = data.winograd = data.direct = data.bias = data.out = memory.data();
  data.inplanes = !first ? planes : stage == 0 ? 64 : planes / 2;
  data.outplanes = planes;
  data.projection = first ? memory.data() : nullptr;
  data.shortcut_planes = data.inplanes;
  data.shortcut_height = data.shortcut_width = size;
  data.projection_stride = stride;
  regions.clear();
  const int64_t threads = torch::stable::get_num_threads();
  const ChainPlan plan = plan_chain(problem, ArithmeticChoice::automatic, threads);
  const int64_t before = torch::stable::sharing.regions;
  run_block(problem, plan, data, kernels);
  const int64_t around = data.projection_stride > 1 ? 3 : 2;  // conv1, conv3, the pixels that a strided projection reads
  barriers_are_known &= torch::stable::sharing.regions - before == chain_barriers(problem, plan, kernels) + around;
  return regions;
}

// One image of 224 x 224 through 7x7, or three 3x3, and the pooling: parts and rows of the output.
bool stem_is_shared(const std::vector<int64_t>& sizes, int64_t threads, const Kernels& kernels) {
  static std::vector<float> memory(3 * 224 * 224 + 56 * 56 * 64);
  StemData data{};
  data.x = memory.data();
  data.out = memory.data() + 3 * 224 * 224;
  data.batch = data.pixel = 1;
  data.channels = 3;
  data.height = data.width = data.row = 224;
  data.channel = 224 * 224;
  for (const int64_t size : sizes) {
    const int64_t stride = data.convolutions.empty() ? 2 : 1;
    data.convolutions.push_back({64, size, size, stride, stride, size / 2, size / 2, nullptr, nullptr});
  }
  data.pools = true;
  regions.clear();
  run_stem(data, kernels);
  return torch::stable::sharing.parts == std::min<int64_t>(threads, 56) && regions.size() == 1 && regions[0].units.size() == 56;
}

}  // namespace

// Units of one image keep seven tenths of all threads at work in every step of Res2Net-50 26w4s and 14w8s, and are at least 16
// at the first two stages. Behind these, a chain without a stride has so many, which docs/kernels.md names.
bool test_sharing() {
  struct Case {
    int64_t width, scale, stage, units;
  };
  bool right = true;
  for (const int64_t panels : {1, 3}) {
    const Kernels kernels = counting_kernels(panels);
    for (const int64_t threads : {2, 4, 8, 16, 32, 64}) {
      torch::stable::sharing.threads = static_cast<uint32_t>(threads);
      const auto miss = [&](const std::string& what) {
        std::printf("MISS sharing out, %d threads, passes of %d: %s\n", int(threads), int(panels), what.c_str());
        right = false;
      };
      for (const Case& c : {Case{26, 4, 0, 0}, {26, 4, 1, 0}, {26, 4, 2, 7}, {26, 4, 3, 13}, {14, 8, 0, 0}, {14, 8, 1, 0},
                            {14, 8, 2, 16}, {14, 8, 3, 7}}) {
        for (const bool first : {false, true}) {
          const std::vector<Region> found = block_regions(c.width, c.scale, c.stage, first, kernels);
          const std::string name = std::to_string(c.width << c.stage) + " channels, " + (first ? "first" : "other") + " block";
          // Convolutions with a stride do not wait for each other: they are one step.
          const int64_t steps = first && c.stage > 0 ? 3 : c.scale + 1;
          if (static_cast<int64_t>(found.size()) != steps) miss(name + " has " + std::to_string(found.size()) + " steps");
          for (const Region& region : found) {
            const bool few = region.kind == std::string("chain") && !first && c.stage >= 2;
            const auto units = static_cast<int64_t>(region.units.size());
            const bool enough = few            ? units == std::min(threads, c.units)
                                : c.stage >= 2 ? region.busy(threads) >= 0.7
                                               : region.busy(threads) >= 0.7 && units >= std::min<int64_t>(threads, 16);
            if (!enough) {
              miss(name + ", " + region.kind + " in " + std::to_string(units) + " units, busy " +
                   std::to_string(region.busy(threads)));
            }
          }
        }
      }
      if (!barriers_are_known) miss("barriers of a chain");
      for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{7}, {3, 3, 3}}) {
        if (!stem_is_shared(sizes, threads, kernels)) miss("stem of " + std::to_string(sizes.size()));
      }
    }
  }
  torch::stable::sharing.threads = 3;
  return right;
}
