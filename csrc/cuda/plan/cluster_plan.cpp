// The launch of the cluster kernel: how many CTAs share an image, how they cut it, and what that is predicted to take.
#include <algorithm>

#include "cuda/plan/time_model.h"

namespace res2net_fused::cuda {
namespace {

// None of these was measured by us; those for remote stores and their arrival are guesses on the slow side.
constexpr int PROCESSOR_GROUP = 16;     // multiprocessors of which a cluster takes some; some groups have more
constexpr double MMA_LATENCY = 33;      // cycles from an mma to one that needs its sums
constexpr double TURN_LATENCY = 60;     // cycles of the loads before RES2NET_CHAIN_UNROLL slices
constexpr double WEIGHT_RATE = 64;      // bytes per cycle from L2 into one multiprocessor
constexpr double WEIGHT_LATENCY = 900;  // cycles from L2, under load
constexpr double REMOTE_RATE = 16;      // bytes per cycle to other multiprocessors of a cluster
constexpr double ARRIVAL_CYCLES = 500;  // from the last of them until all threads of the other CTA go on

double cycles_of_cta(
    const ChainProblem& problem, const ChainGeometry& g, const Instance& instance, const DeviceRates& rates, int resident) {
  const int warps = g.threads() / 32;
  const int per_scheduler = divide_up(resident * warps, 4);
  const double busy = std::min(4.0, double(resident) * warps);  // schedulers that have a warp
  const double turns = divide_up(3 * g.depths, g.warps_k);      // of RES2NET_CHAIN_UNROLL slices, of the busiest warp
  const double mma_per_turn = double(RES2NET_CHAIN_UNROLL) * instance.tiles * instance.columns;
  const double mma_cycles = 4 * rates.mma_cycles;  // of one scheduler
  double cycles = START_CYCLES;
  for (int step = 0; step < g.steps; step++) {
    const StepWork work = work_of_step(problem, g, instance, rates, step);
    const double outputs = double(work.tiles) * g.warps_n;  // warp tiles
    const int passes = divide_up(work.tiles, g.warps_m);
    const double alone = passes * per_scheduler * turns * mma_per_turn * mma_cycles;
    const double shared = resident * work.read_bytes / SHARED_RATE;
    // A warp's next product to the same sums waits for the last one, and each turn for its loads.
    const double turn = std::max(RES2NET_CHAIN_UNROLL * MMA_LATENCY, mma_per_turn * mma_cycles) + TURN_LATENCY;
    const double chain = passes * turns * turn;
    const double weights = double(g.chunks) * g.stage_bytes * (g.chunks > 1 ? passes : 1);
    const double rate = std::min(WEIGHT_RATE / resident, (g.stages - 1) * g.stage_bytes / WEIGHT_LATENCY);
    const double issue = resident * work.main_loop / busy;
    const double main_loop = std::max({std::max(alone, shared) / overlap(per_scheduler), chain, weights / rate, issue});
    cycles += main_loop + STEP_CYCLES + BARRIER_CYCLES * g.chunks * (g.chunks > 1 ? passes : 1);

    // All warps finish at once: nothing to hide behind.
    cycles += resident * work.finish / busy;
    if (g.warps_k > 1) {  // written, then read, but for each warp's own part
      const double sums = outputs * instance.tiles * instance.columns * 512 * (g.warps_k - 1);
      cycles += resident * 2 * sums / SHARED_RATE + 2 * passes * BARRIER_CYCLES;
    }
    cycles += resident * work.copies / busy;
    if (work.stores == 0) continue;
    cycles += resident * std::max(work.stores * 16 / REMOTE_RATE, work.sends / busy) + BARRIER_CYCLES + ARRIVAL_CYCLES;
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
  set_launch(problem, passes, g, index, tile, resident, plan);
  const DeviceRates rates = rates_of(device.major, device.minor);
  set_bounds(problem, passes, g, device, rates, plan);
  const int size = exchanges(problem, tile) ? tile.row_parts * tile.channel_parts : 1;
  const int group = std::min(PROCESSOR_GROUP, device.multiprocessors), groups = device.multiprocessors / group;
  const auto concurrent = [&](int per_multiprocessor) {  // CTAs
    return size == 1 ? per_multiprocessor * device.multiprocessors : groups * (per_multiprocessor * group / size) * size;
  };
  if (concurrent(resident) < size) return false;
  const int full = plan.ctas / concurrent(resident), rest = plan.ctas % concurrent(resident);
  double cycles = full * cycles_of_cta(problem, g, instance, rates, resident);
  int sharing = 1;
  while (rest > concurrent(sharing)) sharing++;
  if (rest > 0) cycles += cycles_of_cta(problem, g, instance, rates, sharing);
  plan.microseconds = 1e6 * (rates.launch + std::max(cycles / rates.clock, memory_seconds(problem, passes, plan, rates)));
  return true;
}

// All ways for a CTA's warps to share out its part of the images.
void try_warps(const ChainProblem& problem, bool passes, const DeviceLimits& device, int index, ChainTile tile, Found& found) {
  const Instance& instance = INSTANCE_TABLE[index];
  const int depths = problem.depths();
  const ChainGeometry g = make_geometry(problem, tile, 0, instance.columns);
  if (int64_t(g.lines) * g.pitch > MAX_POSITIONS || g.strips * int64_t(g.strip_bytes) > device.shared_per_block) return;
  const int tiles = divide_up(g.positions(0), 16 * instance.tiles);
  LaunchPlan candidate;
  for (int warps_m = 1; warps_m <= std::min(tiles, instance.warps / tile.warps_n); warps_m++) {
    if (warps_m > 1 && divide_up(tiles, warps_m) == divide_up(tiles, warps_m - 1)) continue;  // no pass less
    for (int warps_k = 1; warps_k <= std::min(3 * depths, instance.warps / tile.warps_n / warps_m); warps_k++) {
      tile.warps_m = warps_m, tile.warps_k = warps_k;
      for (int slices : {9 * depths, 3 * depths, 9, 3}) {
        tile.slices = slices;
        for (tile.stages = slices == 9 * depths ? 2 : 4; tile.stages >= 2; tile.stages--) {  // more are never slower
          if (!evaluate(problem, passes, device, index, tile, candidate)) continue;
          found.offer(candidate);
          break;
        }
      }
    }
  }
}

}  // namespace

void plan_clusters(const ChainProblem& problem, bool passes, const DeviceLimits& device, Found& found) {
  const bool sends = problem.adds && problem.steps > 1;
  if (problem.type == TF32 || (sends && (device.major < 9 || device.code < CLUSTER_CODE))) return;
  const int columns = divide_up(problem.channels, 8);
  for (int index = STRIP_INSTANCES; index < WGMMA_INSTANCES; index++) {
    const Instance& instance = INSTANCE_TABLE[index];
    ChainTile tile;
    for (tile.warps_n = 1; tile.warps_n <= instance.warps; tile.warps_n++) {
      tile.channel_parts = divide_up(columns, tile.warps_n * instance.columns);
      if (sends && tile.channel_parts > MAX_CLUSTER) continue;
      // Whole images, then row parts that send each other their halos, then strips that compute their halos.
      tile.whole = true, tile.row_parts = 1, tile.rows = problem.out_height(), tile.columns = problem.out_width();
      for (tile.images = 1; tile.images <= std::min<int64_t>(4, problem.stride > 1 ? 1 : problem.images); tile.images *= 2)
        if (sends ? tile.channel_parts > 1 : true) try_warps(problem, passes, device, index, tile, found);
      tile.whole = false, tile.images = 1;
      for (int rows : distinct_parts(problem.out_height(), 1 << 12)) {
        if (rows == problem.out_height() || rows * int64_t(problem.out_width()) > MAX_POSITIONS) continue;
        tile.rows = rows;
        tile.row_parts = divide_up(problem.out_height(), rows);
        if (parts_fit(problem, tile, instance.columns)) try_warps(problem, passes, device, index, tile, found);
        tile.row_parts = 1;
        if (tile.channel_parts > 1) try_warps(problem, passes, device, index, tile, found);
      }
      if (tile.channel_parts == 1) break;
    }
  }
}

}  // namespace res2net_fused::cuda
