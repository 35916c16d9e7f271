#include "wgmma_instance.cuh"

namespace res2net_fused::chain {
RES2NET_WGMMA_LAUNCHER(wgmma_c12t2, 12, 2, 12)
}
