"""The parity gate: it passes what is right and catches what is wrong, unwritten or not a number."""

from dataclasses import replace

import pytest
import torch

from res2net_fused.backends.reference import BACKEND as reference_backend
from res2net_fused.chain import tolerances
from res2net_fused.testing import parity
from res2net_fused.testing.cases import VARIANTS, Case, WidthScale, cases

CASE = Case("chain", WidthScale(14, 8), 4, 2, "float32", "cpu")


@pytest.mark.parametrize("case", cases(("chain", "block"), [WidthScale(14, 4)], [2], "float32", "cpu", VARIANTS), ids=str)
def test_gate_is_green_on_every_backend_here(case):
    report = parity.check_case(case)
    assert report.ok, f"\n{report}"
    assert "reference" in {row.backend for row in report}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    report = parity.check_case(Case("block", WidthScale(14, 8), 4, 1, dtype, "cpu"))
    assert report.ok, f"\n{report}"
    assert all(row.dtype == dtype for row in report)


def test_convolution_of_one_group():
    assert parity.check_case(Case("block", WidthScale.from_scale(1), 4, 1, "float32", "cpu", "stage"), "reference").ok


def break_backend(monkeypatch, damage):
    right = reference_backend.forward

    def forward(problem, x, *rest):
        return damage(right(problem, x, *rest), problem)

    monkeypatch.setattr(reference_backend, "forward", forward)


def unwritten_slot(out, problem):
    """A kernel that forgets the passed group."""
    result = torch.empty_like(out)
    result[:, : -problem.width] = out[:, : -problem.width]
    return result


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda out, problem: out * 1.001, id="scaled"),
        pytest.param(lambda out, problem: out.roll(problem.width, 1), id="groups in another order"),
        pytest.param(unwritten_slot, id="a slot unwritten"),
        pytest.param(lambda out, problem: out[:, :, 1:], id="a row too few"),
        pytest.param(lambda out, problem: torch.zeros_like(out), id="zeros"),
    ],
)
def test_wrong_results_are_misses(monkeypatch, damage):
    break_backend(monkeypatch, damage)
    report = parity.check_case(CASE, "reference")
    assert not report.ok
    assert len(report.misses) == 1
    assert "MISS" in str(report)
    assert report.worst()[0] in report.misses


def test_explicit_backend_that_cannot_run_raises():
    with pytest.raises(RuntimeError, match="cuda"):
        parity.check_case(CASE, "cuda")


def test_a_block_that_runs_its_own_forward_is_no_pass(monkeypatch):
    from res2net_fused.modules import fused_forward

    monkeypatch.setattr(fused_forward, "why_not_fused", lambda *_: "because of the test")
    with pytest.raises(RuntimeError, match="because of the test"):
        parity.check_case(Case("block", WidthScale(14, 8), 4, 1, "float32", "cpu"), "reference")


def raising(words):
    def damage(out, problem):
        if problem.dtype == torch.bfloat16:
            raise RuntimeError(words)
        return out

    return damage


MIXED = [replace(CASE, dtype="bfloat16"), CASE, replace(CASE, workload="block")]


def test_what_raises_is_a_failure_of_its_row(monkeypatch):
    break_backend(monkeypatch, raising("it broke"))
    report = parity.check_cases(MIXED, "reference")
    assert [row.outcome for row in report] == ["FAILED", "ok", "ok"] and not report.ok and not report.lost
    assert report[0].failure == "RuntimeError: it broke" and "FAILED" in str(report)
    assert report.misses == report[:1] and not report.unchecked
    with pytest.raises(RuntimeError, match="it broke"):
        parity.check_case(MIXED[0], "reference")


def test_nothing_is_compared_on_a_lost_device(monkeypatch):
    """Rows of before are kept."""
    break_backend(monkeypatch, raising("CUDA error: an illegal memory access was encountered"))
    report = parity.check_cases([MIXED[1], MIXED[0], MIXED[2]], "reference")
    assert [row.outcome for row in report] == ["ok", "FAILED"] and report.lost


def test_a_case_that_cannot_be_made_is_a_failure(monkeypatch):
    module = Case.module

    def make(case):
        if case.workload == "block":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return module(case)

    monkeypatch.setattr(Case, "module", make)
    report = parity.check_cases([MIXED[2], CASE], "reference")
    assert [(row.workload, row.outcome) for row in report] == [("block", "FAILED"), ("chain", "ok")]


def test_cases_that_a_backend_cannot_run_are_not_checked(monkeypatch):
    why = {torch.bfloat16: "no halves here"}
    monkeypatch.setattr(reference_backend, "why_not", lambda problem: why.get(problem.dtype))
    report = parity.check_cases(MIXED, "reference")
    assert [row.outcome for row in report] == ["ok", "ok"] and report.ok
    (reason,) = report.unchecked.values()
    assert "no halves here" in reason
    assert parity.why_not(MIXED, "reference") is None
    assert "no halves here" in parity.why_not(MIXED[:1], "reference")


def test_an_empty_report_is_no_pass():
    assert not parity.ParityReport().ok


def test_poisoned_allocations_and_what_they_leave_behind():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), parity.poisoned_allocations():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3).new_empty(1000).isnan().all()
        assert torch.empty_like(torch.ones(7, 9, dtype=torch.bfloat16)).isnan().all()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def precisions():
    """What every name of PyTorch for the precision of fp32 says, or "raises"."""
    names = {"cudnn": ("conv", "rnn"), "mkldnn": ("conv", "rnn", "matmul"), "cuda": ("matmul",)}
    found = {(a, b): getattr(getattr(torch.backends, a), b).fp32_precision for a, parts in names.items() for b in parts}
    readers = {
        "allow_tf32 of cuDNN": lambda: torch.backends.cudnn.allow_tf32,
        "allow_tf32 of products": lambda: torch.backends.cuda.matmul.allow_tf32,
        "products": torch.get_float32_matmul_precision,
    }
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "raises"
    return found


@pytest.fixture
def precision_as_it_was():
    before = precisions()
    yield
    torch.backends.cudnn.allow_tf32 = before["allow_tf32 of cuDNN"]
    torch.set_float32_matmul_precision(before["products"])
    for (part, operation), value in ((key, value) for key, value in before.items() if isinstance(key, tuple)):
        getattr(getattr(torch.backends, part), operation).fp32_precision = value


def nothing():
    pass


def old_names():
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("medium")


def new_names():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.usefixtures("precision_as_it_was")
@pytest.mark.parametrize("user", [nothing, old_names, new_names])
def test_precision_can_be_read_by_every_name_and_is_given_back(user):
    """new_names alone already makes the older ones raise: they are as they were afterwards, and readable inside."""
    user()
    before = precisions()
    for dtype, device, word in (("tf32", "cuda", "tf32"), ("float32", "cuda:1", "ieee"), ("float32", "cuda", "ieee")):
        with parity.convolution_precision(dtype, device):
            inside = precisions()
        rounds = word == "tf32"
        assert inside["cudnn", "conv"] == inside["cudnn", "rnn"] == inside["cuda", "matmul"] == word
        assert inside["allow_tf32 of cuDNN"] is inside["allow_tf32 of products"] is rounds
        assert inside["products"] == ("high" if rounds else "highest")
        assert precisions() == before
    for dtype, device in (("float32", torch.device("cpu")), ("bfloat16", "cuda")):
        with parity.convolution_precision(dtype, device):
            assert precisions() == before


@pytest.mark.usefixtures("precision_as_it_was")
def test_models_are_exported_whatever_the_precision():
    """torch.export reads the older names."""
    (x,) = CASE.inputs()
    block = torch.nn.Conv2d(x.shape[1], 3, 1)
    for dtype in ("tf32", "float32"):
        with parity.convolution_precision(dtype, "cuda"):
            assert torch.equal(torch.export.export(block, (x,)).module()(x), block(x))
        assert torch.equal(torch.export.export(block, (x,)).module()(x), block(x))


def test_relative_error():
    ones = torch.ones(4, 5)
    assert parity.relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert parity.relative_error(ones, ones) == 0
    for out, reference in ((ones[:3], ones), (ones * float("nan"), ones), (ones, ones * 0)):
        error = parity.relative_error(out, reference)
        assert error != error


def test_bounds():
    assert tolerances.forward_bound("float32", 1.0) == 5e-6
    assert tolerances.forward_bound("tf32", 1.0) == 1e-3
    assert tolerances.forward_bound("float16", 1.0) == 2e-3
    assert tolerances.forward_bound("bfloat16", 1.0) == 1.5e-2
    assert tolerances.forward_bound("bfloat16", 3e-3) == 6e-3
    assert tolerances.network_bound(2e-6) == 8e-6
    for bound in tolerances.FORWARD.values():
        assert bound.where
        assert bound.measured is None or bound.measured < bound.limit
