// How a CTA of the chain kernel cuts its part out of the images and lays it out in shared memory. Plain C++, shared by the
// plan, the launcher, the kernel and the emulator.
//
// A CTA owns `rows` x `columns` output pixels of one image, or all pixels of `images` whole images. Of a group's channels it
// keeps the owned pixels and a halo in a "strip", one long line of pixel slots:
//
//   * A line of the strip is one row of an image: `stored` pixels, then `dilation` slots that stay zero. These serve as right padding
//     of that line and as left padding of the next, so every tap of the convolution is a constant shift in slots.
//   * Whole images lie below each other with `dilation` zero lines between them: `period` lines from one to the next.
//   * Row strips instead carry a halo of real rows. In a chain that adds, each step needs one row less on either side: `shrink`.
#pragma once
#include <cstdint>

#include "cuda/plan/data_type.h"
#include "cuda/plan/instances.h"

#if defined(__CUDACC__)
#define RES2NET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RES2NET_HOST_DEVICE inline
#endif

namespace res2net_fused::cuda {

// Division by a number known at launch: exact while numerator * divisor < 2^31. Two instructions.
struct FastDivisor {
  uint32_t divisor = 1, magic = 1u << 31;

  FastDivisor() = default;
  RES2NET_HOST_DEVICE explicit FastDivisor(int value)
      : divisor(uint32_t(value)), magic((1u << 31) / divisor + ((1u << 31) % divisor != 0)) {}

  RES2NET_HOST_DEVICE int divide(int numerator) const { return divide(numerator, magic); }
  static RES2NET_HOST_DEVICE int divide(int numerator, uint32_t magic) { return divide_half(numerator << 1, magic); }
  // Half of an even number: one instruction, for loops that count in twos.
  static RES2NET_HOST_DEVICE int divide_half(int twice, uint32_t magic) {
#if defined(__CUDA_ARCH__)
    return int(__umulhi(uint32_t(twice), magic));
#else
    return int(uint64_t(uint32_t(twice)) * magic >> 32);
#endif
  }
};

RES2NET_HOST_DEVICE constexpr int divide_up(int value, int by) { return (value + by - 1) / by; }

// The convolutions to run, without the data.
struct ChainProblem {
  int64_t images = 1;
  int height = 1, width = 1;  // of x
  int channels = 8;           // of a group
  int steps = 1;              // convolutions
  int stride = 1, dilation = 1;
  bool adds = true;  // u_i = x_i + y_{i-1}; stride is 1 then
  DataType type = BF16;
  int slot = 0;  // channels from one group of a pixel to the next; 0: dense groups

  int slot_bytes() const { return (slot > 0 ? slot : channels) * bytes_of(type); }
  int out_height() const { return (height - 1) / stride + 1; }
  int out_width() const { return (width - 1) / stride + 1; }
  int depths() const { return divide_up(channels, depth_channels(type)); }
  int slices() const { return 9 * depths(); }  // K slices of one convolution
};

// How a launch cuts the problem.
struct ChainTile {
  int rows = 1, columns = 1;     // output pixels of a CTA
  int images = 1;                // of a CTA; more than 1 only where it owns whole images
  bool whole = false;            // rows == out_height, columns == out_width, no halo
  int warps_m = 1, warps_n = 1;  // warps along the pixels and along the output channels
  int slices = 9;                // K slices that one stage of the weight pipeline holds
  int stages = 2;
  int row_parts = 1, channel_parts = 1;  // CTAs that share their results: see cluster_geometry.h; 1 x 1 for the strip kernel
  int warps_k = 1;                       // warps that share out the K slices of the same output; 1 for the strip kernel
};

// Bytes between two slots. Eight neighbouring slots never collide in the banks when ldmatrix reads 16 bytes of each: swizzled
// if a slot has 2, 4 or 8 chunks of 16 bytes, else an odd number of them. instance_depths: as in the instance table.
RES2NET_HOST_DEVICE constexpr bool swizzled(int instance_depths) {
  return instance_depths == 1 || instance_depths == 2 || instance_depths == 4;
}
RES2NET_HOST_DEVICE constexpr int slot_bytes_of(int instance_depths, int depths) {
  return 16 * (swizzled(instance_depths) ? 2 * depths : 2 * depths | 1);
}

// Units of 8 channels that every group of an instance fills: of the last depth there may be one channel.
RES2NET_HOST_DEVICE constexpr int sure_columns(int instance_depths) {
  return instance_depths > 0 ? 2 * (instance_depths - 1) : 0;
}

constexpr int MAX_STAGES = 4;  // of the weights
// Bytes in front of the tables: three structs of 16; a barrier for each stage, at which its copy arrives; then two at which u does
// that other CTAs of a cluster send, or one for each stage at which warps say that they have read it.
constexpr int TABLE_HEAD = 48 + 8 * 2 * MAX_STAGES;

constexpr int PLANE_ROWS = 64;  // slots of a product's A in wgmma's layout, PLANES

// All that follows from the problem and the tile; plain numbers, handed to the kernel by value.
struct ChainGeometry {
  int height, width, out_height, out_width;
  int channels, steps, depths, stride, dilation, adds;
  int images, tile_images;  // of the call, of a CTA
  int rows, columns;        // output pixels of a CTA
  int row_blocks, column_blocks, image_blocks;

  int lines, stored, pitch, shrink;  // shrink: lines that a step loses on either side
  int lead;          // line of the first owned row: behind the halo, or behind the zero lines above a whole image
  int halo_columns;  // stored left and right of the owned ones; 0 where whole lines are owned
  int owned_column, owned_lines, owned_columns;  // of the strip, for stride 1; of the output otherwise
  int work_pitch, work_column;  // of the raster in which output positions are numbered, and its first column in the strip

  int warps_m, warps_n;
  int chunk_slices, chunks, stages;  // of the weights: slices of a chunk, chunks of a step, chunks in flight or in use
  int packed_columns;                // output channels in units of 8, padded to whole warps
  int part_columns;                  // those that a CTA computes
  int strips, slot_bytes, plane_bytes, strip_bytes, stage_bytes, tables_bytes, shared_bytes;
  int table_lines, turns;  // in the tables behind the weights: lines, and turns of the main loop

  FastDivisor by_period, by_stored, by_depths, by_work_pitch;
  int period;

  // The cluster kernel's alone: see cluster_geometry.h.
  int row_parts, channel_parts, warps_k, sums_bytes;
  int sends;  // whether CTAs send each other what they computed
  FastDivisor by_part_columns;

  // Output positions are numbered line by line from work_line(step) on; for stride 1 they include the lines' zero slots.
  RES2NET_HOST_DEVICE int work_line(int step) const { return dilation + step * shrink; }
  // The first owned line of that raster, and its first owned column.
  RES2NET_HOST_DEVICE int first_owned_line(int step) const { return stride > 1 ? 0 : lead - work_line(step); }
  RES2NET_HOST_DEVICE int first_owned_column() const { return owned_column - work_column; }
  RES2NET_HOST_DEVICE int positions(int step) const {
    if (stride > 1) return rows * columns;
    return (lines - 2 * work_line(step)) * pitch - dilation;
  }
  RES2NET_HOST_DEVICE int passes(int step, int tiles) const { return divide_up(positions(step), 16 * tiles * warps_m); }
  int ctas() const { return row_blocks * column_blocks * image_blocks * channel_parts; }
  int threads() const { return 32 * warps_m * warps_n * warps_k; }
};

// Whether ctas() is a number of blocks that a launch may have.
inline bool grid_fits(const ChainGeometry& g) {
  return int64_t(g.row_blocks) * g.column_blocks * g.channel_parts <= INT32_MAX / g.image_blocks;
}

inline ChainGeometry make_geometry(
    const ChainProblem& problem, const ChainTile& tile, int instance_depths, int instance_columns) {
  ChainGeometry g{};
  g.height = problem.height, g.width = problem.width, g.out_height = problem.out_height(), g.out_width = problem.out_width();
  g.channels = problem.channels, g.steps = problem.steps, g.depths = problem.depths();
  g.stride = problem.stride, g.dilation = problem.dilation, g.adds = problem.adds;
  g.images = int(problem.images), g.tile_images = tile.images;
  g.rows = tile.rows, g.columns = tile.columns;
  g.row_blocks = divide_up(g.out_height, g.rows);
  g.column_blocks = divide_up(g.out_width, g.columns);
  g.image_blocks = divide_up(g.images, g.tile_images);

  const bool recomputes = problem.adds && tile.row_parts == 1;  // halo rows; else neighbours send them
  const int reach = problem.dilation * (recomputes ? problem.steps : 1);
  g.lead = tile.whole ? problem.dilation : reach;
  g.halo_columns = g.column_blocks == 1 ? 0 : reach;
  g.shrink = tile.whole || !recomputes ? 0 : problem.dilation;
  const int input_rows = (g.rows - 1) * problem.stride + 1;
  const int input_columns = (g.columns - 1) * problem.stride + 1;
  g.lines = tile.whole ? tile.images * (problem.height + problem.dilation) + problem.dilation : input_rows + 2 * reach;
  g.period = tile.whole ? problem.height + problem.dilation : g.lines + 1;  // a strip and the line below it are of one image
  g.stored = g.column_blocks == 1 ? problem.width : input_columns + 2 * g.halo_columns;
  g.pitch = g.stored + problem.dilation;
  g.owned_column = g.halo_columns;
  g.owned_lines = tile.whole && problem.stride == 1 ? g.lines - g.lead : g.rows;
  g.owned_columns = g.column_blocks == 1 ? g.out_width : g.columns;
  g.work_pitch = problem.stride > 1 ? g.columns : g.pitch;
  g.work_column = problem.stride > 1 ? g.halo_columns : 0;

  g.warps_m = tile.warps_m, g.warps_n = tile.warps_n;
  g.chunk_slices = tile.slices, g.chunks = problem.slices() / tile.slices, g.stages = tile.stages;
  g.packed_columns = g.part_columns = tile.warps_n * instance_columns;
  g.strips = problem.steps > 1 ? 2 : 1;
  g.slot_bytes = slot_bytes_of(instance_depths, g.depths);
  // dilation slots before the first line, for its left padding, and as many behind the last
  const int slots = g.lines * g.pitch + 2 * problem.dilation;
  // An odd number of slots keeps the 16-byte stores of a pixel's planes apart in the banks.
  g.plane_bytes = (slots | 1) * 16;
  g.strip_bytes = instance_depths == PLANES ? 2 * g.depths * g.plane_bytes + (PLANE_ROWS - 1) * 16 : slots * g.slot_bytes;
  g.stage_bytes = g.chunk_slices * g.part_columns * 256;
  g.row_parts = tile.row_parts, g.channel_parts = tile.channel_parts, g.warps_k = tile.warps_k;
  // The strip's lines, one above and one below, and with a stride those of the output.
  g.table_lines = g.lines + 2 + (problem.stride > 1 ? g.rows : 0);
  g.turns = problem.slices() / RES2NET_CHAIN_UNROLL;
  g.tables_bytes = TABLE_HEAD + 16 * (divide_up(g.table_lines, 2) + g.turns);
  g.shared_bytes = g.strips * g.strip_bytes + g.stages * g.stage_bytes + g.tables_bytes;

  g.by_period = FastDivisor(g.period), g.by_stored = FastDivisor(g.stored);
  g.by_depths = FastDivisor(g.depths), g.by_work_pitch = FastDivisor(g.work_pitch);
  return g;
}

}  // namespace res2net_fused::cuda
