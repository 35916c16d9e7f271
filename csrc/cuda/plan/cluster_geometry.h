// How the CTAs of the cluster kernel share one part of the images: `row_parts` x `channel_parts` of them.
//
//   * Channels: part c computes `part_columns` units of 8 output channels, and reads those columns of the weights only.
//     In a chain that adds, it sends its channels of u_{i+1} to the others: all keep all channels in their strips.
//   * Rows: part r owns `rows` rows of one image, and its strip holds `dilation` rows more on either side, however many steps:
//     the neighbours send them. With one row part a CTA owns what it does in the strip kernel.
//   * K slices: `warps_k` warps compute the same outputs, each from its share of the slices, and add up in shared memory.
//
// CTAs that send to each other form a thread-block cluster. Parts that send nothing (a single step, or steps that do not add)
// are an ordinary grid.
#pragma once
#include "cuda/plan/geometry.h"

namespace res2net_fused::cuda {

constexpr int MAX_CLUSTER = 8;  // CTAs; what every device with clusters runs
// Version of the PTX from which on code has the instructions of a cluster, and the waits of launches that overlap.
constexpr int CLUSTER_CODE = 90;

inline bool exchanges(const ChainProblem& problem, const ChainTile& tile) {
  return problem.adds && problem.steps > 1 && tile.row_parts * tile.channel_parts > 1;
}

// Whether the parts are all there and their rows reach: what the launcher and the plan have to make sure of.
inline bool parts_fit(const ChainProblem& problem, const ChainTile& tile, int instance_columns) {
  if (tile.row_parts < 1 || tile.channel_parts < 1 || tile.warps_k < 1) return false;
  if (exchanges(problem, tile) && tile.row_parts * tile.channel_parts > MAX_CLUSTER) return false;
  const int columns = divide_up(problem.channels, 8);
  if (divide_up(columns, tile.warps_n * instance_columns) != tile.channel_parts) return false;
  if (tile.row_parts == 1) return true;
  return exchanges(problem, tile) && !tile.whole && tile.images == 1 && tile.columns == problem.width &&
         tile.rows >= problem.dilation && divide_up(problem.height, tile.rows) == tile.row_parts;
}

// packed_columns: of the weights, all parts together.
inline ChainGeometry make_cluster_geometry(
    const ChainProblem& problem, const ChainTile& tile, int instance_columns, int instance_tiles, int packed_columns) {
  ChainGeometry g = make_geometry(problem, tile, 0, instance_columns);
  g.packed_columns = packed_columns;
  g.sends = exchanges(problem, tile);
  g.by_part_columns = FastDivisor(g.part_columns);
  // A warp's sums, 256 bytes for 8 positions and 8 channels; none where every warp has all slices.
  g.sums_bytes = tile.warps_k == 1 ? 0 : g.threads() / 32 * instance_tiles * 2 * instance_columns * 256;
  g.shared_bytes += g.sums_bytes;
  return g;
}

}  // namespace res2net_fused::cuda
