"""GPU tests in the order of a first run on a card: what others rest on comes first. Without a GPU all are skipped.

The Triton kernels that the chosen tests launch are compiled before the first of them, as far as their files say which: a
function `launches(parameters, capability)` for the parameters of one test.
"""

import functools
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ORDER = ("cuda_primitives", "cuda_chain", "networks", "cuda_sanitizer", "eager", "triton", "streams", "large_tensors")
FAILURES = pytest.StashKey[list[str]]()


def _subject(item) -> str:
    return item.path.stem.removeprefix("test_")


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.parent == HERE]
    if not torch.cuda.is_available():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items[:] = [item for item in items if item.path.parent != HERE] + sorted(ours, key=lambda i: ORDER.index(_subject(i)))


def why_not_triton():
    """Why no Triton kernel can be launched here, or None."""
    from res2net_fused.backends import triton as triton_backend

    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return triton_backend.availability.why_not_device(torch.device("cuda"), torch.bfloat16)


def kernels_of(items, capability):
    """Every kernel once that these tests launch."""
    from gpu_cases import distinct

    from res2net_fused.testing.parity import convolution_precision

    asked = {}
    for item in items:
        launches = getattr(getattr(item, "module", None), "launches", None)
        if item.path.parent == HERE and launches is not None:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            asked[item.module, repr(parameters)] = functools.partial(launches, parameters, capability)
    with convolution_precision("float32", "cuda"):  # as in the tests, whose fixtures are not there yet
        return distinct(call for ask in asked.values() for call in ask())


def pytest_collection_finish(session):
    if why_not_triton() is not None:
        return
    capability = torch.cuda.get_device_capability()
    calls = kernels_of(session.items, capability)
    if not calls:
        return
    from compile_pool import arithmetic, compile_all
    from gpu_cases import STAND_IN

    with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        if session.config.option.collectonly or STAND_IN:  # which binds kernels without compiling them
            print(f"Triton kernels to compile: {arithmetic(len(calls), 8)}")
        else:
            session.config.stash[FAILURES] = compile_all(calls, capability)


@pytest.fixture(scope="session")
def compiled_kernels(pytestconfig):
    """Skips where Triton cannot be used; fails where a kernel of these tests did not compile."""
    if (why := why_not_triton()) is not None:
        pytest.skip(why)
    failures = pytestconfig.stash.get(FAILURES, [])
    assert not failures, "\n".join(failures)
