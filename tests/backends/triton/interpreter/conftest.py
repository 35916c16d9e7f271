"""These tests need TRITON_INTERPRET=1 before Triton's import, hence a process of their own: see ../test_chain.py."""

import dataclasses
import itertools
import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items):
    """Every second case of a long list is slow: what they hold in common is seen by half of them, in minutes less."""
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]  # of a session there may be others
    for _, group in itertools.groupby(here, key=lambda item: (item.path, item.originalname)):
        cases = [item for item in group if not item.get_closest_marker("slow")]
        for item in cases[1::2] if len(cases) > 4 else ():
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tiles, since the interpreter takes its time per program, not per element; one test has small ones."""
    from res2net_fused.backends.triton import step_plan

    monkeypatch.setattr(step_plan, "_MULTIPROCESSORS", {(8, 0): 1})


@pytest.fixture(autouse=True)
def quick_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of its time goes to the question whether an int32 overflows, which only large tensors can make it do."""
    from triton.runtime import interpreter

    if request.path.stem != "test_large_tensors":
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """float32 is multiplied in TF32 as tensor cores do, which read 19 bits of each factor and cut the others off.

    Returned: of each product that lost bits by that, how many of its factors did.
    """
    import numpy
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from res2net_fused.backends.triton import availability

    exact, losses = InterpreterBuilder.create_dot, []

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision == INPUT_PRECISION.TF32 and a.data.dtype == numpy.float32:
            bits = [numpy.ascontiguousarray(factor.data).view(numpy.uint32) for factor in (a, b)]
            losses.extend(filter(None, [sum(int(numpy.count_nonzero(own & 0x1FFF)) for own in bits)]))
            a, b = (TensorHandle((own & 0xFFFFE000).view(numpy.float32), a.dtype) for own in bits)
        return exact(self, a, b, d, input_precision, max_num_imprecise_acc)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(availability, "uses_tf32", lambda problem: availability.convolutions_use_tf32())
    return losses
