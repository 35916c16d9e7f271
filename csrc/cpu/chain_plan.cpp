#include "cpu/chain_plan.h"

#include <algorithm>
#include <sstream>

namespace res2net_fused {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `size` (at least 2) as fours and threes, or as 3 + 2 or a single small tile where it is too short for that.
Split split_fours(int64_t size) {
  if (size < 4) return {size, 1, 0, 0};
  if (size == 5) return {3, 1, 2, 1};
  const int64_t tiles = divide_up(size, 4), threes = 4 * tiles - size;
  if (threes == tiles) return {3, tiles, 0, 0};
  return {4, tiles - threes, 3, threes};
}

// `size` (at least 2) as twos, with one three where it is odd.
Split split_twos(int64_t size) {
  if (size % 2 == 0) return {2, size / 2, 0, 0};
  return {3, 1, 2, (size - 3) / 2};
}

}  // namespace

bool winograd_covers(const ChainProblem& problem) {
  return problem.stride == 1 && problem.dilation == 1 && problem.groups == 1 && problem.height >= 2 && problem.width >= 2;
}

bool winograd_pays(const ChainProblem& problem) {
  // Narrow groups: the transforms cost more than the products save.
  return winograd_covers(problem) && problem.channels >= 8;
}

ChainPlan plan_chain(const ChainProblem& problem, ArithmeticChoice arithmetic, int64_t threads) {
  ChainPlan plan{};
  plan.winograd = arithmetic == ArithmeticChoice::automatic ? winograd_pays(problem)
                                                            : arithmetic == ArithmeticChoice::winograd && winograd_covers(problem);
  plan.parts = std::max<int64_t>(threads, 1);
  // The slowest thread decides: whole images only where they divide nearly evenly.
  const int64_t rounds = divide_up(problem.batch, plan.parts);
  const bool even = rounds * plan.parts * 4 <= problem.batch * 5;
  plan.schedule = even ? Schedule::images : Schedule::tiles;
  plan.images = 1;
  if (!plan.winograd) return plan;

  const int64_t per_image = split_fours(problem.height).count() * split_fours(problem.width).count();
  const int64_t all_tiles = problem.batch * per_image;
  plan.grid = {split_fours(problem.height), split_fours(problem.width)};
  plan.block_tiles = problem.channels <= 64 ? 24 : 16;
  if (plan.schedule == Schedule::images) {
    plan.images = std::min(divide_up(plan.block_tiles, per_image), rounds);
  } else if (all_tiles <= 32 && problem.channels >= 96) {
    plan.schedule = Schedule::channels;
    plan.block_tiles = kMaxBlockTiles;
  }
  if (plan.schedule == Schedule::channels && per_image == 4 && problem.batch == 1) {
    plan.grid = {split_twos(problem.height), split_twos(problem.width)};
  }
  plan.copies_source = plan.schedule == Schedule::images && problem.height * problem.width <= 14 * 14;
  plan.parts = std::min(plan.parts, plan.schedule == Schedule::images  ? problem.batch
                                    : plan.schedule == Schedule::tiles ? all_tiles
                                                                       : panel_count(problem.channels));
  return plan;
}

std::string describe(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels) {
  std::ostringstream text;
  text << kernels.name << ", ";
  if (plan.winograd) {
    const auto tiles = [&](const Split& split) {
      text << split.big_count << "x" << split.big;
      if (split.small_count > 0) text << "+" << split.small_count << "x" << split.small;
    };
    text << "Winograd (tile rows ";
    tiles(plan.grid.rows);
    text << ", columns ";
    tiles(plan.grid.columns);
    text << "; " << plan.block_tiles << " a block)";
  } else {
    text << "direct convolution";
  }
  const char* shared = plan.schedule == Schedule::images   ? "images"
                       : plan.schedule == Schedule::tiles ? (plan.winograd ? "tiles" : "rows")
                                                          : "channels";
  text << ", " << shared << " over " << plan.parts << (plan.parts == 1 ? " thread" : " threads");
  if (plan.schedule == Schedule::images && plan.images > 1) text << ", " << plan.images << " images at a time";
  return text.str();
}

}  // namespace res2net_fused
