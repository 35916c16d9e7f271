"""The one place where a backend is chosen: argument, then environment, then auto; reasons, and one log line each."""

import logging
from dataclasses import replace

import pytest
import torch
from helpers import CHAINS

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends import selection
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem

VARIABLE = "RES2NET_FUSED_BACKEND"
# float64 on the CPU: only the reference runs it, on every machine
CHAIN = CHAINS["last"]
PROBLEM = ChainProblem(CHAIN.config, torch.device("cpu"), torch.float64, 2, 7, 9, CHAIN.width, CHAIN.steps, False)


@pytest.fixture
def fallback(monkeypatch):
    """Auto asks triton first, which never runs float64, and nothing has been logged yet."""
    monkeypatch.setitem(selection.AUTO_ORDER, "cpu", ("triton", "reference"))
    selection._log_once.cache_clear()
    yield
    selection._log_once.cache_clear()


def call(backend="auto"):
    return hierarchical_conv2d(*CHAIN.tensors(), backend=backend)


def test_argument_before_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    assert selection.choose(PROBLEM, "reference").name == "reference"
    assert torch.equal(call("reference"), call("reference"))


def test_environment_before_auto(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    choice = selection.choose(PROBLEM)
    assert choice.name == "reference" and f"{VARIABLE}=reference" in choice.reason
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=f"{VARIABLE}=triton cannot run.*float64"):
        call()


@pytest.mark.parametrize("value", ["", "auto"])
def test_environment_that_names_nothing(monkeypatch, value, fallback):
    monkeypatch.setenv(VARIABLE, value)
    assert selection.choose(PROBLEM).name == "reference"


def test_environment_with_an_unknown_name(monkeypatch):
    monkeypatch.setenv(VARIABLE, "tensorrt")
    with pytest.raises(ValueError, match=f"{VARIABLE}=tensorrt: allowed are 'auto', 'reference', 'triton', 'cpu', 'cuda'"):
        call()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_explicit_choice_that_cannot_run_gives_the_reason(backend):
    reason = selection.get_backend(backend).why_not(PROBLEM)
    assert reason
    with pytest.raises(RuntimeError) as caught:
        call(backend)
    assert f"backend={backend!r} cannot run" in str(caught.value) and reason in str(caught.value)


def test_auto_falls_back_and_logs_once(fallback, caplog):
    caplog.set_level(logging.INFO, logger="res2net_fused")
    out = call()
    assert torch.equal(out, call("reference"))
    call()
    lines = [record.getMessage() for record in caplog.records if record.name == "res2net_fused"]
    assert len(lines) == 1
    assert "triton" in lines[0] and selection.get_backend("triton").why_not(PROBLEM) in lines[0]


@pytest.mark.parametrize("pick", [selection.choose, selection.choose_for_training])
def test_a_gpu_that_runs_no_kernel_is_warned_of_once(pick, monkeypatch, caplog):
    monkeypatch.setattr(selection, "_warned", [])
    for name, reason in (("cuda", "the CUDA library was not built"), ("triton", "Triton's driver does not start")):
        for function in ("why_not", "why_not_training"):
            monkeypatch.setattr(selection.get_backend(name), function, lambda problem, reason=reason: reason, raising=False)
    problems = [replace(PROBLEM, device=torch.device(d), dtype=t) for d in ("cpu", "cuda") for t in (torch.float64, torch.half)]
    for problem in problems[:3]:
        assert pick(problem, "reference" if problem.device.type == "cpu" else "auto").name == "reference"
    assert pick(problems[3], "reference").requested_by != "auto"
    assert not caplog.records, "neither a CPU, nor float64, nor a choice by name"
    for problem in (problems[3], replace(problems[3], batch=5)):
        assert pick(problem).name == "reference"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.name == "res2net_fused" and "PyTorch's own operators run on this GPU" in record.getMessage()
    assert "cuda: the CUDA library was not built; triton: Triton's driver does not start" in record.getMessage()


def test_a_choice_remembers_what_was_rejected(fallback):
    choice = selection.choose(PROBLEM)
    assert choice.name == "reference" and choice.requested_by == "auto"
    assert choice.rejected == (("triton", selection.get_backend("triton").why_not(PROBLEM)),)
    assert choice.reason.startswith("triton: ")


def test_auto_with_nothing_that_runs(monkeypatch):
    monkeypatch.setitem(selection.AUTO_ORDER, "cpu", ("triton", "cuda"))
    with pytest.raises(RuntimeError, match="no backend can run.*triton: .*; cuda: "):
        call()


def test_the_reference_runs_everything():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for settings in CHAINS.values():
            problem = ChainProblem(settings.config, torch.device("cpu"), dtype, 1, 3, 3, settings.width, settings.steps, True)
            assert selection.get_backend("reference").why_not(problem) is None


def test_every_backend_gives_one_line_reasons_and_plans():
    for name in ("reference", "triton", "cpu", "cuda"):
        backend = selection.get_backend(name)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            problem = ChainProblem(ChainConfig(), torch.device("cpu"), dtype, 2, 7, 9, 4, 3, True)
            reason = backend.why_not(problem)
            line = backend.plan(problem) if reason is None else reason
            assert line and "\n" not in line


def test_unknown_device_type_uses_the_reference():
    problem = ChainProblem(ChainConfig(), torch.device("meta"), torch.float32, 2, 7, 9, 4, 3, True)
    assert selection.choose(problem).name == "reference"
