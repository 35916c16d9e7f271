// One instance of the wgmma kernel with its launcher, for both half types: what every instance_wgmma_*.cu consists of.
// They are compiled for sm_90a alone.
#pragma once
#include "launch.cuh"
#include "wgmma_kernel.cuh"

namespace res2net_fused::chain {

template <class Element, int COLUMNS, int TILES, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1) wgmma_kernel(const __grid_constant__ ChainArguments arguments) {
  WgmmaCta<Element, COLUMNS, TILES>(arguments, block_index()).run();
}

template <int COLUMNS, int TILES, int WARPS>
cudaError_t launch_wgmma(const ChainArguments& arguments, int type, void* stream) {
  if (type == FP16) return launch<wgmma_kernel<fp16, COLUMNS, TILES, WARPS>, WARPS>(arguments, stream);
  if (type == BF16) return launch<wgmma_kernel<bf16, COLUMNS, TILES, WARPS>, WARPS>(arguments, stream);
  return cudaErrorInvalidValue;
}

#define RES2NET_WGMMA_LAUNCHER(name, COLUMNS, TILES, WARPS)                                              \
  extern "C" int res2net_fused_launch_##name(const ChainArguments* arguments, int type, void* stream) {  \
    return launch_wgmma<COLUMNS, TILES, WARPS>(*arguments, type, stream);                                 \
  }

}  // namespace res2net_fused::chain
