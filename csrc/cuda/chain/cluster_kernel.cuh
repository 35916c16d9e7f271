// The chain by CTAs that work together, for calls with so few pixels that each CTA of the strip kernel would stream all
// weights. Here of 2 x 3 CTAs that share one image:
//
//                  channels 0-31   32-63    64-95       Every CTA keeps u_i of all channels in its strip, for its own rows
//     rows 0-6        CTA 0        CTA 1    CTA 2       and `dilation` rows on either side. It computes y_i of its rows and
//     rows 7-13       CTA 3        CTA 4    CTA 5       its channels alone, and so reads only their weights.
//
// A step of CTA 1:
//     strip i % 2, all channels   --mma-->   y_i of its channels   --->   out
//                                              | + x_{i+1}, which arrived in strip (i + 1) % 2 meanwhile
//                                            u_{i+1} of its channels
//                                              | distributed shared memory
//                                            strips (i + 1) % 2 of CTAs 0 and 2, and the last rows as halo to CTAs 3, 4 and 5
//     until all bytes of u_{i+1} have arrived that others send
//
// Nobody waits for all: each CTA counts the bytes that arrive. Two strips make that enough: a CTA sends u_{i+2} into the strip
// that another one read in step i only after that one's u_{i+1} has come, which was sent behind its last read. It may be one step
// ahead of another that sends to the same CTA, so that the bytes of two steps on end are counted apart. Before the first step's
// results are sent, a barrier of the cluster makes sure that all strips are clear. The last step sends nothing, so no CTA ends
// while others may still write to it.
//
// The output of a CTA is small, and its sums long: `warps_k` warps share out the K slices of the same output. Each then has
// enough independent products to hide their latency, and enough outputs for every byte that it loads from shared memory.
#pragma once
#include "cuda/chain/strip_kernel.cuh"
#include "cuda/plan/cluster_geometry.h"

namespace res2net_fused::cuda {

// COLUMNS and TILES as in cuda/plan/instances.h.
template <class Element, int COLUMNS, int TILES>
struct ClusterCta : StripCta<Element, 0, COLUMNS, TILES> {
  static_assert(Element::BYTES == 2, "8 channels are 16 bytes here");
  using Base = StripCta<Element, 0, COLUMNS, TILES>;
  using Base::a, Base::g, Base::lane, Base::strip, Base::thread, Base::threads, Base::warp_m, Base::warp_n;
  using typename Base::ChunkCursor;
  int row_part, channel_part, warp_k;

  DEVICE ClusterCta(const ChainArguments& arguments, int block) : Base(arguments, block / arguments.geometry.channel_parts) {
    const int image_part = block / g.channel_parts;
    channel_part = block - image_part * g.channel_parts;
    row_part = image_part % g.row_parts;
    this->first_channel = channel_part * g.part_columns * 8;
    warp_k = warp_m / g.warps_m;
    warp_m -= warp_k * g.warps_m;
    threads *= g.warps_k;
  }

  // ---- data into shared memory ----

  // Where what other CTAs send at the end of a step arrives.
  DEVICE SharedPtr exchange_of(int step) const { return this->arrival_of(MAX_STAGES + step % 2); }
  DEVICE int first_column() const { return channel_part * g.part_columns; }
  DEVICE int columns_there() const {  // the last part may have columns of zeros behind them
    const int left = g.packed_columns - first_column();
    return left < g.part_columns ? left : g.part_columns;
  }
  DEVICE void prepare_weights() const {
    Base::prepare_weights();
    if (thread == 0 && g.sends) {
      arrival_init(exchange_of(0));
      arrival_init(exchange_of(1));
    }
    if constexpr (BULK_COPIES) {
      sync_cta();                                                   // every warp copies
      const int missing = (g.part_columns - columns_there()) * 16;  // pieces of 16 bytes in a row, which no copy ever fills
      for (int i = thread; i < g.stages * g.chunk_slices * missing; i += threads) {
        const int row = i / missing, piece = (columns_there() * 16 + i - row * missing);
        const int stage = row / g.chunk_slices;
        shared_store(this->stage(stage) + (row - stage * g.chunk_slices) * g.part_columns * 256 + piece * 16, Bytes16{});
      }
    }
  }
  DEVICE void start_weights(const ChunkCursor& cursor) const {
    if (cursor.step >= g.steps) return;
    const SharedPtr to = this->stage(cursor.stage);
    const int64_t slice = (int64_t(cursor.step) * g.chunks + cursor.chunk) * g.chunk_slices;
    const auto from = static_cast<const unsigned char*>(a.weight) + (slice * g.packed_columns + first_column()) * 256;
    if constexpr (BULK_COPIES) {
      // A row each, by one thread of every warp: the instruction is one for a warp.
      if (lane > 0) return;
      const SharedPtr arrival = this->arrival_of(cursor.stage);
      const int row_bytes = columns_there() * 256;
      if (thread == 0) {
        arrival_expect(arrival, g.chunk_slices * row_bytes);
      }
#pragma unroll 1
      for (int row = thread / 32; row < g.chunk_slices; row += threads / 32)
        copy_bulk(to + row * g.part_columns * 256, from + row * g.packed_columns * 256, row_bytes, arrival);
    } else {
      for (int i = thread; i < g.stage_bytes / 16; i += threads) {
        const int row = g.by_part_columns.divide(i / 16);
        const int byte = i * 16 - row * g.part_columns * 256;
        const bool there = byte < columns_there() * 256;
        copy_async<16>(to + i * 16, from + (there ? row * g.packed_columns * 256 + byte : 0), there ? 16 : 0);
      }
    }
  }

  DEVICE void start_group(int step) const {
    if (step == 0 || !g.sends)
      Base::start_group(step);
    else  // only what y will be added to here: the rest arrives as u
      this->start_lines(step, g.work_line(step - 1), this->first_channel * 2, a.by_part_pieces);
  }

  DEVICE void strips_are_clear() const {
    if (!g.sends) return;
    cluster_arrive();
  }

  DEVICE void pass_group() const { Base::pass_group(channel_part * threads + thread, threads * g.channel_parts); }

  // ---- products ----

  DEVICE bool adds_bias() const { return warp_k == 0; }  // of those whose sums are added up

  DEVICE void multiply_chunk(
      Accumulator (&sums)[TILES][COLUMNS], const int (&base)[TILES], int step, SharedPtr weights, int chunk,
      const typename Base::NextCopy& /*next*/) const {
    // Warps take turns over the slices of the whole convolution, so that no chunk's remainder leaves one behind.
    const int turns = g.chunk_slices / RES2NET_CHAIN_UNROLL;
    int turn = (warp_k - chunk * turns) % g.warps_k;
    if (turn < 0) turn += g.warps_k;
    this->multiply_turns(sums, base, step, weights, chunk, turn, g.warps_k);
  }

  // Where a warp leaves its sums of half a tile for the one that finishes it.
  DEVICE SharedPtr sums_of(int k, int half_tile) const {
    const int warp = (k * g.warps_m + warp_m) * g.warps_n + warp_n;
    const SharedPtr sums = this->shared.part(g.shared_bytes - g.sums_bytes, g.sums_bytes, "sums");
    return sums + ((warp * TILES * 2 + half_tile) * COLUMNS * 32 + lane) * int(sizeof(Float2));
  }

  DEVICE void finish_pass(Accumulator (&sums)[TILES][COLUMNS], int step, int pass, int first) const {
    if (g.warps_k == 1) return Base::finish_pass(sums, step, pass, first);
    if (pass > 0) {
      sync_cta();  // the sums of the pass before have been read
    }
    int finisher = 0;  // of this half tile, among the warps with the same output
#pragma unroll
    for (int half_tile = 0; half_tile < 2 * TILES; half_tile++) {
      if (finisher != warp_k) {
        const SharedPtr to = sums_of(warp_k, half_tile);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
          const float* value = sums[half_tile / 2][j].value + half_tile % 2 * 2;
          shared_store(to + j * 32 * int(sizeof(Float2)), Float2{value[0], value[1]});
        }
      }
      if (++finisher == g.warps_k) finisher = 0;
    }
    sync_cta();  // all sums are there
    const int end = g.positions(step);
    const auto raster = this->raster_of(step);
    finisher = 0;
#pragma unroll
    for (int half_tile = 0; half_tile < 2 * TILES; half_tile++) {
      const int position = first + half_tile * 8 + lane / 4;
      if (finisher == warp_k && position < end) {
        for (int k = 0; k < g.warps_k; k++) {
          if (k == warp_k) continue;
          const SharedPtr from = sums_of(k, half_tile);
#pragma unroll
          for (int j = 0; j < COLUMNS; j++) {
            const auto more = shared_load<Float2>(from + j * 32 * int(sizeof(Float2)));
            sums[half_tile / 2][j].value[half_tile % 2 * 2] += more.x;
            sums[half_tile / 2][j].value[half_tile % 2 * 2 + 1] += more.y;
          }
        }
        this->finish(sums[half_tile / 2], half_tile % 2, raster, position);
      }
      if (++finisher == g.warps_k) finisher = 0;
    }
  }

  // ---- between steps ----

  DEVICE void finish_step(int step) const {
    if (!g.sends || step + 1 == g.steps) return;
    sync_cta();  // all of this CTA's part of u is in its strip
    if (step == 0) {
      cluster_wait();  // every CTA runs, and its strips are cleared
    }
    if (thread == 0) {
      arrival_expect(exchange_of(step), bytes_sent_here(step));
    }
    for (int part = row_part - 1; part <= row_part + 1; part++)
      if (part >= 0 && part < g.row_parts) send(step, part);
    arrival_wait_remote(exchange_of(step), step / 2 % 2);  // all parts of u have arrived
  }

  // What `send` of all others brings here: of the lines that this CTA computes the other channels, of its halo all.
  DEVICE int bytes_sent_here(int step) const {
    const int first = g.work_line(step), end = g.lines - first;
    const int own = rows_in(first, end) * this->images_here();
    const int halo = g.row_parts == 1 ? 0 : rows_in(0, g.lines) - own;  // else computed here
    const int chunks = divide_up(g.channels, 8), left = chunks - this->first_channel / 8;
    const int others = chunks - (left < g.part_columns ? left : g.part_columns);
    const int columns = shared_load<Bytes4>(this->tables()).word[0];  // of a line, that lie in the image
    return (own * others + halo * chunks) * columns * 16;
  }
  DEVICE int rows_in(int first_line, int end_line) const {  // of one image
    const auto rows = Base::rows_in(first_line, end_line);
    return rows.end - rows.begin;
  }

  // Sends this CTA's channels of u_{step+1} to the CTAs of a row part: all lines to its own, the outermost to another as halo.
  DEVICE void send(int step, int part) const {
    const SharedPtr next = strip(step + 1);
    int line = g.work_line(step), lines = g.lines - 2 * line;
    if (part > row_part) line += lines - g.dilation;
    if (part != row_part) lines = g.dilation;
    const int line_there = line + (row_part - part) * g.rows;
    const int first_chunk = this->first_channel / 8;
    const int receivers = g.channel_parts - (part == row_part);
    const int end = lines * g.stored * g.part_columns;
    for (int i = thread; i < end; i += threads) {
      const int stored = g.by_part_columns.divide(i);
      const int chunk = first_chunk + i - stored * g.part_columns;
      const int down = g.by_stored.divide(stored);
      const int column = stored - down * g.stored;
      if (!this->is_pixel(line + down, column) || chunk * 8 >= g.channels) continue;
      const auto u = shared_load<Bytes16>(next + this->chunk_offset(this->slot_of(line + down, column), chunk));
      const SharedPtr to = next + this->chunk_offset(this->slot_of(line_there + down, column), chunk);
      int receiver = channel_part;  // this CTA is the last of its own row part
      for (int j = 0; j < receivers; j++) {
        if (++receiver == g.channel_parts) receiver = 0;
        remote_store(to, part * g.channel_parts + receiver, u, exchange_of(step));
      }
    }
  }

  DEVICE void run() const { Base::run(*this); }
};

}  // namespace res2net_fused::cuda
