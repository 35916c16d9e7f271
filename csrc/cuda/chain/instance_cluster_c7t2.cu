#include "cluster_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CLUSTER_LAUNCHER(cluster_c7t2, 7, 2, 12)
}
