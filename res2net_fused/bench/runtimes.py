"""Other runtimes as peers: ONNX Runtime and OpenVINO on a CPU, on a module exported at its first call and without copies; on a
GPU TensorRT, as a backend of torch.compile."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.triton.availability import convolutions_use_tf32
from ..testing.parity import relative_error

Call = Callable[[Tensor], Tensor]
TENSORRT = "tensorrt"  # its name among the providers
EXTRA = "pip install 'res2net-fused[peers]'"
# Against eager PyTorch. fp32 kernels differ by some 1e-6 over a network; one that computes in bf16 or TF32 by 1e-3 or more.
BOUND = 1e-4
_EXPORTER = ("onnx", "onnxscript")


class ExportedModel:
    """A module in another runtime, for contiguous fp32 inputs (N, C, H, W) of the shape of the first one.

    The first call exports the module, which may take seconds, and compares its output with the module's own. Raises
    RuntimeError where they differ by more than BOUND, ValueError for an input that the runtime would have to copy.
    """

    own_threads = True  # see `measure`

    def __init__(self, name: str, module: nn.Module) -> None:
        """name: a key of RUNTIMES. Raises ImportError where the runtime or the exporter is not installed."""
        reason = why_not(name, "float32")
        if reason is not None:
            raise ImportError(f"{name}: {reason}")
        self.name = name
        self._module: nn.Module | None = module
        self._call: Call | None = None
        self._shape = torch.Size()

    def __call__(self, x: Tensor) -> Tensor:
        call = self._call
        if call is None:
            assert self._module is not None
            call = self._call = self._prepare(self._module, x)
        if x.shape != self._shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} with strides {x.stride()}; {self.name} was given a module for contiguous "
                f"torch.float32 {tuple(self._shape)}"
            )
        return call(x)

    def _prepare(self, module: nn.Module, x: Tensor) -> Call:
        self._shape = x.shape
        with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            example = torch.empty_like(x).copy_(x)  # x may be an inference tensor, which cannot be exported
            expected = module(example)
            path = Path(folder, "model.onnx")
            export(module, example, path)
            call = RUNTIMES[self.name](path, example, expected, torch.get_num_threads())
            error = relative_error(call(example), expected)
        if not error <= BOUND:
            raise RuntimeError(f"{self.name} computes something else: relative error {error:.2g}, at most {BOUND:g} is allowed")
        self._module = None  # the runtime has its weights
        return call


def export(module: nn.Module, x: Tensor, path: Path) -> None:
    """Writes the module as an ONNX file, for inputs of the shape of x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)


def _start_onnxruntime(path: Path, x: Tensor, out: Tensor, threads: int) -> Call:
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads would spin into the next one's run
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    source, target = session.get_inputs()[0].name, session.get_outputs()[0].name
    shape, out_shape = tuple(x.shape), tuple(out.shape)

    def call(x: Tensor) -> Tensor:
        result, binding = torch.empty(out_shape), session.io_binding()
        binding.bind_input(source, "cpu", 0, numpy.float32, shape, x.data_ptr())
        binding.bind_output(target, "cpu", 0, numpy.float32, out_shape, result.data_ptr())
        session.run_with_iobinding(binding)
        return result

    return call


def _start_openvino(path: Path, x: Tensor, out: Tensor, threads: int) -> Call:
    import openvino

    # Told to keep to fp32: with AMX or AVX512-BF16 it would otherwise compute in bf16.
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()
    out_shape = tuple(out.shape)

    def call(x: Tensor) -> Tensor:
        result = torch.empty(out_shape)
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        request.set_output_tensor(openvino.Tensor(result.numpy(), shared_memory=True))
        request.infer()
        return result

    return call


# How each of them takes an ONNX file, examples of x and of the output, and a number of threads.
RUNTIMES: dict[str, Callable[[Path, Tensor, Tensor, int], Call]] = {
    "onnxruntime": _start_onnxruntime,
    "openvino": _start_openvino,
}


def why_not(name: str, dtype: str) -> str | None:
    """Why this runtime cannot be timed here, or None."""
    missing = [package for package in (name, *_EXPORTER) if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed ({', '.join(missing)}): {EXTRA}"
    return None if dtype == "float32" else f"timed in float32 only, not in {dtype}"


@functools.cache  # importing it takes seconds, also where it fails
def why_not_tensorrt() -> str | None:
    """Why TensorRT cannot be timed here, or None."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "not installed (torch_tensorrt): pip install torch-tensorrt, of the release that fits this PyTorch"
    try:
        importlib.import_module("torch_tensorrt")
    except Exception as error:  # it loads TensorRT and CUDA libraries, of versions that need not fit
        return f"torch_tensorrt cannot be imported ({type(error).__name__}: {str(error).strip()[:200]})"
    return None


def tensorrt(module: nn.Module) -> Call:
    """The module built by TensorRT at its first call, which may take minutes. Raises ImportError where it cannot be used."""
    reason = why_not_tensorrt()
    if reason is not None:
        raise ImportError(f"tensorrt: {reason}")
    options: dict[str, Any] = {
        "use_explicit_typing": True,  # of the module's own dtype
        "disable_tf32": not convolutions_use_tf32(),
        "min_block_size": 1,
        "pass_through_build_failures": True,  # or PyTorch would run what TensorRT could not build
    }
    return torch.compile(module, backend="torch_tensorrt", dynamic=False, options=options)


def versions(device: str = "cpu") -> dict[str, str]:
    """The version of each runtime for this device, or "not installed"."""
    found = {}
    for name in RUNTIMES if torch.device(device).type == "cpu" else ("torch_tensorrt",):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
