#include "chain_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CHAIN_LAUNCHER(d0c6t2, 0, 6, 2, 16)
}
