// One instance of the chain kernel with its launcher, for every type it runs: what every instance_*.cu consists of.
#pragma once
#include <cuda_runtime.h>

#include "chain_kernel.cuh"
#include "chain_launch.h"

namespace res2net_fused::chain {

template <class Element, int DEPTHS, int COLUMNS, int TILES, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1) chain_kernel(const __grid_constant__ ChainArguments arguments) {
  ChainCta<Element, DEPTHS, COLUMNS, TILES>(arguments, block_index()).run();
}

template <class Element, int DEPTHS, int COLUMNS, int TILES, int WARPS>
cudaError_t launch(const ChainArguments& arguments, cudaStream_t stream) {
  const auto kernel = chain_kernel<Element, DEPTHS, COLUMNS, TILES, WARPS>;
  const ChainGeometry& g = arguments.geometry;
  if (g.threads() > 32 * WARPS) return cudaErrorInvalidConfiguration;
  // Cheap, and a matter of the current context: not worth remembering per device.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, g.shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<g.ctas(), g.threads(), g.shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <int DEPTHS, int COLUMNS, int TILES, int WARPS>
cudaError_t launch_type(const ChainArguments& arguments, int type, cudaStream_t stream) {
  if (type == FP16) return launch<fp16, DEPTHS, COLUMNS, TILES, WARPS>(arguments, stream);
  if (type == BF16) return launch<bf16, DEPTHS, COLUMNS, TILES, WARPS>(arguments, stream);
  if constexpr (instance_runs(DEPTHS, TF32)) {
    if (type == TF32) return launch<tf32, DEPTHS, COLUMNS, TILES, WARPS>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

#define RES2NET_CHAIN_LAUNCHER(name, DEPTHS, COLUMNS, TILES, WARPS)                                               \
  extern "C" int res2net_fused_launch_##name(const ChainArguments* arguments, int type, void* stream) {            \
    return launch_type<DEPTHS, COLUMNS, TILES, WARPS>(*arguments, type, static_cast<cudaStream_t>(stream));        \
  }

}  // namespace res2net_fused::chain
