// One instance of the cluster kernel with its launcher, for both half types: what every instance_cluster_*.cu consists of.
#pragma once
#include <cuda_runtime.h>

#include "chain_launch.h"
#include "cluster_kernel.cuh"

namespace res2net_fused::chain {

template <class Element, int COLUMNS, int TILES, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1) cluster_kernel(const __grid_constant__ ChainArguments arguments) {
  ClusterCta<Element, COLUMNS, TILES>(arguments).run();
}

template <class Element, int COLUMNS, int TILES, int WARPS>
cudaError_t launch_cluster(const ChainArguments& arguments, cudaStream_t stream) {
  const auto kernel = cluster_kernel<Element, COLUMNS, TILES, WARPS>;
  const ChainGeometry& g = arguments.geometry;
  if (g.threads() > 32 * WARPS) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, g.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = g.row_parts * g.channel_parts;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(g.ctas());
  config.blockDim = dim3(g.threads());
  config.dynamicSmemBytes = g.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = g.sends ? 1 : 0;  // parts that send nothing are an ordinary grid, on any device
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

#define RES2NET_CLUSTER_LAUNCHER(name, COLUMNS, TILES, WARPS)                                                     \
  extern "C" int res2net_fused_launch_##name(const ChainArguments* arguments, int type, void* stream) {           \
    const auto launch = type == BF16 ? launch_cluster<bf16, COLUMNS, TILES, WARPS>                                \
                                     : launch_cluster<fp16, COLUMNS, TILES, WARPS>;                               \
    return type == TF32 ? cudaErrorInvalidValue : launch(*arguments, static_cast<cudaStream_t>(stream));          \
  }

}  // namespace res2net_fused::chain
