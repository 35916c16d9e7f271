// What the plans of the strip kernel and of the cluster kernel count alike.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/plan/device_rates.h"
#include "cuda/plan/launch_plan.h"

namespace res2net_fused::cuda {

// Offsets within the images of one CTA are ints. Of an image, its groups padded to 16 bytes as the block lays them out:
constexpr int64_t MAX_IMAGE_BYTES = int64_t(1) << 30;
constexpr int64_t MAX_BATCH_BYTES = int64_t(1) << 44;  // keeps every count of the model below 2^63
constexpr int64_t MAX_IMAGES = int64_t(1) << 30;
constexpr int MAX_ROWS = 1 << 15, MAX_COLUMNS = 1 << 20;
constexpr int MAX_POSITIONS = 1 << 15;  // keeps FastDivisor exact

constexpr int registers_of(const Instance& instance) { return std::min(255, 65536 / (32 * instance.warps) / 8 * 8); }

// Instructions of a thread, read off the machine code of nvcc 13.0 (`res2net-fused info --kernels`; a test compares them), of
// which the model counts one per cycle and scheduler.
constexpr double COPY_INSTRUCTIONS = 13;           // one cp.async with its index arithmetic
constexpr double WEIGHT_INSTRUCTIONS = 12;         // the same of weights, where the code has no bulk copies,
constexpr double WEIGHT_INSTRUCTIONS_PART = 24;    // and of a part of their columns
constexpr double SEND_INSTRUCTIONS = 40;           // a guess, as the next: of 16 bytes to other CTAs, and as many for every
constexpr double SEND_PER_RECEIVER = 5;            // receiver
constexpr double FINISH_PER_ROW = 20;              // of an epilogue's half tile
constexpr double FINISH_PER_COLUMN = 11;           // and of each pair of channels in it,
constexpr double FINISH_PER_COLUMN_SURE = 7;       // that every group of the instance fills,
constexpr double FINISH_PER_COLUMN_TF32 = 27;      // where it is two words,
constexpr double FINISH_PER_COLUMN_TF32_100 = 24;  // from compute capability 10.0 on, which has more predicates,
constexpr double FINISH_PER_COLUMN_WGMMA = 12;     // of wgmma's sums,
constexpr double FINISH_PER_COLUMN_WIDE = 20;      // of more than 7, whose conditions outnumber the predicates
constexpr double TURN_INSTRUCTIONS = 16;           // of a turn of the main loop, RES2NET_CHAIN_UNROLL slices;
constexpr double TURN_PER_LOAD = 2;                // of each matrix of A in it,
constexpr double TURN_PER_LOAD_SWIZZLED = 4;       // if it is swizzled,
constexpr double TURN_PER_LOAD_TF32 = 11;          // or rounded;
constexpr double TURN_MOVES_TF32 = 20;             // of sums from register to register, where 128 hardly hold 6 columns of them
constexpr double TURN_INSTRUCTIONS_WGMMA = 41;     // products included
inline double finish_instructions(const Instance& instance, DataType type, const DeviceRates& rates) {
  const double tf32 = rates.capability >= 100 ? FINISH_PER_COLUMN_TF32_100 : FINISH_PER_COLUMN_TF32;
  const double per_column = type == TF32           ? tf32
                            : instance.columns > 7 ? FINISH_PER_COLUMN_WIDE
                            : instance.is_wgmma()  ? FINISH_PER_COLUMN_WGMMA
                                                   : FINISH_PER_COLUMN;
  const int sure = sure_columns(instance.depths);
  return FINISH_PER_ROW + sure * FINISH_PER_COLUMN_SURE + (instance.columns - sure) * per_column;
}
inline double turn_instructions(const Instance& instance, DataType type) {
  if (instance.is_wgmma()) return TURN_INSTRUCTIONS_WGMMA;
  const double per_load = type == TF32                ? TURN_PER_LOAD_TF32
                          : swizzled(instance.depths) ? TURN_PER_LOAD_SWIZZLED
                                                      : TURN_PER_LOAD;
  const double per_slice = instance.tiles * (per_load + instance.columns) + divide_up(instance.columns, 2);
  const bool crowded = type == TF32 && instance.columns >= 6 && registers_of(instance) <= 128;
  return TURN_INSTRUCTIONS + RES2NET_CHAIN_UNROLL * per_slice + (crowded ? TURN_MOVES_TF32 : 0);
}
constexpr double SHARED_RATE = 128;    // bytes per cycle of one multiprocessor
constexpr double BARRIER_CYCLES = 60;  // per chunk of weights
constexpr double DRAIN_CYCLES = 250;   // of wgmma: the last products of a pass end, and the first of the next begin
constexpr double STEP_CYCLES = 900;    // filling and draining the pipelines around a convolution
constexpr double START_CYCLES = 2600;  // first loads and their latency

// The part of the tensor cores' and shared memory's peak that a main loop reaches with so many warps to hide latencies.
inline double overlap(int warps_per_scheduler) {
  return warps_per_scheduler >= 3 ? 0.8 : warps_per_scheduler == 2 ? 0.7 : 0.55;
}

// The same of wgmma, whose products run while their warps go on: a guess, as is DRAIN_CYCLES.
inline double overlap_async(int warps_per_scheduler) { return warps_per_scheduler >= 2 ? 0.85 : 0.7; }

// Threads are no limit of their own: registers allow 512 of them at most, and every multiprocessor has 1536 or more.
constexpr bool registers_bound_the_threads() {
  for (const Instance& instance : INSTANCE_TABLE)
    if (registers_of(instance) * 1536 < 65536) return false;
  return true;
}
static_assert(registers_bound_the_threads());

inline int resident_ctas(const ChainGeometry& g, const Instance& instance, const DeviceLimits& device) {
  const int by_shared = device.shared_per_multiprocessor / (g.shared_bytes + 1024);  // the driver keeps 1 KiB of each
  const int by_registers = device.registers_per_multiprocessor / (registers_of(instance) * g.threads());
  return std::min(by_shared, by_registers);
}

// Whether the tile is one that may be launched: small enough to count in, and not too many of them for a grid.
inline bool counts_fit(const ChainGeometry& g) { return int64_t(g.lines) * g.pitch <= MAX_POSITIONS && grid_fits(g); }

// All of a plan but the time.
inline void set_launch(
    const ChainProblem& problem, bool passes, const ChainGeometry& g, int index, const ChainTile& tile, int resident,
    LaunchPlan& plan) {
  const Instance& instance = INSTANCE_TABLE[index];
  plan.instance = index;
  plan.tile = tile;
  plan.ctas = g.ctas();
  plan.threads = g.threads();
  plan.shared_bytes = g.shared_bytes;
  plan.ctas_per_multiprocessor = resident;
  plan.packed_columns = g.packed_columns;
  const int group_bytes = problem.slot_bytes();  // of a pixel
  const int64_t in = problem.images * problem.height * problem.width * group_bytes;
  const int64_t out = problem.images * problem.out_height() * problem.out_width() * group_bytes;
  plan.dram_bytes = (problem.steps + passes) * (in + out) + int64_t(problem.steps) * problem.slices() * g.packed_columns * 256;
  plan.flops = 2 * 9 * problem.images * problem.out_height() * problem.out_width() * problem.steps * problem.channels *
               int64_t(problem.channels);
  plan.loaded_bytes = 0;
  plan.mma_flops = 0;
  for (int step = 0; step < problem.steps; step++) {
    const bool part = step > 0 && exchanges(problem, tile);  // the rest comes from the other CTAs
    const int64_t lines = g.lines - 2 * (part ? g.work_line(step - 1) : step * g.shrink);
    const int64_t pixel_bytes = part ? std::min(group_bytes, g.part_columns * 16) : group_bytes;
    const int together = instance.warps_together();
    const int tiles = divide_up(g.positions(step), 16 * together * instance.tiles) * together;
    const int weight_reads = g.chunks > 1 ? g.passes(step, instance.tiles) : 1;
    plan.loaded_bytes += plan.ctas * (lines * g.stored * pixel_bytes + int64_t(weight_reads) * g.chunks * g.stage_bytes);
    plan.mma_flops += int64_t(plan.ctas) * tiles * instance.tiles * g.part_columns * problem.slices() * mma_flops(problem.type);
  }
}

// Copies into shared memory of `bytes` of a pixel, the widest that the slots' alignment allows.
inline int copies_of(const ChainProblem& problem, int bytes) {
  const int slot = problem.slot_bytes();
  return divide_up(bytes, slot % 16 == 0 ? 16 : slot % 8 == 0 ? 8 : 4);
}

inline double cycles_of_mma(const Instance& instance, const DeviceRates& rates) {
  return instance.is_wgmma() ? rates.wgmma_cycles : rates.mma_cycles;
}

// What one CTA does in one step.
struct StepWork {
  int tiles;                                // of a warp, along the positions
  double products_of_tile, products;        // mma
  double read_bytes;                        // of shared memory, by the main loop
  double main_loop, finish, copies, sends;  // instructions of all warps; copies: of x of the next step, and of weights
  double stores;                            // of 16 bytes, to other CTAs
  double instructions() const { return main_loop + finish + copies + sends; }
};
inline StepWork work_of_step(
    const ChainProblem& problem, const ChainGeometry& g, const Instance& instance, const DeviceRates& rates, int step) {
  const bool wgmma = instance.is_wgmma(), more = step + 1 < g.steps;
  const double slices = 9.0 * g.depths;
  StepWork work{};
  work.tiles = divide_up(g.positions(step), 16 * instance.warps_together() * instance.tiles) * instance.warps_together();
  const double outputs = double(work.tiles) * g.warps_n;  // tiles of a warp that are computed
  work.products_of_tile = slices * instance.tiles * instance.columns;
  work.products = outputs * work.products_of_tile;
  // A warpgroup reads its weights once, but for every tile; a warp for all its tiles.
  const double weight_bytes = instance.columns * (wgmma ? 256.0 / 4 * instance.tiles : 256.0);
  work.read_bytes = outputs * slices * (weight_bytes + instance.tiles * 512.0);
  work.main_loop = outputs * slices / RES2NET_CHAIN_UNROLL * turn_instructions(instance, problem.type);
  work.finish = outputs * instance.tiles * 2 * finish_instructions(instance, problem.type, rates);
  const int group_bytes = problem.channels * bytes_of(problem.type);
  const double lines = g.lines - 2.0 * (step + 1) * g.shrink;  // of which the next step reads anything
  double copies = more ? lines * g.stored * copies_of(problem, group_bytes) : 0;
  if (more && g.sends) {  // of the rest, u arrives
    const double pixels = (g.lines - 2.0 * g.work_line(step)) * g.stored;
    const int halos = g.row_parts == 1 ? 0 : std::min(2, g.row_parts - 1);
    const double halo_pixels = double(halos) * g.dilation * g.stored;
    copies = pixels * copies_of(problem, std::min(group_bytes, 16 * g.part_columns));
    work.stores = (pixels * (g.channel_parts - 1) + halo_pixels * g.channel_parts) * g.part_columns;
    work.sends = ((pixels + halo_pixels) * g.part_columns * SEND_INSTRUCTIONS + work.stores * SEND_PER_RECEIVER) / 32;
  }
  work.copies = copies / 32 * COPY_INSTRUCTIONS;
  if (rates.capability < 90) {  // else one thread copies them in bulk
    const double pieces = double(g.chunks) * g.stage_bytes / 16 * (g.chunks > 1 ? divide_up(work.tiles, g.warps_m) : 1);
    work.copies += pieces / 32 * (instance.cluster ? WEIGHT_INSTRUCTIONS_PART : WEIGHT_INSTRUCTIONS);
  }
  return work;
}

// What memory takes at the least, in seconds.
inline double memory_seconds(const ChainProblem& problem, bool passes, const LaunchPlan& plan, const DeviceRates& rates) {
  const int64_t out = problem.images * problem.out_height() * problem.out_width() * problem.slot_bytes();
  return std::max(plan.dram_bytes / rates.dram, (plan.loaded_bytes + (problem.steps + passes) * out) / rates.l2);
}

// Of the busiest multiprocessor, whatever hides behind what.
inline void set_bounds(
    const ChainProblem& problem, bool passes, const ChainGeometry& g, const DeviceLimits& device, const DeviceRates& rates,
    LaunchPlan& plan) {
  const Instance& instance = INSTANCE_TABLE[plan.instance];
  double instructions = 0, products = 0, bytes = 0;
  for (int step = 0; step < g.steps; step++) {
    const StepWork work = work_of_step(problem, g, instance, rates, step);
    instructions += work.instructions(), products += work.products, bytes += work.read_bytes;
  }
  const double microseconds = 1e6 * divide_up(plan.ctas, device.multiprocessors) / rates.clock;  // of a cycle of every CTA
  plan.bounds.issue = microseconds * instructions / 4;
  plan.bounds.tensor = microseconds * products * cycles_of_mma(instance, rates);
  plan.bounds.shared = microseconds * (bytes + double(plan.loaded_bytes) / plan.ctas) / SHARED_RATE;
  plan.bounds.memory = 1e6 * memory_seconds(problem, passes, plan, rates);
}

// size, halved, a third, ... rounded up, each once
inline std::vector<int> distinct_parts(int size, int most) {
  std::vector<int> parts;
  for (int count = 1; count <= std::min(size, most); count++) {
    const int part = divide_up(size, count);
    if (parts.empty() || parts.back() != part) parts.push_back(part);
  }
  return parts;
}

}  // namespace res2net_fused::cuda
