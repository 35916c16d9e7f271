#include "cuda/device.h"

#include <cuda_runtime.h>

#define RES2NET_FUSED_STRING_(x) #x
#define RES2NET_FUSED_STRING(x) RES2NET_FUSED_STRING_(x)

namespace res2net_fused {

// Compiled for the same architectures as the kernels, so that it tells what they run as, and loaded in no time. Not in an
// anonymous namespace, whose name nvcc makes of the folder's: two builds would differ.
__global__ void probe() {}

}  // namespace res2net_fused

namespace {

cudaError_t query_code(int device, int* version) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, res2net_fused::probe);
  cudaSetDevice(before);
  const bool none = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  *version = error == cudaSuccess ? attributes.ptxVersion : 0;
  if (none) cudaGetLastError();
  return none ? cudaSuccess : error;
}

cudaError_t query(int device, res2net_fused_device_limits* limits) {
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
    if (error != cudaSuccess) return error;
  }
  return query_code(device, &limits->code);
}

}  // namespace

int res2net_fused_query_device(int device, res2net_fused_device_limits* limits) {
  const cudaError_t error = query(device, limits);
  if (error != cudaSuccess) cudaGetLastError();  // reported here; the runtime's slot would hand it to the next caller
  return error;
}

const char* res2net_fused_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char* res2net_fused_nvcc_version(void) {
  return RES2NET_FUSED_STRING(__CUDACC_VER_MAJOR__) "." RES2NET_FUSED_STRING(__CUDACC_VER_MINOR__) "." RES2NET_FUSED_STRING(
      __CUDACC_VER_BUILD__);
}
