// Which of the three kernels an instance is, a row of cuda/plan/instances.h: for the launchers and for the emulator.
#pragma once
#include <type_traits>

#include "cuda/chain/cluster_kernel.cuh"
#include "cuda/chain/strip_kernel.cuh"
#include "cuda/chain/wgmma_kernel.cuh"

namespace res2net_fused::cuda {

template <int INDEX, class Element>
struct CtaChoice {
  static constexpr Instance ROW = INSTANCE_TABLE[INDEX];
  // Only the one that is taken is ever compiled.
  using Strip = StripCta<Element, ROW.depths, ROW.columns, ROW.tiles>;
  using Cluster = ClusterCta<Element, ROW.columns, ROW.tiles>;
  using Wgmma = WgmmaCta<Element, ROW.columns, ROW.tiles>;
  using type = std::conditional_t<ROW.cluster, Cluster, std::conditional_t<ROW.is_wgmma(), Wgmma, Strip>>;
};
template <int INDEX, class Element>
using CtaOf = typename CtaChoice<INDEX, Element>::type;

}  // namespace res2net_fused::cuda
