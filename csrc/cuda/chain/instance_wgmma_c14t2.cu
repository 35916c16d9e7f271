#include "wgmma_instance.cuh"

namespace res2net_fused::chain {
RES2NET_WGMMA_LAUNCHER(wgmma_c14t2, 14, 2, 8)
}
