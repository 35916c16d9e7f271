#include "chain_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CHAIN_LAUNCHER(d0c7t2, 0, 7, 2, 12)
}
