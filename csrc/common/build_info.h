// How this binary was compiled: one source for the operators, the pybind11 module and the command line's `info`.
#pragma once

#include <string>
#include <vector>

namespace res2net_fused {

struct BuildInfo {
  std::string compiler;
  long cxx_standard;         // value of __cplusplus, such as 202002
  std::string torch_target;  // lowest torch release the stable ABI was compiled for
  std::string commit;
  std::vector<std::string> instruction_sets;  // what the CPU kernels were compiled for, lowest first
  std::string cuda_version;                   // of the nvcc found at build time; empty: no CUDA library
  std::vector<std::string> cuda_architectures;
};

BuildInfo build_info();

// One JSON object; an empty cuda_version becomes null.
std::string to_json(const BuildInfo& info);

}  // namespace res2net_fused
