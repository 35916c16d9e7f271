// One instance of the cluster kernel with its launcher, for both half types: what every instance_cluster_*.cu consists of.
#pragma once
#include "cluster_kernel.cuh"
#include "launch.cuh"

namespace res2net_fused::chain {

template <class Element, int COLUMNS, int TILES, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1) cluster_kernel(const __grid_constant__ ChainArguments arguments) {
  ClusterCta<Element, COLUMNS, TILES>(arguments).run();
}

// Parts that send nothing are an ordinary grid, on any device.
template <int COLUMNS, int TILES, int WARPS>
cudaError_t launch_cluster(const ChainArguments& arguments, int type, void* stream) {
  const ChainGeometry& g = arguments.geometry;
  const int cluster = g.sends ? g.row_parts * g.channel_parts : 1;
  if (type == FP16) return launch<cluster_kernel<fp16, COLUMNS, TILES, WARPS>, WARPS>(arguments, stream, cluster);
  if (type == BF16) return launch<cluster_kernel<bf16, COLUMNS, TILES, WARPS>, WARPS>(arguments, stream, cluster);
  return cudaErrorInvalidValue;
}

#define RES2NET_CLUSTER_LAUNCHER(name, COLUMNS, TILES, WARPS)                                            \
  extern "C" int res2net_fused_launch_##name(const ChainArguments* arguments, int type, void* stream) {  \
    return launch_cluster<COLUMNS, TILES, WARPS>(*arguments, type, stream);                               \
  }

}  // namespace res2net_fused::chain
