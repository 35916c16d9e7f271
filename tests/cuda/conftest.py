"""GPU tests in the order of a first run on a card: what others rest on comes first. Without a GPU all are skipped."""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ORDER = ("primitives", "chain", "networks", "sanitizer", "eager", "triton", "streams", "large_tensors")


def _subject(item) -> str:
    return item.path.stem.removeprefix("test_cuda_")


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.parent == HERE]
    if not torch.cuda.is_available():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items[:] = [item for item in items if item.path.parent != HERE] + sorted(ours, key=lambda i: ORDER.index(_subject(i)))


@pytest.fixture(scope="session")
def compiled_kernels():
    """Compiles the Triton kernels of the GPU tests first; skips where Triton cannot be used."""
    from res2net_fused.backends import triton_backend

    why = triton_backend.why_not_device(torch.device("cuda"), torch.bfloat16)
    if why is not None:
        pytest.skip(why)
    sys.path.insert(0, str(HERE))
    from compile_pool import compile_all

    if "STAND_IN_CARD" in os.environ:
        return  # which binds kernels without compiling them
    _, failures = compile_all(torch.cuda.get_device_capability())
    assert not failures, "\n".join(failures)
