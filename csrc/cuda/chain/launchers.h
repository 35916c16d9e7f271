// The launchers of all instances, in plain C: they return 0 or a cudaError_t. type: an enum DataType that the instance runs.
// overlaps: whether the kernel may begin while the one before it in the stream ends, where code and driver can do so.
#pragma once
#include "cuda/plan/arguments.h"
#include "cuda/plan/instances.h"

#define RES2NET_JOINED(left, right) left##right
#define RES2NET_LAUNCHER(instance) RES2NET_JOINED(res2net_fused_launch_, instance)

#define RES2NET_DECLARE_LAUNCHER(name, ...) \
  extern "C" int RES2NET_LAUNCHER(name)(    \
      const res2net_fused::cuda::ChainArguments* arguments, int type, bool overlaps, void* stream);
RES2NET_STRIP_INSTANCES(RES2NET_DECLARE_LAUNCHER)
RES2NET_CLUSTER_INSTANCES(RES2NET_DECLARE_LAUNCHER)
RES2NET_WGMMA_INSTANCES(RES2NET_DECLARE_LAUNCHER)  // defined where sm_90a is built for
#undef RES2NET_DECLARE_LAUNCHER
