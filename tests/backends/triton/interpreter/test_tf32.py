"""float32 multiplied in TF32 by arithmetic that cuts bits off, as tensor cores do: factors are rounded, results are not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from chain1d_cases import arguments, to_float64
from helpers import CHAINS, Chain, masked_gradients
from training_cases import training_case
from triton_cases import error, make_block, make_case, poison_new_memory

from res2net_fused import freeze, hierarchical_conv1d, hierarchical_conv2d, pack_weights
from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.triton import availability, step_plan, tf32
from res2net_fused.backends.triton.kernels import common, conv3x3_fwd, pointwise
from res2net_fused.chain import reference
from res2net_fused.chain.config import Chain1dConfig, ChainConfig
from res2net_fused.chain.tolerances import FORWARD
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.testing import cases, parity
from res2net_fused.testing.cases import Case, WidthScale

BOUND, EXACT = FORWARD["tf32"].limit, FORWARD["float32"].limit


@pytest.fixture(autouse=True)
def every_factor_is_rounded(cut_off):
    yield
    assert not cut_off


@pytest.fixture
def precision(monkeypatch):
    """Sets what convolutions may do, "tf32" or "ieee"."""
    return lambda name: monkeypatch.setattr(availability, "convolution_precision", lambda: name)


def check(out, exact):
    """Within the bound, and multiplied in TF32 at all."""
    assert EXACT < error(out, exact) <= BOUND


def errors_of_check(monkeypatch, config, workload, variant="normal"):
    """What `res2net-fused check` runs in the first stage, at batch 1 and 7x7 pixels."""
    monkeypatch.setattr(cases, "SIZES", (7, 7, 7, 7))
    case = Case(workload, WidthScale.parse(config), 1, 1, "tf32", "cpu", variant)
    rows = parity.check_case(case, "triton")
    assert [row.bound for row in rows] == [BOUND]
    return [row.error for row in rows]


CHECKED = [(*both, "normal") for both in itertools.product(("26w4s", "14w8s", "48w2s"), ("chain", "block"))]
CHECKED += [("26w4s", "chain", "stage"), ("26w4s", "block", "stage")]


@pytest.mark.parametrize("config, workload, variant", CHECKED)
def test_check(config, workload, variant, monkeypatch):
    assert all(EXACT < e <= BOUND for e in errors_of_check(monkeypatch, config, workload, variant))


def test_without_rounding_the_bound_is_missed(monkeypatch, cut_off):
    """The arithmetic of these tests cuts off as much as tensor cores do."""
    for module in (conv3x3_fwd, common, pointwise):
        monkeypatch.setattr(module, "rounded_factor", lambda value, PRECISION: value)
    monkeypatch.setattr(tf32, "round_to_tf32", lambda values: values)
    assert all(e > BOUND for e in errors_of_check(monkeypatch, "26w4s", "block"))
    assert cut_off
    cut_off.clear()


@pytest.mark.parametrize("name", ["last", "first_added", "groups", "dilated", "stage_stride2"])
def test_settings(name):
    case = make_case(CHAINS[name].config, width=12, scale=4, size=(5, 4))
    check(case.run(), case.reference())


def test_first_group_aligned_beforehand(monkeypatch):
    monkeypatch.setattr(step_plan, "ALIGN_FIRST_PIXELS", 0)
    case = make_case(width=7, scale=4, size=(7, 7))
    assert "4 launches" in triton_backend.chain.plan(case.problem)
    check(case.run(), case.reference())


@pytest.mark.parametrize("name", ["speechbrain", "espnet", "first_added"])
def test_rows(name):
    settings, tensors = arguments(name, (2, 40), torch.float32)
    out = hierarchical_conv1d(*tensors, **settings, backend="triton")
    check(out, reference.hierarchical_conv1d(*to_float64(tensors), Chain1dConfig(**settings)))


@pytest.mark.parametrize("name, recompute", [("last", False), ("last", True), ("first_added", False), ("stage_stride2", True)])
def test_batch_statistics(name, recompute, monkeypatch):
    case = training_case(Chain(CHAINS[name].settings, 2, 12), (2, 5, 4), torch.float32).require_grad()
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        out = case.run(backend="triton", recompute=recompute).out
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, case.leaves, grad)
    exact, _, expected = case.exact(out, grad)
    check(out.detach(), exact)
    check(got[0], expected[0])
    assert all(error(ours, theirs) <= BOUND for ours, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["last", "groups", "stage_stride2"])
def test_folded(name, monkeypatch):
    chain = Chain(CHAINS[name].settings, 2, 12)
    x, weights, biases = chain.tensors((2, 5, 4), torch.float32)
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        out = hierarchical_conv2d(x, weights, biases, backend="triton", **chain.settings)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, tensors, grad)
    expected = masked_gradients(chain, x, weights, biases, out, grad)
    check(got[0], expected[0])
    assert all(error(ours, theirs) <= BOUND for ours, theirs in zip(got, expected, strict=True))
    assert error(got[-1], expected[-1]) <= 1e-6, "of the last bias: sums that multiply nothing lose no bits"


@pytest.mark.parametrize("packed_in, run_in", [("tf32", "ieee"), ("ieee", "tf32")])
def test_packed_weights_are_right_whatever_was_set_when_they_were_packed(packed_in, run_in, precision):
    case = make_case(width=12, scale=4, size=(5, 4))
    precision(packed_in)
    packed = pack_weights(case.weights, case.biases, backend="triton")
    precision(run_in)
    out = hierarchical_conv2d(case.x, packed, backend="triton")
    assert torch.equal(out, hierarchical_conv2d(case.x, case.weights, case.biases, backend="triton"))
    low, high = (0, EXACT) if run_in == "ieee" else (EXACT, BOUND)
    assert low <= error(out, case.reference()) <= high


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "kept"])
@torch.no_grad()
def test_a_kept_block_is_right_whatever_was_set_when_it_was_packed(frozen, precision):
    block = make_block("w6s4", torch.float32)
    x = torch.randn(1, block.conv1.in_channels, 7, 7)
    expected = ReferenceBottle2neck.forward(copy.deepcopy(block).double(), x.double())
    precision("tf32")
    if frozen:
        freeze(block)
    for name in ("tf32", "ieee", "tf32"):
        precision(name)
        low, high = (0, EXACT) if name == "ieee" else (EXACT, BOUND)
        assert low <= error(block(x), expected) <= high


def test_results_lose_no_bits():
    """y is rounded as a factor of the next convolution, not where the user sees it; what passes through is x."""
    case = make_case(ChainConfig(activation="none"), width=12, scale=4)
    out = case.run()
    assert (out[:, :36].contiguous().view(torch.int32) & 0x1FFF).ne(0).float().mean() > 0.9
    assert torch.equal(out[:, 36:], case.x[:, 36:])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800000, -0x800000], ids=["nan", "nan_of_cards", "inf", "-inf"])
def test_not_finite_values_survive(bits):
    case = make_case(ChainConfig(activation="none"), width=17, scale=4, size=(5, 4), batch=1)
    case.x.view(torch.int32)[0, 18, 2, 3] = bits
    out, exact = case.run(), case.reference(torch.float32)
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    assert not out.isfinite().all()
