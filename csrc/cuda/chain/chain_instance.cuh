// One instance of the chain kernel with its launcher, for every type it runs: what every instance_*.cu consists of.
#pragma once
#include "strip_kernel.cuh"
#include "launch.cuh"

namespace res2net_fused::chain {

template <class Element, int DEPTHS, int COLUMNS, int TILES, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1) chain_kernel(const __grid_constant__ ChainArguments arguments) {
  ChainCta<Element, DEPTHS, COLUMNS, TILES>(arguments, block_index()).run();
}

template <int DEPTHS, int COLUMNS, int TILES, int WARPS>
cudaError_t launch_chain(const ChainArguments& arguments, int type, void* stream) {
  if (type == FP16) return launch<chain_kernel<fp16, DEPTHS, COLUMNS, TILES, WARPS>, WARPS>(arguments, stream);
  if (type == BF16) return launch<chain_kernel<bf16, DEPTHS, COLUMNS, TILES, WARPS>, WARPS>(arguments, stream);
  if constexpr (instance_runs(DEPTHS, TF32)) {
    if (type == TF32) return launch<chain_kernel<tf32, DEPTHS, COLUMNS, TILES, WARPS>, WARPS>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

#define RES2NET_CHAIN_LAUNCHER(name, DEPTHS, COLUMNS, TILES, WARPS)                                      \
  extern "C" int res2net_fused_launch_##name(const ChainArguments* arguments, int type, void* stream) {  \
    return launch_chain<DEPTHS, COLUMNS, TILES, WARPS>(*arguments, type, stream);                         \
  }

}  // namespace res2net_fused::chain
