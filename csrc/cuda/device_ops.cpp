// torch.ops.res2net_fused_native.cuda_build_info and .device_limits: what the CUDA library was compiled with, and what
// a device offers to a kernel's plan.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "common/build_info.h"
#include "cuda/device.h"

namespace {

#ifdef RES2NET_FUSED_HAVE_WGMMA
constexpr bool HAVE_WGMMA = true;
#else
constexpr bool HAVE_WGMMA = false;
#endif

std::string cuda_build_info() {
  res2net_fused::BuildInfo info = res2net_fused::build_info();
  info.cuda_version = res2net_fused_nvcc_version();
  return res2net_fused::to_json(info);
}

// The fields of DeviceLimits in res2net_fused/_native/library.py, in that order.
std::vector<int64_t> device_limits(int64_t device) {
  STD_TORCH_CHECK(
      device >= 0 && device <= std::numeric_limits<int>::max(), "device: expected the index of a CUDA device, got ", device);
  res2net_fused_device_limits limits;
  const int error = res2net_fused_query_device(static_cast<int>(device), &limits);
  STD_TORCH_CHECK(error == 0, "device: CUDA device ", device, " cannot be queried: ", res2net_fused_cuda_error(error));
  return {
      limits.capability_major,
      limits.capability_minor,
      limits.multiprocessors,
      limits.shared_per_block_optin,
      limits.shared_per_multiprocessor,
      limits.registers_per_multiprocessor,
      limits.l2_bytes,
      HAVE_WGMMA && limits.capability_major == 9,
      limits.code};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def("cuda_build_info() -> str");
  m.def("device_limits(int device) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
  m.impl("device_limits", TORCH_BOX(&device_limits));
}
