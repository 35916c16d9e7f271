// How every kernel of the chain is launched; what the three launchers share.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "launchers.h"
#include "cuda/plan/cluster_geometry.h"

namespace res2net_fused::chain {

constexpr int PREPARED_DEVICES = 64;  // those beyond are prepared at every launch

// Version of the PTX, such as 90, that the kernel's code for a device was compiled from; 0 before its first launch there.
template <auto KERNEL>
std::atomic<int> code_version[PREPARED_DEVICES];

// Once for a kernel and a device: a block may then have all the shared memory that the device gives to any. Not what this
// launch needs: the limit is the kernel's, and a launch of another thread, or a node of a captured graph, may need more.
template <auto KERNEL>
cudaError_t prepare(int* version) {
  int device = 0, shared_bytes = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const bool known = device < PREPARED_DEVICES;
  *version = known ? code_version<KERNEL>[device].load(std::memory_order_acquire) : 0;
  if (*version > 0) return cudaSuccess;
  cudaError_t error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaFuncAttributes code;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, KERNEL);
  if (error != cudaSuccess) return error;
  *version = code.ptxVersion;
  if (known) code_version<KERNEL>[device].store(*version, std::memory_order_release);
  return cudaSuccess;
}

// On the current device; cluster: CTAs that reach each other's shared memory. The error is this launch's own, and taken out of
// the runtime's slot, where the next caller would find it. Errors of others are neither reported nor removed, unless ours
// has overwritten them.
template <auto KERNEL, int WARPS>
cudaError_t launch(const ChainArguments& arguments, void* stream, int cluster = 1) {
  const ChainGeometry& g = arguments.geometry;
  if (g.threads() > 32 * WARPS) return cudaErrorInvalidConfiguration;
  int version = 0;
  cudaError_t error = prepare<KERNEL>(&version);
  // Code for older devices, compiled by the driver for this one, traps at the first barrier of a cluster.
  if (error == cudaSuccess && cluster > 1 && version < CLUSTER_CODE) return cudaErrorInvalidDeviceFunction;
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(g.ctas());
    config.blockDim = dim3(g.threads());
    config.dynamicSmemBytes = g.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;  // else an ordinary grid, on any device
    error = cudaLaunchKernelEx(&config, KERNEL, arguments);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace res2net_fused::chain
