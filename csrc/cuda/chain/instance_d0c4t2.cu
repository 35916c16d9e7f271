#include "chain_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CHAIN_LAUNCHER(d0c4t2, 0, 4, 2, 16)
}
