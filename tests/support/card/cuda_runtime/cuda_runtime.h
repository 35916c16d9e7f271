// The same for sources with kernels, which are compiled against the emulator's hardware (tests/support/emulator): a C++ compiler sees
// ordinary functions.
#pragma once
#include "cuda_runtime_api.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return stand_in::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return stand_in::get_attributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return stand_in::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
