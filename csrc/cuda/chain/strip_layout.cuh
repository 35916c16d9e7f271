// Where a CTA of the chain kernels has what: its part of the images, its strips, and tables of what each line of them stands for.
#pragma once
#include "cuda/chain/words.h"
#include "cuda/plan/arguments.h"
#include "cuda/plan/instances.h"

namespace res2net_fused::cuda {

// DEPTHS as in cuda/plan/instances.h.
template <class Element, int DEPTHS>
struct StripLayout : Words<Element> {
  using Own = Words<Element>;
  using Own::BYTES, Own::held, Own::pack_word;

  const ChainArguments& a;
  const ChainGeometry& g;
  const unsigned char* x;  // of the first image of this CTA
  unsigned char* out;
  SharedPtr shared;
  int thread, lane, warp_m, warp_n, threads;
  int first_channel = 0;                     // that this CTA computes
  uint32_t lower, upper;                     // in half precision: the bounds of y, twice each
  int first_image, first_row, first_column;  // image, row and column that line 0 and column 0 of the strip stand for
  int first_out_row, first_out_column;       // the owned ones of `out`

  // block: counts the parts of the images, see ChainGeometry.
  DEVICE StripLayout(const ChainArguments& arguments, int block)
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
    first_out_row = row_block * g.rows;
    first_out_column = column_block * g.columns;
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
  // From the begin of a strip to 16 bytes of a slot, before they are swizzled.
  DEVICE int chunk_offset(int slot, int chunk) const {
    if constexpr (DEPTHS == PLANES) return chunk * g.plane_bytes + slot * 16;
    return slot * slot_bytes() + chunk * 16;
  }
  DEVICE int channel_offset(int slot, int channel) const {
    constexpr int PER_CHUNK = 16 / BYTES;
    return chunk_offset(slot, channel / PER_CHUNK) + channel % PER_CHUNK * BYTES;
  }
  // Where a place in a strip really is: chunks of a slot change places by the slot's address, inside the slot.
  static DEVICE SharedPtr swizzled_place(SharedPtr place) {
    if constexpr (swizzled(DEPTHS)) return place.swizzled((2 * DEPTHS - 1) * 16);
    return place;
  }

  // ---- what a line stands for: worked out once, in tables in shared memory ----

  // Of a line of the strip, or of the raster in which output positions are numbered. Pixels are counted from the CTA's first
  // image on; NONE: the line lies in no image.
  struct alignas(8) Line {
    int pixel;  // of x, or in the raster of `out`, in the line's first column, be it left of the image
    int owned;  // the same of `out`, where this CTA owns the row
  };
  // In front of the lines: the division by the columns of a line that lie in the image, the only ones that are loaded; then of
  // the raster. Read from here they stay in registers, where the compiler would load a kernel's arguments anew at each use.
  struct alignas(16) Outputs {
    int up;            // from a position to the one above
    uint32_t magic;    // of the division by a line
    int first, count;  // columns that are outputs
  };
  struct alignas(8) Owned {
    int first, count;  // columns of the raster
  };
  static constexpr int NONE = INT32_MIN;
  DEVICE SharedPtr tables() const {
    return shared.part(g.strips * g.strip_bytes + g.stages * g.stage_bytes, g.tables_bytes, "tables");
  }
  // Where the weights of a stage arrive.
  DEVICE SharedPtr arrival_of(int stage) const { return tables() + (48 + 8 * stage); }
  // From the line above the strip to the one below it.
  DEVICE SharedPtr line_at(int line) const { return tables() + (TABLE_HEAD + (line + 1) * int(sizeof(Line))); }
  // The lines of the raster: the strip's own, or with a stride those of `out`.
  DEVICE SharedPtr raster_line_at(int line) const { return line_at(g.stride == 1 ? line : g.lines + 1 + line); }
  // Shifts in a strip of the slices of a turn of the main loop, in bytes, or in units of 16 where SharedMatrix counts so.
  DEVICE SharedPtr turn_at(int turn) const {
    return tables() + (TABLE_HEAD + (divide_up(g.table_lines, 2) + turn) * int(sizeof(Bytes16)));
  }

  DEVICE void make_tables() const {
    // There is a column in every part of an image.
    const int left = left_column(), to_right = g.width - first_column;
    const int loaded = (g.stored < to_right ? g.stored : to_right) - left;
    if (thread == 0) {
      const int first = g.stride == 1 ? left : 0, beyond = g.out_width - first_out_column;
      const int count = g.stride == 1 ? loaded : beyond < g.columns ? beyond : g.columns;
      shared_store(tables(), FastDivisor(loaded));
      shared_store(tables() + 16, Outputs{-g.work_pitch, g.by_work_pitch.magic, first, count});
      shared_store(tables() + 32, Owned{g.first_owned_column(), g.owned_columns});
    }
    for (int i = thread; i < g.table_lines; i += threads) {
      const int line = i - 1;
      if (line > g.lines) {  // of the raster, with a stride
        const int row = first_out_row + line - g.lines - 1;
        const int pixel = row < g.out_height ? row * g.out_width + first_out_column : NONE;
        shared_store(line_at(line), Line{pixel, pixel});
        continue;
      }
      const int image = line < 0 ? 0 : g.by_period.divide(line), row = first_row + line - image * g.period;
      const bool valid = (unsigned(row) < unsigned(g.height)) & (first_image + image < g.images);
      const bool owned = g.stride == 1 && unsigned(line - g.lead) < unsigned(g.owned_lines);
      const int pixel = valid ? (image * g.height + row) * g.width + first_column : NONE;
      shared_store(line_at(line), Line{pixel, owned ? pixel : NONE});
    }
    for (int turn = thread; turn < g.turns; turn += threads) {
      Bytes16 shifts{};
      for (int k = 0; k < RES2NET_CHAIN_UNROLL; k++) {
        const int slice = turn * RES2NET_CHAIN_UNROLL + k;
        const int tap = depths_divide(slice), depth = slice - tap * depths();
        const int shift = chunk_offset(((tap / 3 - 1) * g.pitch + tap % 3 - 1) * g.dilation, 2 * depth);
        shifts.word[k] = DEPTHS == PLANES ? shift / 16 : shift;
      }
      shared_store(turn_at(turn), shifts);
    }
  }
  // Rows of an image that lie in these lines of the strip, which are those of its part, or of the first of whole images.
  struct Rows {
    int begin, end;
  };
  DEVICE Rows rows_in(int first_line, int end_line) const {
    const int first = first_row + first_line, end = first_row + end_line, begin = first > 0 ? first : 0;
    const int bounded = end < g.height ? end : g.height;
    return {begin, bounded > begin ? bounded : begin};
  }
  DEVICE int images_here() const {  // with a pixel in the strip
    const int left = g.images - first_image;
    return left < g.tile_images ? left : g.tile_images;
  }
  // The first column of the strip that lies in the image.
  DEVICE int left_column() const { return first_column < 0 ? -first_column : 0; }
  // Whether a column of the strip lies in the image.
  DEVICE bool in_image(int column) const { return unsigned(first_column + column) < unsigned(g.width); }
  DEVICE bool is_pixel(int line, int column) const {
    return in_image(column) && shared_load<Line>(line_at(line)).pixel != NONE;
  }

  // The slot in the middle of the window of an output position.
  DEVICE int slot_of_position(int step, int position) const {
    if (g.stride == 1) return slot_of(g.work_line(step), position);
    const int line = g.by_work_pitch.divide(position), column = position - line * g.work_pitch;
    return slot_of(g.work_line(step) + line * g.stride, g.work_column + column * g.stride);
  }
};

}  // namespace res2net_fused::cuda
