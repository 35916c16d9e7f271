#include "chain_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CHAIN_LAUNCHER(d3c6t4, 3, 6, 4, 8)
}
