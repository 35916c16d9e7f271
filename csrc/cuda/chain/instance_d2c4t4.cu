#include "chain_instance.cuh"

namespace res2net_fused::chain {
RES2NET_CHAIN_LAUNCHER(d2c4t4, 2, 4, 4, 12)
}
