// res2net_fused._build_info: the libraries' build information as a dict, without torch; and `SameDicts`, which a block's
// snapshot does without where this module is not there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/build_info.h"
#include "python/same_dicts.h"

namespace py = pybind11;

// It holds no state of its own, so that a free-threaded Python need not take its lock back.
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
  py::class_<res2net_fused::SameDicts>(m, "SameDicts")
      .def(py::init<const py::list&, const py::list&>(), py::arg("owners"), py::arg("dicts"))
      .def("alike", &res2net_fused::SameDicts::alike, "Whether each still holds the very objects that it held.");
}
