#include "cluster_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CLUSTER_LAUNCHER(cluster_c2t2, 2, 2, 16)
}
