// Plain C view of the CUDA runtime: lets launchers include torch's headers and .cu files none of them.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int capability_major;
  int capability_minor;
  int multiprocessors;
  int shared_per_block_optin;     // bytes a block may ask for through cudaFuncAttributeMaxDynamicSharedMemorySize
  int shared_per_multiprocessor;  // bytes
  int registers_per_multiprocessor;
  int l2_bytes;
  int code;  // version of the PTX, such as 90, that this library's code for the device was compiled from; 0: there is none
} res2net_fused_device_limits;

// 0, or the cudaError_t that the runtime gave.
int res2net_fused_query_device(int device, res2net_fused_device_limits* limits);

const char* res2net_fused_cuda_error(int code);

// Version of the nvcc that compiled the .cu files, such as "13.0.88".
const char* res2net_fused_nvcc_version(void);

#ifdef __cplusplus
}
#endif
