// From a call and a device's limits to the launch of the chain kernel. Plain C++: runs where there is no GPU and no torch.
#pragma once
#include <string>
#include <vector>

#include "plan/chain_geometry.h"
#include "plan/instances.h"

namespace res2net_fused::chain {

struct Instance {
  const char* name;
  int depths, columns, tiles, warps;
  constexpr bool runs(DataType type) const { return instance_runs(depths, type); }
};
#define RES2NET_INSTANCE_ROW(name, DEPTHS, COLUMNS, TILES, WARPS) {#name, DEPTHS, COLUMNS, TILES, WARPS},
inline constexpr Instance INSTANCE_TABLE[] = {RES2NET_CHAIN_INSTANCES(RES2NET_INSTANCE_ROW)};
#undef RES2NET_INSTANCE_ROW
inline constexpr int INSTANCES_COUNT = sizeof(INSTANCE_TABLE) / sizeof(Instance);

// As native.DeviceLimits in Python; sizes in bytes.
struct DeviceLimits {
  int major, minor, multiprocessors, shared_per_block, shared_per_multiprocessor, registers_per_multiprocessor, l2_bytes;
};

struct ChainPlan {
  int instance = 0;
  ChainTile tile;
  int ctas = 0, threads = 0, shared_bytes = 0;
  int ctas_per_multiprocessor = 0;
  int packed_columns = 0;
  int64_t dram_bytes = 0;    // each byte of x, weights and out once
  int64_t loaded_bytes = 0;  // by all CTAs: with halos, and weights for each CTA
  int64_t flops = 0;         // of the convolutions themselves
  int64_t mma_flops = 0;     // with halos and padding to the shapes of mma
  double microseconds = 0;   // predicted
};

// The instance that runs this width, or -1. Weights are packed for it, so it depends on the width and the type alone.
int instance_for(int channels, DataType type);
// Output channels in units of 8, padded to whole warps of the instance.
int packed_columns_for(int channels, DataType type);

// The launch with the shortest predicted time. `reason` says why there is none; it is empty otherwise.
ChainPlan plan_chain(const ChainWork& work, bool passes, const DeviceLimits& device, std::string& reason);

// What the per-step Triton path is predicted to take.
double predict_steps(const ChainWork& work, bool passes, const DeviceLimits& device);

// The same in numbers, for callers without these types.
//   problem: images, height, width, channels, steps, stride, dilation, adds, passes, type (enum DataType)
//   device: in the order of DeviceLimits
//   result: instance, rows, columns, images, whole, warps_m, warps_n, slices, stages, ctas, threads, shared bytes, CTAs per
//     multiprocessor, packed columns, DRAM bytes, loaded bytes, FLOPs, mma FLOPs, nanoseconds, nanoseconds of the per-step path;
//     empty if there is no plan, and `text` says why
std::vector<int64_t> plan_as_numbers(const int64_t* problem, const int64_t* device, char* text, int size);

}  // namespace res2net_fused::chain
