// torch.ops.res2net_fused_native.build_info: what the CPU library was compiled with, as JSON.
#include <torch/csrc/stable/library.h>

#include "common/build_info.h"

namespace {

std::string build_info() { return res2net_fused::to_json(res2net_fused::build_info()); }

}  // namespace

// Every file registers its own operators through fragments, so that the two libraries load in any order.
STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) { m.def("build_info() -> str"); }

// CompositeExplicitAutograd: an operator without tensor arguments has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
