// The Res2Net chain in one launch, inference, channels-last, in half precision or in float32 with products in TF32:
//     y_i = clamp(conv3x3_i(u_i) + bias_i),   u_i = x_i + y_{i-1}  (or x_i alone);   one group passes, and may be added to u_0
// A CTA owns a part of the output (see cuda/plan/geometry.h) and keeps u_i of that part and its halo in shared memory: step i
// reads strip i % 2. Meanwhile x_{i+1} arrives in the other strip, where the step's end adds y_i to it.
#pragma once
#include "cuda/chain/words.h"
#include "cuda/plan/arguments.h"
#include "cuda/plan/instances.h"

namespace res2net_fused::cuda {

// DEPTHS, COLUMNS and TILES as in cuda/plan/instances.h.
template <class Element, int DEPTHS, int COLUMNS, int TILES>
struct StripCta : Words<Element> {
  using Own = Words<Element>;
  using Own::BYTES, Own::PER_WORD, Own::add_word, Own::held, Own::pack_word, Own::rounded, Own::unpack_word;
  using typename Own::Pair;
  static constexpr int COLUMN_BYTES = 256;  // of 8 output channels of a K slice of the weights

  const ChainArguments& a;
  const ChainGeometry& g;
  const unsigned char* x;  // of the first image of this CTA
  unsigned char* out;
  SharedPtr shared;
  int thread, lane, warp_m, warp_n, threads;
  int first_channel = 0;                     // that this CTA computes
  uint32_t lower, upper;                     // in half precision: the bounds of y, twice each
  int first_image, first_row, first_column;  // image, row and column that line 0 and column 0 of the strip stand for
  int first_out_row, first_out_column;       // of `out`, that the raster of output positions begins with at step 0

  // block: counts the parts of the images, see ChainGeometry.
  DEVICE StripCta(const ChainArguments& arguments, int block)
      : a(arguments), g(arguments.geometry), shared(shared_memory()), thread(thread_index()), lane(thread % 32),
        lower(pack_word(a.lower, a.lower)), upper(pack_word(a.upper, a.upper)) {
    warp_n = thread / 32 % g.warps_n;
    warp_m = thread / 32 / g.warps_n;
    threads = 32 * g.warps_m * g.warps_n;
    const int column_block = block % g.column_blocks;
    const int row_block = block / g.column_blocks % g.row_blocks;
    first_image = block / g.column_blocks / g.row_blocks * g.tile_images;
    first_row = row_block * g.rows * g.stride - g.lead;
    first_column = column_block * g.columns * g.stride - g.halo_columns;
    first_out_row = g.stride == 1 ? first_row + g.work_line(0) : row_block * g.rows;
    first_out_column = g.stride == 1 ? first_column : column_block * g.columns;
    const int64_t pixels = int64_t(first_image) * g.height * g.width;
    const int64_t out_pixels = int64_t(first_image) * g.out_height * g.out_width;
    x = held(static_cast<const unsigned char*>(a.x) + pixels * a.x_slots.pixel * BYTES);
    out = held(static_cast<unsigned char*>(a.out) + out_pixels * a.out_slots.pixel * BYTES);
  }

  // ---- where things are ----

  DEVICE int depths() const {
    if constexpr (DEPTHS > 0)
      return DEPTHS;
    else
      return g.depths;
  }
  DEVICE int depths_divide(int slice) const {
    if constexpr (DEPTHS > 0)
      return slice / DEPTHS;
    else
      return g.by_depths.divide(slice);
  }
  DEVICE int slot_bytes() const {
    if constexpr (DEPTHS > 0)
      return slot_bytes_of(DEPTHS, DEPTHS);
    else
      return g.slot_bytes;
  }
  DEVICE SharedPtr strip(int step) const {
    return shared.part(step % 2 * g.strip_bytes, g.strip_bytes, step % 2 ? "strip 1" : "strip 0");
  }
  DEVICE SharedPtr stage(int index) const {
    return shared.part(g.strips * g.strip_bytes + index * g.stage_bytes, g.stage_bytes, "weights");
  }
  DEVICE int slot_of(int line, int column) const { return g.dilation + line * g.pitch + column; }
  static DEVICE int swizzle(int slot) { return unsigned(slot) / (8 / (2 * DEPTHS)) % (2 * DEPTHS); }
  DEVICE int chunk_offset(int slot, int chunk) const {
    if constexpr (DEPTHS == PLANES) return chunk * g.plane_bytes + slot * 16;
    if constexpr (swizzled(DEPTHS)) chunk ^= swizzle(slot);
    return slot * slot_bytes() + chunk * 16;
  }
  DEVICE int channel_offset(int slot, int channel) const {
    constexpr int PER_CHUNK = 16 / BYTES;
    return chunk_offset(slot, channel / PER_CHUNK) + channel % PER_CHUNK * BYTES;
  }

  // A pixel of the strip: its slot, and the pixel of x it stands for.
  struct Pixel {
    int line, column;              // of the strip
    int image, row, image_column;  // image: counted from the CTA's first
    bool valid;                    // inside an image
  };
  DEVICE Pixel pixel_at(int line, int column) const {
    Pixel p{line, column, g.by_period.divide(line), 0, first_column + column, false};
    p.row = first_row + line - p.image * g.period;
    // A zero slot of a full line is column `width`; beside a column part it is outside the halo, where nothing matters.
    p.valid = (unsigned(p.row) < unsigned(g.height)) & (unsigned(p.image_column) < unsigned(g.width)) &
              (first_image + p.image < g.images);
    return p;
  }
  DEVICE int out_offset(const Pixel& p) const {
    const int row = g.by_stride.divide(p.row), column = g.by_stride.divide(p.image_column);
    return ((p.image * g.out_height + row) * g.out_width + column) * a.out_slots.pixel * BYTES;
  }
  // The slot in the middle of the window of an output position.
  DEVICE int slot_of_position(int step, int position) const {
    if (g.stride == 1) return slot_of(g.work_line(step), position);
    const int line = g.by_work_pitch.divide(position), column = position - line * g.work_pitch;
    return slot_of(g.work_line(step) + line * g.stride, g.work_column + column * g.stride);
  }

  // ---- data into shared memory ----

  DEVICE void clear_strips() const {
    for (int chunk = thread; chunk < g.strips * g.strip_bytes / 16; chunk += threads)
      shared_store(shared + chunk * 16, Bytes16{});
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
    const int together = kept(many ? 1 : by_pieces.divide(threads)), first = many ? 0 : by_pieces.divide(thread);
    const int end = first < together ? kept((g.lines - 2 * first_line) * g.stored) : 0;
    const FastDivisor by_stored = held(g.by_stored), by_period = held(g.by_period);
    const int first_image_row = kept(first_row), image_column = kept(first_column), pixel_bytes = kept(a.x_slots.pixel * BYTES);
    for (int piece = thread - first * pieces; piece < pieces; piece += many ? threads : pieces) {
      const int byte = first_byte + piece * MOVE, left = BYTES * g.channels - byte;
      if (left <= 0) break;
      const unsigned char* const from = kept(x + (a.first_group + step) * a.x_slots.slot * BYTES + byte);
      const SharedPtr to = strip(step) + channel_offset(0, byte / BYTES);
      const int valid = kept(left < MOVE ? left : MOVE);
      for (int stored = first; stored < end; stored += together) {
        int line = by_stored.divide(stored);
        const int column = stored - line * int(by_stored.divisor);
        line += first_line;
        const int image = by_period.divide(line);
        const int row = first_image_row + line - image * int(by_period.divisor), x_column = image_column + column;
        if ((unsigned(row) < unsigned(g.height)) & (unsigned(x_column) < unsigned(g.width)) & (first_image + image < g.images))
          copy_async<MOVE>(
              moved(to, slot_of(line, column)), from + ((image * g.height + row) * g.width + x_column) * pixel_bytes, valid);
      }
    }
  }

  // The order in which chunks of weights are used: for every step, for every pass over the pixels, all chunks; a chunk that
  // holds a whole convolution stays for all passes.
  struct ChunkCursor {
    int step = 0, pass = 0, chunk = 0, stage = 0;
  };
  DEVICE void advance(ChunkCursor& cursor) const {
    if (++cursor.stage == g.stages) cursor.stage = 0;
    if (++cursor.chunk < g.chunks) return;
    cursor.chunk = 0;
    if (g.chunks > 1 && ++cursor.pass < g.passes(cursor.step, TILES)) return;
    cursor.pass = 0;
    cursor.step++;
  }
  DEVICE void start_weights(const ChunkCursor& cursor) const {
    if (cursor.step >= g.steps) return;
    const SharedPtr to = stage(cursor.stage);
    const auto from =
        static_cast<const unsigned char*>(a.weight) + (int64_t(cursor.step) * g.chunks + cursor.chunk) * g.stage_bytes;
    for (int chunk = thread; chunk < g.stage_bytes / 16; chunk += threads) copy_async<16>(to + chunk * 16, from + chunk * 16);
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
  DEVICE int owned_pixels() const { return g.tile_images * g.rows * g.columns; }
  // The pixel of x at the middle of the window of an owned output pixel, all of which are numbered image by image.
  DEVICE Pixel owned_pixel(int index) const {
    const int row = index / g.columns;
    const int image = row / g.rows;
    const int line = g.lead + image * g.period + (row - image * g.rows) * g.stride;
    return pixel_at(line, g.owned_column + (index - row * g.columns) * g.stride);
  }
  template <int MOVE>
  DEVICE void copy_group(int first, int sharers) const {
    using Vector = typename VectorOf<MOVE>::type;
    const int pieces = int(a.by_copy_pieces.divisor);
    for (int i = first; i < owned_pixels() * pieces; i += sharers) {
      const int index = a.by_copy_pieces.divide(i);
      const Pixel p = owned_pixel(index);
      if (!p.valid) continue;
      const int channel_bytes = (i - index * pieces) * MOVE;
      global_store(
          out + out_offset(p) + a.passed_group * a.out_slots.slot * BYTES + channel_bytes,
          global_load<Vector>(passed_x(p) + channel_bytes));
    }
  }
  DEVICE const unsigned char* passed_x(const Pixel& p) const {
    const int pixel = (p.image * g.height + p.row) * g.width + p.image_column;
    return x + (pixel * a.x_slots.pixel + a.passed_group * a.x_slots.slot) * BYTES;
  }
  DEVICE void pool_group(int first, int sharers) const {  // 3x3 average, padding 1
    const int pieces = int(a.by_copy_pieces.divisor);
    for (int i = first; i < owned_pixels() * pieces; i += sharers) {
      const int index = a.by_copy_pieces.divide(i);
      const Pixel p = owned_pixel(index);
      if (!p.valid) continue;
      const int channel_bytes = (i - index * pieces) * 4;
      global_store(
          out + out_offset(p) + a.passed_group * a.out_slots.slot * BYTES + channel_bytes, pooled_word(p, channel_bytes));
    }
  }
  DEVICE uint32_t pooled_word(const Pixel& p, int channel_bytes) const {
    Float2 sum{0, 0};
    int count = 0;
    for (int dy = -1; dy <= 1; dy++) {
      for (int dx = -1; dx <= 1; dx++) {
        const int row = p.row + dy, column = p.image_column + dx;
        if (row < 0 || row >= g.height || column < 0 || column >= g.width) continue;
        const int offset = (dy * g.width + dx) * a.x_slots.pixel * BYTES + channel_bytes;
        const Float2 values = unpack_word(global_load<uint32_t>(passed_x(p) + offset));
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
      const Pixel p = pixel_at(line, stored - line * g.stored);
      if (!p.valid) continue;
      const uint32_t passed =
          a.pool == NO_POOL ? global_load<uint32_t>(passed_x(p) + channel * BYTES) : pooled_word(p, channel * BYTES);
      const SharedPtr u = strip(0) + channel_offset(slot_of(line, p.column), channel);
      shared_store(u, add_word(passed, shared_load<uint32_t>(u)));
    }
  }

  // ---- one pass: 16 * TILES positions of a warp, all K slices ----

  // sums += the products of one chunk of K slices; base: the slots of this lane's rows of the mma's A.
  DEVICE void multiply_chunk(
      Accumulator (&sums)[TILES][COLUMNS], const int (&base)[TILES], int step, SharedPtr weights, int chunk) const {
    multiply_slices(sums, base, step, weights, chunk * g.chunk_slices, 0, RES2NET_CHAIN_UNROLL);
  }
  // RES2NET_CHAIN_UNROLL slices of every `stride` in a chunk, from the `begin`th on.
  DEVICE void multiply_slices(
      Accumulator (&sums)[TILES][COLUMNS], const int (&base)[TILES], int step, SharedPtr weights, int first_slice, int begin,
      int stride) const {
    const int slice_bytes = g.part_columns * COLUMN_BYTES;
    const SharedPtr source = strip(step);
    SharedPtr weight = weights + begin * slice_bytes + warp_n * COLUMNS * COLUMN_BYTES + lane * 16;
#pragma unroll 1
    for (int slice = first_slice + begin; slice < first_slice + g.chunk_slices; slice += stride) {
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
        const int tap = depths_divide(slice + k);
        const int depth = slice + k - tap * depths();
        const int shift = ((tap / 3 - 1) * g.pitch + tap % 3 - 1) * g.dilation;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          const FragmentA matrix = rounded(load_matrix(source + chunk_offset(base[tile] + shift, 2 * depth + lane / 16)));
          multiply<Element>(sums[tile], matrix, b);
        }
      }
      weight = weight + (stride - RES2NET_CHAIN_UNROLL) * slice_bytes;
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
  // Where slot 0's channel is in another slot: beside it by whole slots, in another order of its chunks if that is swizzled.
  DEVICE SharedPtr moved(SharedPtr first, int slot) const {
    if constexpr (DEPTHS == PLANES) return first + slot * 16;
    if constexpr (swizzled(DEPTHS)) return (first + slot * slot_bytes()) ^ swizzle(slot) * 16;
    return first + slot * slot_bytes();
  }
  // Where a thread's channel of column j is, beside that of column 0. An instance that swizzles has one warp along them.
  DEVICE SharedPtr column_of(SharedPtr first, int j) const {
    if constexpr (DEPTHS == PLANES) return first + j * g.plane_bytes;
    if constexpr (swizzled(DEPTHS)) return first ^ j * 16;
    return first + j * 8 * BYTES;
  }

  // What all output positions of a step have in common, for one thread.
  struct Raster {
    int line, row, owned_line, slot;  // of the strip, of `out`, the first owned one of the raster, and the slot it begins with
    int out_pixel;                    // bytes
    int real, filled, added;          // channels from this thread's first one on: of the group, written, added to x
    FastDivisor by_pitch, by_period;
    unsigned char* to;
    SharedPtr u;  // of slot 0
  };
  DEVICE Raster raster_of(int step) const {
    const int channel = lane_channel();
    const bool adds = g.adds && step + 1 < g.steps;  // with stride 1
    Raster r;
    r.line = held(g.work_line(step));
    r.row = held(first_out_row + step * g.shrink);
    r.owned_line = held(g.first_owned_line(step));
    r.slot = held(slot_of(g.work_line(step), 0));
    r.out_pixel = held(a.out_slots.pixel * BYTES);
    r.real = held(g.channels - channel);
    r.filled = held(a.fill_channels - channel);
    r.added = held(adds ? g.channels - channel : 0);
    r.to = held(out + ((a.first_group + step) * a.out_slots.slot + channel) * BYTES);
    r.u = strip(step + 1) + channel_offset(0, channel);
    r.by_pitch = held(g.by_work_pitch), r.by_period = held(g.by_period);
    return r;
  }

  // One position, this thread's channels: y to `out`, and y + x to where x of the next group is.
  DEVICE void finish(const Accumulator (&sums)[COLUMNS], int half, const Raster& r, int position) const {
    const int line = r.by_pitch.divide(position), column = position - line * int(r.by_pitch.divisor);
    const int image = r.by_period.divide(r.line + line);
    const int row = r.row + line - image * int(r.by_period.divisor), out_column = first_out_column + column;
    const bool valid = (unsigned(row) < unsigned(g.out_height)) & (unsigned(out_column) < unsigned(g.out_width)) &
                       (first_image + image < g.images);
    if (!valid) return;  // a slot that stays zero, as padding of the next convolution
    const bool owned = (unsigned(line - r.owned_line) < unsigned(g.owned_lines)) &
                       (unsigned(column - g.first_owned_column()) < unsigned(g.owned_columns));
    const int filled = owned ? r.filled : 0;
    unsigned char* const to = held(r.to + ((image * g.out_height + row) * g.out_width + out_column) * r.out_pixel);
    const SharedPtr u = moved(r.u, r.slot + position);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      Pair y = clamped(sums[j].value[2 * half], sums[j].value[2 * half + 1]);
      // Zero weights give a zero sum, but for Inf and NaN. In half precision the number of channels is even.
      if (r.real <= j * 8) y = Pair{};
      if constexpr (BYTES == 4) {
        if (r.real <= j * 8 + 1) y.word[1] = 0;
      }
      if (filled > j * 8) store_pair(to + j * 8 * BYTES, filled - j * 8, y);
      if (r.added > j * 8) {
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
  // The slot of this lane's row of the mma's A.
  DEVICE int slot_of_row(int step, int first, int tile) const {
    // Rows beyond the last position repeat it: their sums are dropped.
    const int position = first + tile * 16 + lane % 16, end = g.positions(step);
    return slot_of_position(step, position < end ? position : end - 1);
  }
  DEVICE bool adds_bias() const { return true; }  // to this warp's sums
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
    cta.start_weights(fetch);
    clear_strips();
    sync_cta();  // cleared before the copies land
    cta.strips_are_clear();
    cta.start_group(0);
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
        for (int tile = 0; tile < TILES; tile++) base[tile] = cta.slot_of_row(step, first, tile);
#pragma unroll 1
        for (int chunk = 0; chunk < g.chunks; chunk++) {
          if (g.chunks > 1 || pass == 0) {
            copy_async_wait(g.stages - 2 + (since_group < g.stages ? 1 : 0));
            cta.show_writes();
            sync_cta();  // this chunk and this step's strip are there; nobody reads the chunk before, or the other strip
            cta.start_weights(fetch);
            copy_async_commit();
            advance(fetch);
            if (++stage_in_use >= g.stages) stage_in_use = 0;
            since_group++;
            if (more && pass == 0 && chunk == 0) {
              cta.start_group(step + 1);
              copy_async_commit();
              since_group = 1;
            }
          }
          if (first < end) cta.multiply_chunk(sums, base, step, stage(stage_in_use), chunk);
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
