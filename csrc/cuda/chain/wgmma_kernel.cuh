// The chain kernel with Hopper's wgmma: four warps multiply 64 positions at once, and read both factors from shared memory.
//
// A strip lies there in planes: plane c holds 16 bytes of every slot, channels 8 * c to 8 * c + 7. The 64 rows of a product are
// 64 slots on end, so a tap is a shift of its address by 16 bytes per slot, and two planes are the K of one product. Rows
// behind the last position are multiplied too, and dropped: they read slots of the next plane, or the room behind the last one.
#pragma once
#include "cuda/chain/hardware_sm90.h"
#include "cuda/chain/strip_kernel.cuh"

namespace res2net_fused::cuda {

// COLUMNS and TILES as in cuda/plan/instances.h: a tile is 64 positions of a warpgroup, 16 of each of its warps.
template <class Element, int COLUMNS, int TILES>
struct WgmmaCta : StripCta<Element, PLANES, COLUMNS, TILES> {
  using Base = StripCta<Element, PLANES, COLUMNS, TILES>;
  using Base::g, Base::lane, Base::warp_m, Base::warp_n;
  static constexpr int COLUMN_UNITS = Base::COLUMN_BYTES / 16;
  int warp;  // of the warpgroup

  DEVICE WgmmaCta(const ChainArguments& arguments, int block) : Base(arguments, block), warp(uniform(this->thread / 32) % 4) {
    const int group = uniform(this->thread / 128);
    warp_n = group % g.warps_n;
    warp_m = group / g.warps_n * 4 + warp;
  }

  DEVICE int first_position(int pass) const { return (pass * g.warps_m + warp_m - warp) * 16 * TILES; }
  // The slot of the first of a tile's rows. A tile without any position repeats the first one.
  DEVICE int place_of_row(int step, int first, int tile) const {
    const int position = first + tile * PLANE_ROWS;
    return this->slot_of(g.work_line(step), 0) + (position < g.positions(step) ? position : first);
  }

  DEVICE void show_writes() const {
    proxy_fence();  // of the strips
  }

  DEVICE void multiply_chunk(
      Accumulator (&sums)[TILES][COLUMNS], const int (&slot)[TILES], int step, SharedPtr weights, int chunk) const {
    const SharedMatrix strip(this->strip(step), g.plane_bytes, 128);
    SharedMatrix weight = SharedMatrix(weights, 128, Base::COLUMN_BYTES).moved(warp_n * COLUMNS * COLUMN_UNITS);
    // Slices go through the depths of a tap, then through the taps of a row. No division in the loop: too slow for few warps.
    int tap = g.by_depths.divide(chunk * g.chunk_slices), depth = chunk * g.chunk_slices - tap * g.depths;
    int tap_column = tap % 3;
    const int next_planes = 2 * g.plane_bytes / 16;  // in units of 16 bytes, as all shifts here: of a slot in its plane
    int shift = ((tap / 3 - 1) * g.pitch + tap_column - 1) * g.dilation + depth * next_planes;
    const int next_tap = g.dilation - g.depths * next_planes;
    const int next_row = next_tap + (g.pitch - 3) * g.dilation;
#pragma unroll 1
    for (int slice = 0; slice < g.chunk_slices; slice += RES2NET_CHAIN_UNROLL) {
      products_begin(sums);
#pragma unroll
      for (int k = 0; k < RES2NET_CHAIN_UNROLL; k++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply_async<Element>(sums[tile], strip.moved(shift + slot[tile]), weight);
        weight = weight.moved(g.packed_columns * COLUMN_UNITS);
        const bool tap_ends = ++depth == g.depths, row_ends = tap_ends && tap_column == 2;
        shift += next_planes + (row_ends ? next_row : tap_ends ? next_tap : 0);
        depth = tap_ends ? 0 : depth;
        tap_column = row_ends ? 0 : tap_ends ? tap_column + 1 : tap_column;
      }
      products_commit();
    }
    // Before the next barrier: behind it others overwrite these weights or this strip.
    products_wait(sums);
  }

  DEVICE void finish_pass(const Accumulator (&sums)[TILES][COLUMNS], int step, int /*pass*/, int first) const {
    this->finish_tiles(sums, step, first + warp * 16 + lane / 4, PLANE_ROWS);
  }

  DEVICE void run() const { Base::run(*this); }
};

}  // namespace res2net_fused::cuda
