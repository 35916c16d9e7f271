// Chooses the launch of the chain kernel for a call and a device's limits. Plain C++: runs where there is no GPU and no torch.
#pragma once
#include <string>
#include <vector>

#include "cuda/plan/cluster_geometry.h"
#include "cuda/plan/instances.h"

namespace res2net_fused::cuda {

// The same fields as DeviceLimits in res2net_fused/_native/library.py; sizes in bytes.
struct DeviceLimits {
  int major, minor, multiprocessors, shared_per_block, shared_per_multiprocessor, registers_per_multiprocessor, l2_bytes;
  int wgmma;  // 1 where the device has wgmma and the library code for it
  int code;   // version of the PTX that the library's code for it was compiled from, such as 90; 0: there is none
};

struct LaunchPlan {
  int instance = 0;
  ChainTile tile{};
  int ctas = 0, threads = 0, shared_bytes = 0;
  int ctas_per_multiprocessor = 0;
  int packed_columns = 0;
  int64_t dram_bytes = 0;    // each byte of x, weights and out once
  int64_t loaded_bytes = 0;  // by all CTAs: with halos, and weights for each CTA
  int64_t flops = 0;         // of the convolutions themselves
  int64_t mma_flops = 0;     // with halos and padding to the shapes of mma
  double microseconds = 0;   // predicted
  // What the busiest multiprocessor needs at the least, and memory, in microseconds, without start and launch.
  struct {
    double issue = 0, tensor = 0, shared = 0, memory = 0;
  } bounds{};
};

// What a search for launches has met.
class Found {
 public:
  explicit Found(bool all) : all_(all) {}
  void offer(const LaunchPlan& plan);
  bool any() const { return best.microseconds < NONE; }

  static constexpr double NONE = 1e30;
  LaunchPlan best{.microseconds = NONE};  // with the shortest predicted time
  std::vector<LaunchPlan> cuts;           // if `all`, the best of each instance and each way to cut the images

 private:
  bool all_;
};

// The strip kernel's instance that runs this width, or -1. Weights are padded for it, so it depends on width and type alone.
int instance_for(int channels, DataType type);
// Output channels in units of 8, padded to whole warps of the instance.
int packed_columns_for(int channels, DataType type);
// Whether this instance runs this problem, with weights of that padding.
bool runs_on(const ChainProblem& problem, int index);

// What a launch of this instance is told of this tile.
inline ChainGeometry geometry_of(const ChainProblem& problem, const ChainTile& tile, int instance) {
  const Instance& row = INSTANCE_TABLE[instance];
  if (!row.cluster) return make_geometry(problem, tile, row.depths, row.columns);
  return make_cluster_geometry(problem, tile, row.columns, row.tiles, packed_columns_for(problem.channels, problem.type));
}

// The launch with the shortest predicted time, of the strip kernel alone unless `clusters`; with a `rank` that of the other cut
// with so many faster ones, or the slowest. `reason` says why there is none; it is empty otherwise.
LaunchPlan plan_launch(
    const ChainProblem& problem, bool passes, const DeviceLimits& device, std::string& reason, bool clusters = true,
    int rank = 0);

// Offers the launches of the cluster kernel.
void plan_clusters(const ChainProblem& problem, bool passes, const DeviceLimits& device, Found& found);

// What the per-step Triton path is predicted to take.
double predict_steps(const ChainProblem& problem, bool passes, const DeviceLimits& device);

// plan_launch in numbers, in the order of `Plan` in res2net_fused/backends/cuda/plan.py; empty where there is no plan.
std::vector<int64_t> plan_as_numbers(
    const ChainProblem& problem, bool passes, const DeviceLimits& device, std::string& reason, bool clusters = true,
    int rank = 0);

}  // namespace res2net_fused::cuda
