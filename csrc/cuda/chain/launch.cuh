// How every instance of the kernels is launched.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/chain/instance.cuh"

namespace res2net_fused::cuda {

template <class Cta, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1) chain_kernel(const __grid_constant__ ChainArguments arguments) {
  Cta(arguments, block_index()).run();
}

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

// Whether the driver takes launches that overlap, in captures too: it does from CUDA 12.3 on.
inline bool driver_overlaps() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version >= 12030;
  cudaGetLastError();
  return false;
}

// On the current device; cluster: CTAs that reach each other's shared memory. The error is this launch's own, and taken out of
// the runtime's slot, where the next caller would find it. Errors of others are neither reported nor removed, unless ours
// has overwritten them.
template <auto KERNEL, int WARPS>
cudaError_t launch(const ChainArguments& arguments, bool overlaps, void* stream, int cluster) {
  const ChainGeometry& g = arguments.geometry;
  if (g.threads() > 32 * WARPS) return cudaErrorInvalidConfiguration;
  int version = 0;
  cudaError_t error = prepare<KERNEL>(&version);
  // Code for older devices, compiled by the driver for this one, traps at the first barrier of a cluster.
  if (error == cudaSuccess && cluster > 1 && version < CLUSTER_CODE) return cudaErrorInvalidDeviceFunction;
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;  // none: an ordinary grid, on any device
    if (cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[count++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    // Code for older devices does not wait for the kernel before it.
    if (overlaps && version >= CLUSTER_CODE && driver_overlaps()) {
      cudaLaunchAttribute& attribute = attributes[count++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(g.ctas());
    config.blockDim = dim3(g.threads());
    config.dynamicSmemBytes = g.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = count;
    error = cudaLaunchKernelEx(&config, KERNEL, arguments);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// INDEX: into INSTANCE_TABLE; the rest as in launchers.h.
template <int INDEX>
cudaError_t launch_instance(const ChainArguments& arguments, int type, bool overlaps, void* stream) {
  constexpr Instance ROW = INSTANCE_TABLE[INDEX];
  const ChainGeometry& g = arguments.geometry;
  // Parts that send nothing are an ordinary grid, on any device.
  const int cluster = ROW.cluster && g.sends ? g.row_parts * g.channel_parts : 1;
  if (type == FP16) return launch<chain_kernel<CtaOf<INDEX, fp16>, ROW.warps>, ROW.warps>(arguments, overlaps, stream, cluster);
  if (type == BF16) return launch<chain_kernel<CtaOf<INDEX, bf16>, ROW.warps>, ROW.warps>(arguments, overlaps, stream, cluster);
  if constexpr (ROW.runs(TF32)) {
    if (type == TF32)
      return launch<chain_kernel<CtaOf<INDEX, tf32>, ROW.warps>, ROW.warps>(arguments, overlaps, stream, cluster);
  }
  return cudaErrorInvalidValue;
}

}  // namespace res2net_fused::cuda
