// How a call runs: arithmetic, tiles, and what the threads share out among themselves.
#pragma once

#include <algorithm>
#include <string>

#include "cpu/chain/problem.h"

namespace res2net_fused {

// The codes are those that Python passes: res2net_fused/backends/cpu/settings.py.
enum class ArithmeticChoice : int64_t { automatic = 0, winograd = 1, direct = 2 };

enum class Schedule {
  images,    // each thread takes images through the whole chain; no barrier
  tiles,     // one convolution at a time, its tiles (or rows) over the threads
  channels,  // one convolution at a time, its output channels over the threads: where weights are most of the traffic
};

struct ChainPlan {
  bool winograd;
  Schedule schedule;
  TileGrid grid;        // Winograd only
  int64_t block_tiles;  // Winograd only: tiles transformed and multiplied together, at most
  int64_t images;       // Schedule::images: taken through the chain together by one thread
  int64_t parts;        // the work is cut into; one thread each
  bool brings_near;     // Schedule::images: x and out are read through once before they are worked on
  bool copies_source;   // Winograd only: groups that nothing is added to are copied between zero borders first

  // Schedule::images: how many groups of at most `images` there are, as many for each part where there are enough.
  int64_t image_groups(int64_t batch) const {
    return std::min(batch, parts * divide_up(divide_up(batch, parts), images));
  }
};

// Whether Winograd can run the problem at all.
bool winograd_covers(const ChainProblem& problem);

// Whether it should, for weights that are packed already.
bool winograd_pays(const ChainProblem& problem);

ChainPlan plan_chain(const ChainProblem& problem, ArithmeticChoice arithmetic, int64_t threads);

// Plan of Winograd for weights that are not packed yet. With Schedule::channels, each thread packs only those that it needs.
ChainPlan plan_from_weights(const ChainProblem& problem, int64_t threads);

// Tiles of a block beside weights, or their gradient, that stay in cache.
constexpr int64_t kSharedBlockTiles = 32;

// Floats of M of a block, as winograd_output asks for it.
inline int64_t products_floats(const Kernels& kernels, int64_t tiles, int64_t channels) {
  return kPoints * point_pitch(tiles, std::min(round_up(channels, kUnit), kernels.panels_per_pass * kPanel + kUnit));
}

// Whether each part should have its own channels of everything in a backward: more weights than pixels, so that totals of all
// channels would be most of the traffic. Forward shares channels from half as many weights on: of pixels it has one buffer.
inline bool shares_channels(int64_t tiles, int64_t channels, int64_t threads) {
  return 2 * tiles <= channels && panel_count(channels) >= std::min<int64_t>(threads, 2);
}

// Tiles that cover height x width output pixels (at least 2 x 2), each pixel once.
TileGrid covering_tiles(int64_t height, int64_t width);

// Whether conv1 of a block writes u between zero borders: where it is convolved directly, which then needs no copy of it.
inline bool has_border(const ChainProblem& problem, const ChainPlan& plan) { return !plan.winograd && problem.dilation == 1; }

// One line for people.
std::string describe(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels);

}  // namespace res2net_fused
