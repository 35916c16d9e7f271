// The Res2Net chain in one launch, inference, channels-last, in half precision or in float32 with products in TF32:
//     y_i = clamp(conv3x3_i(u_i) + bias_i),   u_i = x_i + y_{i-1}  (or x_i alone);   one group passes, and may be added to u_0
// A CTA owns a part of the output (see cuda/plan/geometry.h) and keeps u_i of that part and its halo in shared memory: step i
// reads strip i % 2. Meanwhile x_{i+1} arrives in the other strip, where the step's end adds y_i to it.
#pragma once
#include "cuda/chain/strip_layout.cuh"

namespace res2net_fused::cuda {

// DEPTHS, COLUMNS and TILES as in cuda/plan/instances.h.
template <class Element, int DEPTHS, int COLUMNS, int TILES>
struct StripCta : StripLayout<Element, DEPTHS> {
  using Base = StripLayout<Element, DEPTHS>;
  using Base::a, Base::g, Base::x, Base::out, Base::thread, Base::threads, Base::lane, Base::warp_m, Base::warp_n;
  using Base::arrival_of, Base::first_column, Base::first_row, Base::in_image, Base::is_pixel, Base::turn_at, Base::NONE;
  using Base::Base;
  using Base::BYTES, Base::PER_WORD, Base::add_word, Base::held, Base::pack_word, Base::rounded, Base::unpack_word;
  using Base::chunk_offset, Base::channel_offset, Base::swizzled_place, Base::slot_of, Base::slot_of_position, Base::strip;
  using Base::first_channel, Base::lower, Base::upper, Base::stage, Base::tables, Base::line_at, Base::raster_line_at;
  using typename Base::Line, typename Base::Outputs, typename Base::Owned, typename Base::Pair;
  static constexpr int COLUMN_BYTES = 256;  // of 8 output channels of a K slice of the weights

  // ---- data into shared memory ----

  DEVICE void clear_strips() const {
    for (int chunk = thread; chunk < g.strips * g.strip_bytes / 16; chunk += threads)
      shared_store(this->shared + chunk * 16, Bytes16{});
  }

  // Starts copying x of the group that step `step` convolves: all lines of which that step reads anything.
  DEVICE void start_group(int step) const { start_lines(step, step * g.shrink, 0, a.by_load_pieces); }
  // Skips `first_line` lines at either end, and the first `first_byte` bytes of every pixel.
  DEVICE void start_lines(int step, int first_line, int first_byte, const FastDivisor& by_pieces) const {
    if (a.load_bytes == 16)
      start_lines_by<16>(step, first_line, first_byte, by_pieces);
    else if (a.load_bytes == 8)
      start_lines_by<8>(step, first_line, first_byte, by_pieces);
    else
      start_lines_by<4>(step, first_line, first_byte, by_pieces);
  }
  template <int MOVE>
  DEVICE void start_lines_by(int step, int first_line, int first_byte, const FastDivisor& by_pieces) const {
    // A thread copies the same piece of every `together`th pixel; where pixels have more pieces than there are threads, several.
    const int pieces = int(by_pieces.divisor);
    const bool many = pieces > threads;
    const int together = kept(many ? 1 : by_pieces.divide(threads)), first_pixel = many ? 0 : by_pieces.divide(thread);
    const FastDivisor by_line = shared_load<FastDivisor>(tables());
    const int per_line = int(by_line.divisor);
    // Kept where registers are short: what follows from it would be computed ahead of all steps.
    const auto rows = this->rows_in(DEPTHS > 0 ? first_line : kept(first_line), g.lines - first_line);
    // Pixels of an image are numbered line by line, and counted in twos: see FastDivisor.
    const int end = first_pixel < together ? kept(2 * (rows.end - rows.begin) * per_line) : 0;
    const int half_pixel = kept(a.x_slots.pixel * BYTES / 2), half_slot = chunk_offset(1, 0) / 2;
    // From the last pixel of a line to the next line's first one, of x and of the strip.
    const int skipped = kept(2 * (g.width - per_line)), skipped_slots = kept(chunk_offset(g.pitch - per_line, 0));
    for (int piece = thread - first_pixel * pieces; piece < pieces; piece += many ? threads : pieces) {
      const int byte = first_byte + piece * MOVE;
      if (byte >= a.load_width) break;
#pragma unroll 1
      for (int image = 0; image < this->images_here(); image++) {
        const int line = rows.begin - first_row + image * g.period, left = this->left_column();
        const int pixel = (image * g.height + rows.begin) * g.width + first_column + left;
        const unsigned char* const from =
            kept(x + (pixel * a.x_slots.pixel + (a.first_group + step) * a.x_slots.slot) * BYTES + byte);
        const SharedPtr to = kept(strip(step) + (channel_offset(0, byte / BYTES) + chunk_offset(slot_of(line, left), 0)));
#pragma unroll 1
        for (int number = 2 * first_pixel; number < end; number += 2 * together) {
          const int down = FastDivisor::divide_half(number, by_line.magic);
          const SharedPtr place = swizzled_place(to + (down * skipped_slots + number * half_slot));
          copy_async<MOVE>(place, stepped(from, down * skipped + number, half_pixel));
        }
      }
    }
  }

  // The order in which chunks of weights are used: for every step, for every pass over the pixels, all chunks; a chunk that
  // holds a whole convolution stays for all passes.
  struct ChunkCursor {
    int step = 0, pass = 0, chunk = 0, stage = 0;
    int round = 0;  // through the stages
  };
  // What is copied to where the chunk before the one in use was. started: by now; else once nobody reads there any more.
  struct NextCopy {
    ChunkCursor chunk;
    bool started = true;
  };
  DEVICE void advance(ChunkCursor& cursor) const {
    if (++cursor.stage == g.stages) cursor.stage = 0, cursor.round++;
    if (++cursor.chunk < g.chunks) return;
    cursor.chunk = 0;
    if (g.chunks > 1 && ++cursor.pass < g.passes(cursor.step, TILES)) return;
    cursor.pass = 0;
    cursor.step++;
  }
  // Before the first of them.
  DEVICE void prepare_weights() const {
    if constexpr (BULK_COPIES) {
      if (thread > 0) return;
#pragma unroll 1
      for (int i = 0; i < g.stages; i++) {
        arrival_init(arrival_of(i));
      }
      proxy_fence();  // copies find them there
    }
  }
  DEVICE void start_weights(const ChunkCursor& cursor) const {
    if (cursor.step >= g.steps) return;
    const SharedPtr to = stage(cursor.stage);
    const auto from =
        static_cast<const unsigned char*>(a.weight) + (int64_t(cursor.step) * g.chunks + cursor.chunk) * g.stage_bytes;
    if constexpr (BULK_COPIES) {
      if (thread > 0) return;
      arrival_expect(arrival_of(cursor.stage), g.stage_bytes);
      copy_bulk(to, from, g.stage_bytes, arrival_of(cursor.stage));
    } else {
      for (int chunk = thread; chunk < g.stage_bytes / 16; chunk += threads) copy_async<16>(to + chunk * 16, from + chunk * 16);
    }
  }
  // Behind the barrier that shows copies of each thread's own. parity: of the number of times that the stage was filled before.
  DEVICE void await_weights(int stage, int parity) const {
    if constexpr (BULK_COPIES) {
      arrival_wait(arrival_of(stage), parity);
    }
  }

  // ---- the group that passes through ----

  DEVICE void pass_group() const { pass_group(thread, threads); }
  DEVICE void pass_group(int first, int sharers) const {  // the pieces that are this thread's
    if (a.passed_group < 0) return;
    if (a.pool != NO_POOL)
      pool_group(first, sharers);
    else if (a.copy_bytes == 16)
      copy_group<16>(first, sharers);
    else if (a.copy_bytes == 8)
      copy_group<8>(first, sharers);
    else
      copy_group<4>(first, sharers);
  }
  // An output position of those of the lines that this CTA owns.
  struct Passed {
    int line, column;  // of the strip, in the middle of the window
    int out;           // pixel of `out`, or NONE
  };
  DEVICE int owned_positions() const { return g.owned_lines * g.work_pitch; }
  DEVICE Passed owned_position(int position) const {
    const int down = g.by_work_pitch.divide(position), right = position - down * g.work_pitch;
    const auto line = shared_load<Line>(raster_line_at(g.stride == 1 ? g.lead + down : down));
    const auto outputs = shared_load<Outputs>(tables() + 16);
    const bool owned = (line.owned != NONE) & (unsigned(right - outputs.first) < unsigned(outputs.count)) &
                       (unsigned(right - g.first_owned_column()) < unsigned(g.owned_columns));
    return {g.lead + down * g.stride, g.work_column + right * g.stride, owned ? line.owned + right : NONE};
  }
  template <int MOVE>
  DEVICE void copy_group(int first, int sharers) const {
    using Vector = typename VectorOf<MOVE>::type;
    const int pieces = int(a.by_copy_pieces.divisor);
    for (int i = first; i < owned_positions() * pieces; i += sharers) {
      const int index = a.by_copy_pieces.divide(i), channel_bytes = (i - index * pieces) * MOVE;
      const Passed p = owned_position(index);
      if (p.out == NONE) continue;
      global_store(passed_out(p) + channel_bytes, global_load<Vector>(passed_x(p.line, p.column) + channel_bytes));
    }
  }
  DEVICE unsigned char* passed_out(const Passed& p) const {
    return out + (p.out * a.out_slots.pixel + a.passed_group * a.out_slots.slot) * BYTES;
  }
  // A pixel of the strip that lies in an image.
  DEVICE const unsigned char* passed_x(int line, int column) const {
    const int pixel = shared_load<Line>(line_at(line)).pixel + column;
    return x + (pixel * a.x_slots.pixel + a.passed_group * a.x_slots.slot) * BYTES;
  }
  DEVICE void pool_group(int first, int sharers) const {  // 3x3 average, padding 1
    const int pieces = int(a.by_copy_pieces.divisor);
    for (int i = first; i < owned_positions() * pieces; i += sharers) {
      const int index = a.by_copy_pieces.divide(i), channel_bytes = (i - index * pieces) * 4;
      const Passed p = owned_position(index);
      if (p.out != NONE) global_store(passed_out(p) + channel_bytes, pooled_word(p.line, p.column, channel_bytes));
    }
  }
  DEVICE uint32_t pooled_word(int line, int column, int channel_bytes) const {
    Float2 sum{0, 0};
    int count = 0;
    for (int dy = -1; dy <= 1; dy++) {
      if (shared_load<Line>(line_at(line + dy)).pixel == NONE) continue;
      for (int dx = -1; dx <= 1; dx++) {
        if (!in_image(column + dx)) continue;
        const Float2 values = unpack_word(global_load<uint32_t>(passed_x(line + dy, column + dx) + channel_bytes));
        sum.x += values.x, sum.y += values.y, count++;
      }
    }
    const float divisor = a.pool == AVERAGE ? 9.0f : float(count);
    return pack_word(sum.x / divisor, sum.y / divisor);
  }
  // Adds what passes to u_0, once x of that group is in its strip.
  DEVICE void add_passed_group() const {
    const int pieces = g.channels / PER_WORD;
    for (int i = thread; i < g.lines * g.stored * pieces; i += threads) {
      const int stored = i / pieces;
      const int channel = (i - stored * pieces) * PER_WORD;
      const int line = g.by_stored.divide(stored);
      const int column = stored - line * g.stored;
      if (!is_pixel(line, column)) continue;
      const uint32_t passed = a.pool == NO_POOL ? global_load<uint32_t>(passed_x(line, column) + channel * BYTES)
                                                : pooled_word(line, column, channel * BYTES);
      const SharedPtr u = swizzled_place(strip(0) + channel_offset(slot_of(line, column), channel));
      shared_store(u, add_word(passed, shared_load<uint32_t>(u)));
    }
  }

  // ---- one pass: 16 * TILES positions of a warp, all K slices ----

  // sums += the products of one chunk of K slices; base: from the begin of the strip to this lane's rows of the mma's A.
  DEVICE void multiply_chunk(
      Accumulator (&sums)[TILES][COLUMNS], const int (&base)[TILES], int step, SharedPtr weights, int chunk,
      const NextCopy& /*next*/) const {
    multiply_turns(sums, base, step, weights, chunk, 0, 1);
  }
  // Of RES2NET_CHAIN_UNROLL slices each: every `stride`th turn of a chunk, from the `begin`th on.
  DEVICE void multiply_turns(
      Accumulator (&sums)[TILES][COLUMNS], const int (&base)[TILES], int step, SharedPtr weights, int chunk, int begin,
      int stride) const {
    const int turns = g.chunk_slices / RES2NET_CHAIN_UNROLL, slice_bytes = g.part_columns * COLUMN_BYTES;
    const SharedPtr source = strip(step);
    const SharedPtr shifts_of = turn_at(chunk * turns);
    SharedPtr weight = weights + begin * RES2NET_CHAIN_UNROLL * slice_bytes + warp_n * COLUMNS * COLUMN_BYTES + lane * 16;
#pragma unroll 1
    for (int turn = begin; turn < turns; turn += stride) {
      const SharedPtr shift = shifts_of + turn * int(sizeof(Bytes16));
      const Bytes16 shifts = DEPTHS > 0 ? shared_load<Bytes16>(shift) : Bytes16{};  // else there may be no registers left
#pragma unroll
      for (int k = 0; k < RES2NET_CHAIN_UNROLL; k++) {
        FragmentB b[COLUMNS];
#pragma unroll
        for (int j = 0; j + 1 < COLUMNS; j += 2) {
          const FragmentA two = load_matrix(weight + j * COLUMN_BYTES);
          b[j] = {{two.word[0], two.word[1]}}, b[j + 1] = {{two.word[2], two.word[3]}};
        }
        if constexpr (COLUMNS % 2) b[COLUMNS - 1] = load_columns(weight + (COLUMNS - 1) * COLUMN_BYTES);
        weight = weight + slice_bytes;
        const int moved = int(DEPTHS > 0 ? shifts.word[k] : shared_load<Bytes4>(shift + k * 4).word[0]);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          const FragmentA matrix = rounded(load_matrix(swizzled_place(source + (base[tile] + moved))));
          multiply<Element>(sums[tile], matrix, b);
        }
      }
      weight = weight + (stride - 1) * RES2NET_CHAIN_UNROLL * slice_bytes;
    }
  }

  DEVICE int lane_channel() const { return first_channel + warp_n * COLUMNS * 8 + lane % 4 * 2; }  // the first of every 8
  // Sums begin at the bias. biased: else at zero.
  DEVICE void start_sums(Accumulator (&sums)[TILES][COLUMNS], int step, bool biased) const {
    const int channel = lane_channel(), left = biased ? g.packed_columns * 8 - channel : 0;
    const float* const bias = a.bias + (step * g.packed_columns * 8 + channel);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      const Float2 start = j * 8 < left ? global_load<Float2>(bias + j * 8) : Float2{0, 0};
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) sums[tile][j] = {{start.x, start.y, start.x, start.y}};
    }
  }
  // Where a thread's channel of column j is, beside that of column 0. An instance that swizzles has one warp along them.
  DEVICE SharedPtr column_of(SharedPtr first, int j) const {
    if constexpr (DEPTHS == PLANES) return first + j * g.plane_bytes;
    if constexpr (swizzled(DEPTHS)) return first ^ j * 16;
    return first + j * 8 * BYTES;
  }

  // What all output positions of a step have in common, for one thread.
  struct Raster {
    int out_pixel;     // bytes
    int real, filled;  // channels from this thread's first one on: of the group, written
    bool adds;         // to x of the next group
    Outputs outputs;
    Owned owned;
    unsigned char* to;
    SharedPtr lines, u;  // of the first line and position
  };
  DEVICE Raster raster_of(int step) const {
    const int channel = lane_channel();
    Raster r;
    r.out_pixel = held(a.out_slots.pixel * BYTES);
    r.real = held(g.channels - channel);
    r.filled = held(a.fill_channels - channel);
    r.adds = g.adds && step + 1 < g.steps;  // with stride 1
    r.outputs = shared_load<Outputs>(tables() + 16);
    r.owned = shared_load<Owned>(tables() + 32);
    r.to = held(out + ((a.first_group + step) * a.out_slots.slot + channel) * BYTES);
    r.lines = raster_line_at(g.stride == 1 ? g.work_line(step) : 0);
    if constexpr (DEPTHS != 0) r.lines = held(r.lines);  // else there may be no register left
    r.u = strip(step + 1) + channel_offset(slot_of(g.work_line(step), 0), channel);
    return r;
  }

  // One position, this thread's channels: y to `out`, and y + x to where x of the next group is.
  DEVICE void finish(const Accumulator (&sums)[COLUMNS], int half, const Raster& r, int position) const {
    const int down = FastDivisor::divide(position, r.outputs.magic), column = position + down * r.outputs.up;
    const auto line = shared_load<Bytes8>(r.lines + down * int(sizeof(Line)));  // its pixel, and that which is owned
    const bool valid = (int(line.word[0]) != NONE) & (unsigned(column - r.outputs.first) < unsigned(r.outputs.count));
    if (!valid) return;  // a slot that stays zero, as padding of the next convolution
    const bool owned = (int(line.word[1]) != NONE) & (unsigned(column - r.owned.first) < unsigned(r.owned.count));
    unsigned char* const to = stepped(r.to, int(line.word[0]) + column, r.out_pixel);
    const SharedPtr u = swizzled_place(r.u + chunk_offset(position, 0));
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      Pair y = clamped(sums[j].value[2 * half], sums[j].value[2 * half + 1]);
      constexpr int SURE = sure_columns(DEPTHS);
      if (j >= SURE) {
        // Zero weights give a zero sum, but for Inf and NaN. In half precision the number of channels is even.
        if (r.real <= j * 8) y = Pair{};
        if constexpr (BYTES == 4) {
          if (r.real <= j * 8 + 1) y.word[1] = 0;
        }
      }
      if (owned && (j < SURE || r.filled > j * 8)) store_pair(to + j * 8 * BYTES, r.filled - j * 8, y);
      // Where a slot has room for all columns, zeros are added to zeros behind the group.
      if (r.adds && (DEPTHS > 0 || r.real > j * 8)) {
        const SharedPtr next = column_of(u, j);
        Pair sum = shared_load<Pair>(next);
        for (int i = 0; i < 2 / PER_WORD; i++) sum.word[i] = add_word(y.word[i], sum.word[i]);
        shared_store(next, sum);
      }
    }
  }
  DEVICE Pair clamped(float first, float second) const {
    if constexpr (BYTES == 2)  // rounded first: bounds are rounded alike
      return {{clamp_pair<Element>(pack_word(first, second), lower, upper)}};
    else
      return {{bits_of(clamp(first, a.lower, a.upper)), bits_of(clamp(second, a.lower, a.upper))}};
  }
  // filled: channels from this one on that are written.
  DEVICE void store_pair(unsigned char* to, int filled, Pair y) const {
    if constexpr (BYTES == 4) {
      if (!a.whole_pairs) {
        global_store(to, y.word[0]);
        if (filled > 1) global_store(to + BYTES, y.word[1]);
        return;
      }
    }
    global_store(to, y);
  }

  // ---- what the other kernels do in ways of their own ----
  // The first position of this warp in a pass.
  DEVICE int first_position(int pass) const { return (pass * g.warps_m + warp_m) * 16 * TILES; }
  // From the begin of the strip to this lane's row of the mma's A.
  DEVICE int place_of_row(int step, int first, int tile) const {
    // Rows beyond the last position repeat it: their sums are dropped.
    const int position = first + tile * 16 + lane % 16, end = g.positions(step);
    return chunk_offset(slot_of_position(step, position < end ? position : end - 1), lane / 16);
  }
  DEVICE bool adds_bias() const { return true; }  // to this warp's sums
  static constexpr bool RUNS_ON = false;          // whether a barrier of the CTA stands before the first chunk of a step alone
  // Before a barrier: what this thread wrote to shared memory is going to be multiplied.
  DEVICE void show_writes() const {}
  // The positions of one pass of this warp, of which the first is number `first`.
  DEVICE void finish_pass(const Accumulator (&sums)[TILES][COLUMNS], int step, int /*pass*/, int first) const {
    finish_tiles(sums, step, first + lane / 4, 16);
  }
  // first: of the position of this lane's first sum; so many positions from one tile to the next.
  DEVICE void finish_tiles(const Accumulator (&sums)[TILES][COLUMNS], int step, int first, int tile_positions) const {
    const int end = g.positions(step);
    const Raster raster = raster_of(step);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int position = first + tile * tile_positions + half * 8;
        if (position < end) finish(sums[tile], half, raster, position);
      }
    }
  }
  DEVICE void strips_are_clear() const {}
  DEVICE void finish_step(int /*step*/) const {}

  DEVICE void run() const { run(*this); }
  template <class Cta>
  DEVICE void run(const Cta& cta) const {  // cta: this object, as its own type
    ChunkCursor fetch;                     // the next chunk of weights to start copying
    if (!a.weights_stand) {
      predecessor_wait();  // which may write them
    }
    cta.prepare_weights();
    cta.start_weights(fetch);
    clear_strips();
    this->make_tables();
    predecessor_wait();  // x is there, and nobody needs what lies in out
    successor_begin();
    sync_cta();  // cleared before the copies land
    cta.strips_are_clear();
    cta.start_group(0);
#pragma unroll 1
    for (int ahead = 1; ahead < g.stages; ahead++) {
      copy_async_commit();
      advance(fetch);
      if (ahead + 1 < g.stages) cta.start_weights(fetch);
    }
    cta.pass_group();
    if (a.add_passed) {
      copy_async_wait(g.stages - 2);
      sync_cta();  // x of the first group is there
      add_passed_group();
    }

    int stage_in_use = g.stages - 1;  // advanced before its first use
    int round = -1;                   // through the stages
    int since_group = g.stages;       // chunks taken into use since a copy of x was committed
#pragma unroll 1
    for (int step = 0; step < g.steps; step++) {
      const int end = g.positions(step);
      const int passes = g.passes(step, TILES);
      const bool more = step + 1 < g.steps;
#pragma unroll 1
      for (int pass = 0; pass < passes; pass++) {
        const int first = cta.first_position(pass);
        Accumulator sums[TILES][COLUMNS];
        cta.start_sums(sums, step, cta.adds_bias());
        int base[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) base[tile] = cta.place_of_row(step, first, tile);
        NextCopy next;
        // Takes the next chunk into use. together: behind a barrier of the CTA, as always at the begin of a step.
        const auto take_chunk = [&](bool together, bool begins_step) {
          next = {fetch, together};
          if (together) {
            copy_async_wait(g.stages - 2 + (since_group < g.stages ? 1 : 0));
            cta.show_writes();
            sync_cta();  // this step's strip and copies of this chunk are there; nobody reads the other strip, or the last chunk
            cta.start_weights(fetch);
          }
          copy_async_commit();
          advance(fetch);
          if (++stage_in_use >= g.stages) stage_in_use = 0, round++;
          since_group++;
          if (together && more && begins_step) {
            cta.start_group(step + 1);
            copy_async_commit();
            since_group = 1;
          }
          cta.await_weights(stage_in_use, round & 1);
        };
        if constexpr (!Cta::RUNS_ON) {
#pragma unroll 1
          for (int chunk = 0; chunk < g.chunks; chunk++) {
            if (g.chunks > 1 || pass == 0) take_chunk(true, pass + chunk == 0);
            if (first < end) cta.multiply_chunk(sums, base, step, stage(stage_in_use), chunk, next);
          }
        } else {
          if (pass == 0)
            take_chunk(true, true);
          else if (g.chunks > 1)
            take_chunk(false, false);
          // While products run on, the compiler wants all threads of a warpgroup in one place: each way has a loop of its own.
          if (first < end) {
#pragma unroll 1
            for (int chunk = 0; chunk < g.chunks; chunk++) {
              if (chunk > 0) take_chunk(false, false);
              cta.multiply_chunk(sums, base, step, stage(stage_in_use), chunk, next);
            }
            cta.end_products(sums, next);
          } else {
#pragma unroll 1
            for (int chunk = 0; chunk < g.chunks; chunk++) {
              if (chunk > 0) take_chunk(false, false);
              cta.leave_chunk(chunk, next);
            }
          }
        }
        if (more && pass == 0) {
          copy_async_wait(g.chunks - 1);
          sync_cta();  // x of the next group is there, for y to be added
        }
        cta.finish_pass(sums, step, pass, first);
      }
      cta.finish_step(step);
    }
  }
};

}  // namespace res2net_fused::cuda
