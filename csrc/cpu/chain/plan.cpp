#include "cpu/chain/plan.h"

#include <algorithm>
#include <sstream>

namespace res2net_fused {
namespace {

// Reading one weight from the L3 cache, in multiplications that take as long.
constexpr int64_t kMatrixCost = 8;

// Floats of x and out together that may well lie in cache when a call begins: 4 MB.
constexpr int64_t kCachedFloats = 1 << 20;

// `length` (at least 2) as fours and threes, or as 3 + 2 or a single tile where it is too short for that.
Split split_fours(int64_t length) {
  if (length < 4) return {length, length, 1, 0, 0};
  if (length == 5) return {length, 3, 1, 2, 1};
  const int64_t tiles = divide_up(length, 4), threes = 4 * tiles - length;
  if (threes == tiles) return {length, 3, tiles, 0, 0};
  return {length, 4, tiles - threes, 3, threes};
}

// `length` (at least 2) as twos, the last one moved back where the length is odd: fewer points than with a three.
Split split_twos(int64_t length) { return {length, 2, divide_up(length, 2), 0, 0}; }

int64_t points_of(int64_t size) { return size + 2; }

// Products of one image with a w x w matrix, and matrices that are read for them.
struct Work {
  int64_t products, matrices;
};

Work work_of(const TileGrid& grid) {
  const auto sum = [](const Split& s) { return s.big_count * points_of(s.big) + s.small_count * points_of(s.small); };
  const int64_t rows = points_of(grid.rows.big), columns = points_of(grid.columns.big);
  return {sum(grid.rows) * sum(grid.columns), rows * columns};
}

}  // namespace

TileGrid covering_tiles(int64_t height, int64_t width) { return {split_fours(height), split_fours(width)}; }

bool winograd_covers(const ChainProblem& problem) {
  return problem.stride == 1 && problem.dilation == 1 && problem.groups == 1 && problem.height >= 2 && problem.width >= 2;
}

bool winograd_pays(const ChainProblem& problem) {
  // Narrow groups: the transforms cost more than the products save.
  return winograd_covers(problem) && problem.channels >= 8;
}

ChainPlan plan_chain(const ChainProblem& problem, ArithmeticChoice arithmetic, int64_t threads) {
  ChainPlan plan{};
  plan.winograd = arithmetic == ArithmeticChoice::automatic
                      ? winograd_pays(problem)
                      : arithmetic == ArithmeticChoice::winograd && winograd_covers(problem);
  plan.parts = std::max<int64_t>(threads, 1);
  // The slowest thread decides: whole images only where they divide nearly evenly.
  const int64_t rounds = divide_up(problem.batch, plan.parts);
  const bool even = rounds * plan.parts * 4 <= problem.batch * 5;
  plan.schedule = even ? Schedule::images : Schedule::tiles;
  plan.images = 1;
  const int64_t pixels = problem.height * problem.width + problem.out_height() * problem.out_width();
  plan.brings_near = even && problem.batch * pixels * problem.scale() * problem.channels > kCachedFloats;
  if (!plan.winograd) return plan;

  const TileGrid fours = covering_tiles(problem.height, problem.width);
  const int64_t per_image = fours.per_image(), all_tiles = problem.batch * per_image;
  plan.grid = fours;
  plan.block_tiles = problem.channels <= 64 ? 24 : 16;
  int64_t together = std::min(plan.block_tiles, all_tiles);  // tiles that share one reading of the weights
  if (plan.schedule == Schedule::images) {
    plan.images = std::max<int64_t>(std::min(divide_up(plan.block_tiles, per_image), rounds), 1);
    together = std::min(together, plan.images * per_image);
  } else if (all_tiles <= 32 && problem.channels >= 96) {
    plan.schedule = Schedule::channels;
  }
  // F(2x2) multiplies more and reads less than half of the weights. Its tiles overlap where a length is odd, so that one
  // thread must have them all.
  const bool may_overlap = plan.schedule == Schedule::channels || (plan.schedule == Schedule::images && plan.images == 1);
  if (may_overlap && together <= 16) {
    const TileGrid twos{split_twos(problem.height), split_twos(problem.width)};
    const int64_t images = divide_up(together, per_image);
    const auto cost = [&](const TileGrid& grid) {
      const Work work = work_of(grid);
      return work.products * images + kMatrixCost * work.matrices;
    };
    if (cost(twos) < cost(fours)) {
      plan.grid = twos;
      plan.block_tiles = std::max(plan.block_tiles, images * twos.per_image());
    }
  }
  if (plan.schedule == Schedule::channels) plan.block_tiles = kMaxBlockTiles;
  plan.copies_source = plan.schedule == Schedule::images && problem.height * problem.width <= 14 * 14;
  const int64_t most = plan.schedule == Schedule::images  ? problem.batch
                       : plan.schedule == Schedule::tiles ? all_tiles
                                                          : panel_count(problem.channels);
  plan.parts = std::clamp<int64_t>(most, 1, plan.parts);
  return plan;
}

ChainPlan plan_from_weights(const ChainProblem& problem, int64_t threads) {
  ChainPlan plan = plan_chain(problem, ArithmeticChoice::winograd, threads);
  const TileGrid grid = covering_tiles(problem.height, problem.width);
  const int64_t panels = panel_count(problem.channels);
  // More weights than pixels: each is transformed once and meets all tiles while it is in cache, and never lies in memory.
  if (problem.batch * grid.per_image() > problem.channels || panels < threads) return plan;
  plan.schedule = Schedule::channels;
  plan.grid = grid;
  plan.block_tiles = kSharedBlockTiles;
  plan.images = 1;
  plan.copies_source = plan.brings_near = false;
  plan.parts = std::max<int64_t>(threads, 1);
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
  const char* shared = plan.schedule == Schedule::images  ? "images"
                       : plan.schedule == Schedule::tiles ? (plan.winograd ? "tiles" : "rows")
                                                          : "channels";
  text << ", " << shared << " over " << plan.parts << (plan.parts == 1 ? " thread" : " threads");
  if (plan.schedule == Schedule::images && plan.images > 1) text << ", " << plan.images << " images at a time";
  return text.str();
}

}  // namespace res2net_fused
