#include "wgmma_instance.cuh"

namespace res2net_fused::chain {
RES2NET_WGMMA_LAUNCHER(wgmma_c7t2, 7, 2, 16)
}
