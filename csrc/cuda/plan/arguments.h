// What a launch of the chain kernel is told: pointers, strides and settings. Filled by the launcher and by the emulator.
#pragma once
#include "cuda/plan/geometry.h"

namespace res2net_fused::cuda {

enum Pool : int { NO_POOL = 0, AVERAGE = 1, AVERAGE_WITHOUT_PADDING = 2 };

// Slots of s channel groups in a channels-last tensor, counted in elements.
struct Slots {
  int pixel;  // from one pixel to the next
  int slot;   // from one group to the next
};

struct ChainArguments {
  const void* x;       // (N, height, width, x_slots.pixel), group g at channel g * x_slots.slot
  const void* weight;  // (steps, 9 * depths, packed_columns, 2, 8, 16 bytes): see `pack` in backends/cuda/packing.py
  const float* bias;   // (steps, packed_columns * 8)
  void* out;           // (N, out_height, out_width, out_slots.pixel); shares no element with x
  Slots x_slots, out_slots;
  int fill_channels;   // of a slot of out that are written; those beyond the group become zero, if they are zero in x
  int first_group;     // what the first convolution reads and writes
  int passed_group;    // the group without a convolution, or -1
  bool add_passed;     // whether u_0 = x_0 + the passed group
  bool weights_stand;  // whether the kernel before this one in the stream writes neither weights nor biases
  int pool;            // on the passed group
  float lower, upper;  // y is clamped to this range: 0 and infinity for ReLU
  int load_bytes;      // of one copy into shared memory: 16, 8 or 4
  int load_width;      // bytes of a group that are copied: its channels, and zeros behind them where there are any
  int copy_bytes;      // of one move of the passed group
  bool whole_pairs;    // whether two channels of y are stored at once, in every pair
  FastDivisor by_load_pieces, by_part_pieces, by_copy_pieces;  // of a whole group, of a CTA's part of its channels
  ChainGeometry geometry;
};

// Whether the offsets within the images of one CTA, in bytes, are ints.
inline bool offsets_fit(const ChainArguments& a, DataType type) {
  const ChainGeometry& g = a.geometry;
  const auto fit = [&](int height, int width, const Slots& slots) {
    const int64_t most = INT32_MAX / (int64_t(g.tile_images) * bytes_of(type));
    return int64_t(height) * width <= most / slots.pixel;
  };
  return fit(g.height, g.width, a.x_slots) && fit(g.out_height, g.out_width, a.out_slots);
}

// The widest move of at most 16 bytes that keeps to these alignments; 4 is what the plan guarantees.
inline int widest_move(uint64_t alignments) { return alignments % 16 == 0 ? 16 : alignments % 8 == 0 ? 8 : 4; }

// Chooses how wide memory is accessed, once pointers, strides and geometry are set.
inline void set_moves(ChainArguments& a, DataType type) {
  const int bytes = bytes_of(type);
  const auto alignments = [&](const void* data, const Slots& slots) {
    return reinterpret_cast<uint64_t>(data) | uint64_t(bytes) * slots.pixel | uint64_t(bytes) * slots.slot;
  };
  const uint64_t x = alignments(a.x, a.x_slots), out = alignments(a.out, a.out_slots);
  const int group_bytes = bytes * a.geometry.channels, filled_bytes = bytes * a.fill_channels;
  // What is written as zeros lies in x as zeros.
  a.load_width = a.fill_channels > a.geometry.channels ? divide_up(group_bytes, 16) * 16 : group_bytes;
  if (a.load_width > filled_bytes) a.load_width = filled_bytes;
  a.load_bytes = widest_move(x | uint64_t(a.load_width));
  a.copy_bytes = a.pool == NO_POOL ? widest_move(x | out | uint64_t(filled_bytes)) : 4;
  a.whole_pairs = widest_move(out | uint64_t(filled_bytes)) >= 2 * bytes;
  a.by_load_pieces = FastDivisor(a.load_width / a.load_bytes);
  a.by_part_pieces = FastDivisor(8 * bytes * a.geometry.part_columns / a.load_bytes);
  a.by_copy_pieces = FastDivisor(filled_bytes / a.copy_bytes);
}

}  // namespace res2net_fused::cuda
