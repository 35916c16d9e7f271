// The chain kernel with Hopper's wgmma: four warps multiply 64 positions at once, and read both factors from shared memory.
//
// A strip lies there in planes: plane c holds 16 bytes of every slot, channels 8 * c to 8 * c + 7. The 64 rows of a product are
// 64 slots on end, so a tap is a shift of its address by 16 bytes per slot, and two planes are the K of one product. Rows
// behind the last position are multiplied too, and dropped: they read slots of the next plane, or the room behind the last one.
//
// Where weights stream through the stages, products run on from chunk to chunk of a pass, and no warp waits for another one.
// Behind its first products of a chunk a warp waits for those of the chunk before, and says that it has read that one; once all
// have, the next chunk is copied there:
//
//     warpgroup 0   | chunk 0         | chunk 1         | chunk 2 ...      products run on from chunk to chunk
//                                         | releases 0     | releases 1
//     warpgroup 1     | chunk 0         | chunk 1         | chunk 2 ...
//                                           | releases 0; chunk 0's stage is filled with chunk 2
#pragma once
#include "cuda/chain/hardware_sm90.h"
#include "cuda/chain/strip_kernel.cuh"

namespace res2net_fused::cuda {

// COLUMNS and TILES as in cuda/plan/instances.h: a tile is 64 positions of a warpgroup, 16 of each of its warps.
template <class Element, int COLUMNS, int TILES>
struct WgmmaCta : StripCta<Element, PLANES, COLUMNS, TILES> {
  using Base = StripCta<Element, PLANES, COLUMNS, TILES>;
  using Base::g, Base::lane, Base::thread, Base::warp_m, Base::warp_n;
  using typename Base::ChunkCursor, typename Base::NextCopy;
  static constexpr int COLUMN_UNITS = Base::COLUMN_BYTES / 16;
  int warp;  // of the warpgroup

  DEVICE WgmmaCta(const ChainArguments& arguments, int block) : Base(arguments, block), warp(uniform(thread / 32) % 4) {
    this->shared = uniform(this->shared);
    const int group = uniform(thread / 128);
    warp_n = group % g.warps_n;
    warp_m = group / g.warps_n * 4 + warp;
  }

  DEVICE int first_position(int pass) const { return (pass * g.warps_m + warp_m - warp) * 16 * TILES; }
  // The slot of the first of a tile's rows. A tile without any position repeats the first one.
  DEVICE int place_of_row(int step, int first, int tile) const {
    const int position = first + tile * PLANE_ROWS;
    return this->slot_of(g.work_line(step), 0) + (position < g.positions(step) ? position : first);
  }

  static constexpr bool RUNS_ON = true;
  // Whether weights stream; else a convolution's stay for all passes.
  DEVICE bool streams() const { return g.chunks > 1; }
  // Where all warps arrive once they have read what is in a stage.
  DEVICE SharedPtr released_at(int stage) const { return this->arrival_of(MAX_STAGES + stage); }
  DEVICE void release(int stage) const {
    if (lane > 0) return;
    arrival_signal(released_at(stage));
  }
  DEVICE void prepare_weights() const {
    Base::prepare_weights();
    if (thread > 0) return;
#pragma unroll 1
    for (int i = 0; i < g.stages; i++) {
      arrival_init(released_at(i), this->threads / 32);
    }
  }
  DEVICE void start_weights(const ChunkCursor& cursor) const {
    if (uniform(thread / 32) > 0 || cursor.step >= g.steps) return;
    if (streams() && cursor.round > 0) {
      arrival_wait_together(released_at(cursor.stage), (cursor.round - 1) & 1);
    }
    Base::start_weights(cursor);
  }
  DEVICE void await_weights(int stage, int parity) const {
    arrival_wait_together(this->arrival_of(stage), parity);
  }
  // Of the chunk in use, behind that one which `next` replaces.
  DEVICE int stage_after(const NextCopy& next) const { return next.chunk.stage + 1 == g.stages ? 0 : next.chunk.stage + 1; }
  DEVICE void leave_chunk(int chunk, const NextCopy& next) const {
    if (!streams()) return;
    if (chunk > 0) release(next.chunk.stage);
    if (chunk + 1 == g.chunks) release(stage_after(next));
  }

  DEVICE void show_writes() const {
    proxy_fence();  // of the strips
  }

  DEVICE void multiply_chunk(
      Accumulator (&sums)[TILES][COLUMNS], const int (&slot)[TILES], int step, SharedPtr weights, int chunk,
      const NextCopy& next) const {
    const SharedMatrix strip(this->strip(step), g.plane_bytes, 128);
    SharedMatrix weight = SharedMatrix(weights, 128, Base::COLUMN_BYTES).moved(warp_n * COLUMNS * COLUMN_UNITS);
    const int turns = g.chunk_slices / RES2NET_CHAIN_UNROLL;
    const SharedPtr shifts_of = this->turn_at(chunk * turns);
    // The first turn, then the others: what stands between would lengthen each of them.
    int turn = 0;
#pragma unroll 1
    for (int part = 0; part < 2; part++) {
      const int end = part == 0 ? 1 : turns;
#pragma unroll 1
      for (; turn < end; turn++) {
        const auto shifts = shared_load<Bytes16>(shifts_of + turn * int(sizeof(Bytes16)));
        products_begin(sums);
#pragma unroll
        for (int k = 0; k < RES2NET_CHAIN_UNROLL; k++) {
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
            multiply_async<Element>(sums[tile], strip.moved(slot[tile]).moved(int(shifts.word[k])), weight);
          weight = weight.moved(g.packed_columns * COLUMN_UNITS);
        }
        products_commit();
        products_wait_for_earlier();
      }
      if (part > 0 || !streams()) continue;
      if (chunk > 0) release(next.chunk.stage);
      if (!next.started) start_weights(next.chunk);
    }
  }
  // Of all chunks, before the next barrier: behind it others overwrite this strip.
  DEVICE void end_products(Accumulator (&sums)[TILES][COLUMNS], const NextCopy& next) const {
    products_wait(sums);
    if (streams()) release(stage_after(next));
  }

  DEVICE void finish_pass(const Accumulator (&sums)[TILES][COLUMNS], int step, int /*pass*/, int first) const {
    this->finish_tiles(sums, step, first + warp * 16 + lane / 4, PLANE_ROWS);
  }

  DEVICE void run() const { Base::run(*this); }
};

}  // namespace res2net_fused::cuda
