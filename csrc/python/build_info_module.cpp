// res2net_fused._build_info: the libraries' build information as a dict, without torch. Nothing depends on this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/build_info.h"

namespace py = pybind11;

// It holds no state, so that a free-threaded Python need not take its lock back.
PYBIND11_MODULE(_build_info, m, py::mod_gil_not_used()) {
  m.doc() = "How the native libraries of this install were compiled.";
  m.def("build_info", [] {
    const res2net_fused::BuildInfo info = res2net_fused::build_info();
    py::dict out;
    out["compiler"] = info.compiler;
    out["cxx_standard"] = info.cxx_standard;
    out["torch_target"] = info.torch_target;
    out["commit"] = info.commit;
    out["instruction_sets"] = info.instruction_sets;
    if (info.cuda_version.empty()) {
      out["cuda_version"] = py::none();
    } else {
      out["cuda_version"] = info.cuda_version;
    }
    out["cuda_architectures"] = info.cuda_architectures;
    return out;
  });
}
