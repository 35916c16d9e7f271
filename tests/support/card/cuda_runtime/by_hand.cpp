// In the stand-in CUDA library beside its operators: a launcher called with a geometry of few numbers, for its tests.
// The kernel's body would make nothing of such arguments.
#include <cstring>

#include "cuda/chain/launchers.h"

// grid: blocks, which the parts of a cluster divide. 0, a cudaError_t, or -1 where there is no such instance.
extern "C" int stand_in_launch_by_hand(
    const char* name, int type, int grid, int warps, int shared_bytes, int parts, bool overlaps, void* stream) {
  res2net_fused::cuda::ChainArguments a{};
  a.geometry.row_blocks = grid / parts, a.geometry.column_blocks = a.geometry.image_blocks = 1;
  a.geometry.row_parts = 1, a.geometry.channel_parts = parts, a.geometry.sends = parts > 1;
  a.geometry.warps_m = warps, a.geometry.warps_n = a.geometry.warps_k = 1;
  a.geometry.shared_bytes = shared_bytes;
#define LAUNCH(instance, ...) \
  if (std::strcmp(name, #instance) == 0) return RES2NET_LAUNCHER(instance)(&a, type, overlaps, stream);
  RES2NET_STRIP_INSTANCES(LAUNCH)
  RES2NET_CLUSTER_INSTANCES(LAUNCH)
  RES2NET_WGMMA_INSTANCES(LAUNCH)
#undef LAUNCH
  return -1;
}
