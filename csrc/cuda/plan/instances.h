// The compiled forms of the chain kernel, stated once for the plan, the CUDA build and the emulator.
#pragma once
#include "cuda/plan/data_type.h"

// X(name, DEPTHS, COLUMNS, TILES, WARPS)
//   DEPTHS   input channels of a group in units of 16, the K of one mma (8 in TF32); 0: known at run time only
//   COLUMNS  output channels of a warp in units of 8, the N of one mma
//   TILES    pixels of a warp in units of 16, the M of one mma
//   WARPS    most warps of a CTA: bounds the registers of a thread to 65536 / (32 * WARPS)
// The widths they are meant for: 14 and 16 | 26, 28 and 32 | 48 | 52 and 56 | 96, 192, 384 | 104, 112, 208 | any other.
#define RES2NET_STRIP_INSTANCES(X) \
  X(d1c2t4, 1, 2, 4, 16)           \
  X(d2c4t4, 2, 4, 4, 12)           \
  X(d3c6t4, 3, 6, 4, 8)            \
  X(d4c7t4, 4, 7, 4, 8)            \
  X(d0c6t2, 0, 6, 2, 16)           \
  X(d0c7t2, 0, 7, 2, 12)           \
  X(d0c4t2, 0, 4, 2, 16)

// The same of the cluster kernel, for all widths in half precision: X(name, COLUMNS, TILES, WARPS)
#define RES2NET_CLUSTER_INSTANCES(X) \
  X(cluster_c2t2, 2, 2, 16)          \
  X(cluster_c4t2, 4, 2, 16)          \
  X(cluster_c7t2, 7, 2, 12)

// The same with Hopper's wgmma, for half precision and stride 1: X(name, COLUMNS, TILES, WARPS)
//   COLUMNS  output channels of a warpgroup in units of 8
//   TILES    pixels of a warpgroup in units of 64
// A width runs on those whose COLUMNS divide its packed ones, which the instances above decide.
#define RES2NET_WGMMA_INSTANCES(X) \
  X(wgmma_c6t2, 6, 2, 16)          \
  X(wgmma_c7t2, 7, 2, 16)          \
  X(wgmma_c12t2, 12, 2, 12)        \
  X(wgmma_c14t2, 14, 2, 8)

namespace res2net_fused::cuda {

// DEPTHS of the wgmma kernel: known at run time, and the channels of a slot lie in planes of 8 each.
constexpr int PLANES = -1;

// Fixed depths are for half precision; TF32 has the instances whose depths are known at run time.
constexpr bool instance_runs(int depths, DataType type) { return type != TF32 || depths == 0; }

struct Instance {
  const char* name;
  int depths, columns, tiles, warps;
  bool cluster;  // of the cluster kernel
  constexpr bool runs(DataType type) const { return instance_runs(depths, type) && !(cluster && type == TF32); }
  constexpr bool is_wgmma() const { return depths == PLANES; }
  constexpr int warps_together() const { return is_wgmma() ? 4 : 1; }  // that compute one tile of 16 positions each at once
};

#define RES2NET_STRIP_ROW(name, DEPTHS, COLUMNS, TILES, WARPS) {#name, DEPTHS, COLUMNS, TILES, WARPS, false},
#define RES2NET_CLUSTER_ROW(name, COLUMNS, TILES, WARPS) {#name, 0, COLUMNS, TILES, WARPS, true},
#define RES2NET_WGMMA_ROW(name, COLUMNS, TILES, WARPS) {#name, PLANES, COLUMNS, TILES, WARPS, false},
#define RES2NET_NAME(name, ...) name,
#define RES2NET_COUNT(...) +1
// The strip kernel's instances, then the cluster kernel's, then the wgmma kernel's.
// clang-format off
inline constexpr Instance INSTANCE_TABLE[] = {
    RES2NET_STRIP_INSTANCES(RES2NET_STRIP_ROW)
    RES2NET_CLUSTER_INSTANCES(RES2NET_CLUSTER_ROW)
    RES2NET_WGMMA_INSTANCES(RES2NET_WGMMA_ROW)
};
// clang-format on
enum class InstanceIndex : int {
  RES2NET_STRIP_INSTANCES(RES2NET_NAME) RES2NET_CLUSTER_INSTANCES(RES2NET_NAME) RES2NET_WGMMA_INSTANCES(RES2NET_NAME)
};
inline constexpr int STRIP_INSTANCES = 0 RES2NET_STRIP_INSTANCES(RES2NET_COUNT);
inline constexpr int INSTANCES_COUNT = sizeof(INSTANCE_TABLE) / sizeof(Instance);
inline constexpr int WGMMA_INSTANCES = INSTANCES_COUNT - (0 RES2NET_WGMMA_INSTANCES(RES2NET_COUNT));  // from there on
#undef RES2NET_STRIP_ROW
#undef RES2NET_CLUSTER_ROW
#undef RES2NET_WGMMA_ROW
#undef RES2NET_NAME
#undef RES2NET_COUNT

}  // namespace res2net_fused::cuda

// K slices (one tap, 16 or 8 input channels) that the inner loop multiplies between two tests of its end. It divides the 9 *
// depths slices of every convolution, so there is no remainder, and the number of tensor-core instructions is known.
#define RES2NET_CHAIN_UNROLL 3
