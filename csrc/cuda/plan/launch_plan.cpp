#include "cuda/plan/launch_plan.h"

#include <algorithm>
#include <tuple>

#include "cuda/plan/time_model.h"

namespace res2net_fused::cuda {
namespace {

double cycles_of_cta(
    const ChainProblem& problem, const ChainGeometry& g, const Instance& instance, const DeviceRates& rates, int resident) {
  const int warps = g.warps_m * g.warps_n;
  const int per_scheduler = divide_up(resident * warps, 4);
  const bool wgmma = instance.is_wgmma();
  const double mma_cycles = cycles_of_mma(instance, rates);
  const auto reached = [&](int some_warps) {  // of a CTA
    const int of_all = divide_up(resident * some_warps, 4);
    return wgmma ? overlap_async(of_all) : overlap(of_all);
  };
  const double busy = std::min(4.0, double(resident) * warps);  // schedulers that have a warp
  // Part of the epilogue and of the loads hides behind other warps' products.
  const double exposed = per_scheduler >= 3 ? 0.4 : per_scheduler == 2 ? 0.6 : 1;
  double cycles = START_CYCLES;
  for (int step = 0; step < g.steps; step++) {
    const StepWork work = work_of_step(problem, g, instance, rates, step);
    const int passes = divide_up(work.tiles, g.warps_m);
    // One CTA alone is bound by its busiest tensor core; several share all four. In the last pass some warps have no tile.
    const int last_warps = (work.tiles - (passes - 1) * g.warps_m) * g.warps_n;
    const double busiest = (passes - 1) * divide_up(warps, 4) / reached(warps) + divide_up(last_warps, 4) / reached(last_warps);
    const double alone = busiest * work.products_of_tile * 4 * mma_cycles;
    const double together = resident * work.products * mma_cycles;
    const double shared = resident * work.read_bytes / SHARED_RATE;
    const double main_loop = std::max(alone, std::max(together, shared) / reached(warps));
    const double rest = resident * (work.finish + work.copies) / busy;
    const int rounds = g.chunks > 1 ? passes : 1;  // through the weights
    cycles += std::max(main_loop + exposed * rest, resident * work.instructions() / busy) + STEP_CYCLES +
              rounds * (BARRIER_CYCLES * g.chunks + (wgmma ? DRAIN_CYCLES : 0));
  }
  return cycles;
}

// Predicts the tile's time; false if it does not fit the device.
bool evaluate(
    const ChainProblem& problem, bool passes, const DeviceLimits& device, int index, const ChainTile& tile, LaunchPlan& plan) {
  const Instance& instance = INSTANCE_TABLE[index];
  const ChainGeometry g = geometry_of(problem, tile, index);
  if (!counts_fit(g)) return false;  // first: the bytes of more would not fit an int
  if (g.shared_bytes > device.shared_per_block || g.threads() > 32 * instance.warps) return false;
  const int resident = resident_ctas(g, instance, device);
  if (resident < 1) return false;
  const DeviceRates rates = rates_of(device.major, device.minor);

  set_launch(problem, passes, g, index, tile, resident, plan);
  const int concurrent = resident * device.multiprocessors;
  const int full = plan.ctas / concurrent, rest = plan.ctas % concurrent;
  double cycles = full * cycles_of_cta(problem, g, instance, rates, resident);
  if (rest > 0) cycles += cycles_of_cta(problem, g, instance, rates, divide_up(rest, device.multiprocessors));
  set_bounds(problem, passes, g, device, rates, plan);
  plan.microseconds = 1e6 * (rates.launch + std::max(cycles / rates.clock, memory_seconds(problem, passes, plan, rates)));
  return true;
}

// Whether two launches have the same parts of the images under the same instance.
bool same_cut(const LaunchPlan& a, const LaunchPlan& b) {
  const auto cut = [](const LaunchPlan& p) {
    const ChainTile& t = p.tile;
    return std::tuple(p.instance, t.whole, t.rows, t.columns, t.images, t.row_parts, t.channel_parts);
  };
  return cut(a) == cut(b);
}

}  // namespace

void Found::offer(const LaunchPlan& plan) {
  if (plan.microseconds < best.microseconds) best = plan;
  if (!all_) return;
  const auto known = std::find_if(cuts.begin(), cuts.end(), [&](const LaunchPlan& cut) { return same_cut(cut, plan); });
  if (known == cuts.end())
    cuts.push_back(plan);
  else if (plan.microseconds < known->microseconds)
    *known = plan;
}

int instance_for(int channels, DataType type) {
  const int columns = divide_up(channels, 8), depths = divide_up(channels, depth_channels(type));
  int best = -1, best_columns = 0;
  for (int i = 0; i < STRIP_INSTANCES; i++) {
    const Instance& instance = INSTANCE_TABLE[i];
    const int warps_n = divide_up(columns, instance.columns);
    if (!instance.runs(type)) continue;
    if (instance.depths != 0 ? instance.depths != depths || warps_n > 1 : warps_n > instance.warps) continue;
    const int padded = warps_n * instance.columns;
    // An instance made for this number of channels wins, then the least padding, then the wider one.
    const bool better = best < 0 || (INSTANCE_TABLE[best].depths == 0 &&
                                     (instance.depths != 0 || padded < best_columns ||
                                      (padded == best_columns && instance.columns > INSTANCE_TABLE[best].columns)));
    if (better) best = i, best_columns = padded;
  }
  return best;
}

int packed_columns_for(int channels, DataType type) {
  const int columns = INSTANCE_TABLE[instance_for(channels, type)].columns;
  return divide_up(divide_up(channels, 8), columns) * columns;
}

bool runs_on(const ChainProblem& problem, int index) {
  const int usual = instance_for(problem.channels, problem.type);
  if (index < 0 || index >= INSTANCES_COUNT || usual < 0) return false;
  const Instance& instance = INSTANCE_TABLE[index];
  if (!instance.is_wgmma()) return index == usual || (instance.cluster && instance.runs(problem.type));
  const int columns = packed_columns_for(problem.channels, problem.type);
  return problem.stride == 1 && instance.runs(problem.type) && columns % instance.columns == 0 &&
         4 * columns / instance.columns <= instance.warps;
}

LaunchPlan plan_launch(
    const ChainProblem& problem, bool passes, const DeviceLimits& device, std::string& reason, bool clusters, int rank) {
  reason.clear();
  if (device.major < 8) {
    reason = "the device has compute capability " + std::to_string(device.major) + "." + std::to_string(device.minor) +
             "; at least 8.0 is needed";
    return {};
  }
  if (device.code == 0) {
    reason = "the CUDA library holds no code for compute capability " + std::to_string(device.major) + "." +
             std::to_string(device.minor) + "; build it where RES2NET_FUSED_CUDA_ARCHS names that, or is not set";
    return {};
  }
  if (problem.channels % (4 / bytes_of(problem.type)) != 0) {
    reason = "a group has " + std::to_string(problem.channels) + " channels; in half precision an even number is needed";
    return {};
  }
  const struct {
    const char* what;
    int64_t value, most;
  } limits[] = {
      {"the batch", problem.images, MAX_IMAGES},      {"the height of x", problem.height, MAX_ROWS},
      {"the width of x", problem.width, MAX_COLUMNS}, {"stride", problem.stride, MAX_POSITIONS},
      {"dilation", problem.dilation, MAX_POSITIONS},  {"the number of convolutions", problem.steps, 1024},
  };
  for (const auto& limit : limits) {
    if (limit.value <= limit.most) continue;
    reason = std::string(limit.what) + " is " + std::to_string(limit.value) + "; at most " + std::to_string(limit.most) +
             " is allowed";
    return {};
  }
  const int index = instance_for(problem.channels, problem.type);
  if (index < 0) {
    reason = "a group has " + std::to_string(problem.channels) + " channels; at most 512 are allowed";
    return {};
  }
  const int64_t slot_bytes = 16 * int64_t(divide_up(problem.channels * bytes_of(problem.type), 16));
  // Of a block's pixel with the groups of x and of y beside each other these are more than half. Below 2^56.
  const int64_t image_bytes = problem.height * int64_t(problem.width) * slot_bytes * (problem.steps + 1);
  if (image_bytes > MAX_IMAGE_BYTES || image_bytes * problem.images > MAX_BATCH_BYTES) {
    const bool one = image_bytes > MAX_IMAGE_BYTES;
    reason =
        (one ? "an image of x has " + std::to_string(image_bytes) : "x has " + std::to_string(image_bytes * problem.images)) +
        " bytes, its groups padded to 16; at most " + std::to_string(one ? MAX_IMAGE_BYTES : MAX_BATCH_BYTES) + " are allowed";
    return {};
  }
  const int depths = problem.depths();
  ChainTile tile;
  LaunchPlan candidate;
  Found found(rank > 0);
  std::vector<int> instances{index};
  for (int i = WGMMA_INSTANCES; device.wgmma && i < INSTANCES_COUNT; i++)
    if (runs_on(problem, i)) instances.push_back(i);
  const auto try_warps = [&](int index) {
    const Instance& instance = INSTANCE_TABLE[index];
    tile.warps_n = packed_columns_for(problem.channels, problem.type) / instance.columns;
    const int step = instance.warps_together();
    for (tile.warps_m = step; tile.warps_m * tile.warps_n <= instance.warps; tile.warps_m += step)
      if (evaluate(problem, passes, device, index, tile, candidate)) found.offer(candidate);
  };
  const auto try_all = [&] {
    for (int slices : {9 * depths, 3 * depths, 9, 3}) {
      for (int stages = 2; stages <= 4; stages++) {
        tile.slices = slices, tile.stages = stages;
        for (int index : instances) try_warps(index);
        if (slices == 9 * depths) break;  // a whole convolution in each of two stages is prefetch enough
      }
    }
  };
  tile.whole = true, tile.rows = problem.out_height(), tile.columns = problem.out_width();
  for (int images : {1, 2, 3, 4, 6, 8}) {
    if (images > problem.images || (images > 1 && problem.stride > 1)) break;
    tile.images = images;
    try_all();
  }
  tile.whole = false, tile.images = 1;
  for (int columns : distinct_parts(problem.out_width(), 1 << 12)) {
    tile.columns = columns;
    if (columns < std::min(problem.out_width(), 8)) break;
    bool fits = false;
    for (int rows : distinct_parts(problem.out_height(), 1 << 12)) {
      if (int64_t(rows) * columns > MAX_POSITIONS) continue;
      tile.rows = rows;
      const double before = found.best.microseconds;
      try_all();
      fits = fits || found.best.microseconds < before;
    }
    if (found.any() && !fits) break;  // narrower parts only add halo
  }
  if (clusters) plan_clusters(problem, passes, device, found);
  if (!found.any()) {
    ChainProblem one_image = problem;
    one_image.images = 1;
    if (problem.images > 1) plan_launch(one_image, passes, device, reason, clusters);
    if (problem.images > 1 && reason.empty())
      reason = "x has " + std::to_string(problem.images) + " images, whose parts are more than the " +
               std::to_string(INT32_MAX) + " blocks of a launch";
    else
      reason = "no part of an image with its halo fits the " + std::to_string(device.shared_per_block) +
               " bytes of shared memory that a block may have";
  }
  if (rank == 0 || found.cuts.empty()) return found.best;
  std::stable_sort(found.cuts.begin(), found.cuts.end(), [](const LaunchPlan& a, const LaunchPlan& b) {
    return a.microseconds < b.microseconds;
  });
  return found.cuts[std::min(size_t(rank), found.cuts.size() - 1)];
}

double predict_steps(const ChainProblem& problem, bool passes, const DeviceLimits& device) {
  const DeviceRates rates = rates_of(device.major, device.minor);
  const double pixels = double(problem.images) * problem.out_height() * problem.out_width();
  int padded = 16;
  while (padded < problem.channels && padded < 128) padded *= 2;
  padded = divide_up(problem.channels, padded) * padded;
  // A tap's pixels come from L2 each time, padded or not: nine reads of u by every tile of output channels.
  const double column_tiles = divide_up(problem.channels, 128);
  const int bytes = bytes_of(problem.type);
  const double weight_reads = pixels / 128 * padded * padded * 9 * bytes;
  const double l2 = (pixels * problem.stride * 9 * padded * bytes * column_tiles + weight_reads) / rates.l2;
  const double products = pixels * 9 * double(padded) * padded;
  const double tensor =
      2 * products / mma_flops(problem.type) * rates.mma_cycles / (0.75 * rates.clock * device.multiprocessors);
  const double group = double(problem.images) * problem.height * problem.width * problem.slot_bytes();
  const double dram = (problem.adds ? 4 : 2) * group / rates.dram;
  const double latency = 3.0e-6;  // of a small launch: loads, products, stores one after the other
  const double step = std::max({l2, tensor, dram});
  const double pass = passes ? 2 * group / rates.dram : 0;
  if (!problem.adds) return 1e6 * (rates.launch + latency + problem.steps * step + pass);  // one launch
  return 1e6 * (rates.launch + problem.steps * (latency + step) + (problem.steps - 1) * 1.0e-6 + pass);
}

std::vector<int64_t> plan_as_numbers(
    const ChainProblem& problem, bool passes, const DeviceLimits& device, std::string& reason, bool clusters, int rank) {
  const LaunchPlan plan = plan_launch(problem, passes, device, reason, clusters, rank);
  if (!reason.empty()) return {};
  const ChainTile& t = plan.tile;
  // clang-format off
  return {plan.instance, t.rows, t.columns, t.images, t.whole, t.warps_m, t.warps_n, t.slices, t.stages,
          t.row_parts, t.channel_parts, t.warps_k, plan.ctas, plan.threads, plan.shared_bytes,
          plan.ctas_per_multiprocessor, plan.packed_columns, plan.dram_bytes, plan.loaded_bytes, plan.flops, plan.mma_flops,
          int64_t(1000 * plan.microseconds), int64_t(1000 * predict_steps(problem, passes, device)),
          capability_of(device.major, device.minor), rates_of(device.major, device.minor).capability,
          int64_t(1000 * plan.bounds.issue), int64_t(1000 * plan.bounds.tensor), int64_t(1000 * plan.bounds.shared),
          int64_t(1000 * plan.bounds.memory)};
  // clang-format on
}

}  // namespace res2net_fused::cuda
