#include "cuda/device.h"

#include <cuda_runtime_api.h>

#define RES2NET_FUSED_STRING_(x) #x
#define RES2NET_FUSED_STRING(x) RES2NET_FUSED_STRING_(x)

int res2net_fused_query_device(int device, res2net_fused_device_limits* limits) {
  // cudaDeviceGetAttribute, not cudaGetDeviceProperties: microseconds instead of milliseconds, and one layout in every
  // runtime version.
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } queries[] = {
      {cudaDevAttrComputeCapabilityMajor, &limits->capability_major},
      {cudaDevAttrComputeCapabilityMinor, &limits->capability_minor},
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_per_block_optin},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_per_multiprocessor},
      {cudaDevAttrMaxRegistersPerMultiprocessor, &limits->registers_per_multiprocessor},
      {cudaDevAttrL2CacheSize, &limits->l2_bytes},
  };
  for (const auto& query : queries) {
    const cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, device);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  return 0;
}

const char* res2net_fused_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char* res2net_fused_nvcc_version(void) {
  return RES2NET_FUSED_STRING(__CUDACC_VER_MAJOR__) "." RES2NET_FUSED_STRING(__CUDACC_VER_MINOR__) "." RES2NET_FUSED_STRING(
      __CUDACC_VER_BUILD__);
}
