#include "cluster_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CLUSTER_LAUNCHER(cluster_c4t2, 4, 2, 16)
}
