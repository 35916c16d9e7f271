#include "wgmma_instance.cuh"

namespace res2net_fused::chain {
RES2NET_WGMMA_LAUNCHER(wgmma_c6t2, 6, 2, 16)
}
