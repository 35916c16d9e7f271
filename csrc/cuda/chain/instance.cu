// One instance of the kernel with its launcher: compiled once for each row of cuda/plan/instances.h, RES2NET_FUSED_INSTANCE
// being the row's name.
#include "cuda/chain/launch.cuh"
#include "cuda/chain/launchers.h"

extern "C" int RES2NET_LAUNCHER(RES2NET_FUSED_INSTANCE)(
    const res2net_fused::cuda::ChainArguments* arguments, int type, bool overlaps, void* stream) {
  using namespace res2net_fused::cuda;
  return launch_instance<int(InstanceIndex::RES2NET_FUSED_INSTANCE)>(*arguments, type, overlaps, stream);
}
