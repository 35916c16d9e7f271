// One instance of the wgmma kernel with its launcher, for both half types: what every instance_wgmma_*.cu consists of.
// They are compiled for sm_90a alone.
#pragma once
#include <cuda_runtime.h>

#include "chain_launch.h"
#include "wgmma_kernel.cuh"

namespace res2net_fused::chain {

template <class Element, int COLUMNS, int TILES, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1) wgmma_kernel(const __grid_constant__ ChainArguments arguments) {
  WgmmaCta<Element, COLUMNS, TILES>(arguments, block_index()).run();
}

template <class Element, int COLUMNS, int TILES, int WARPS>
cudaError_t launch_wgmma(const ChainArguments& arguments, cudaStream_t stream) {
  const auto kernel = wgmma_kernel<Element, COLUMNS, TILES, WARPS>;
  const ChainGeometry& g = arguments.geometry;
  if (g.threads() > 32 * WARPS) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, g.shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<g.ctas(), g.threads(), g.shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

#define RES2NET_WGMMA_LAUNCHER(name, COLUMNS, TILES, WARPS)                                                                  \
  extern "C" int res2net_fused_launch_##name(const ChainArguments* arguments, int type, void* stream) {                      \
    if (type == FP16) return launch_wgmma<fp16, COLUMNS, TILES, WARPS>(*arguments, static_cast<cudaStream_t>(stream));       \
    if (type == BF16) return launch_wgmma<bf16, COLUMNS, TILES, WARPS>(*arguments, static_cast<cudaStream_t>(stream));       \
    return cudaErrorInvalidValue;                                                                                            \
  }

}  // namespace res2net_fused::chain
