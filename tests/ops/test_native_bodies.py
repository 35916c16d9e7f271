"""What the native bodies of the operators keep of Python's decisions, and what must be noticed all the same."""

import pytest
import torch
from helpers import assert_close, run_together
from torch.autograd import forward_ad

from res2net_fused import hierarchical_conv2d, pack_weights
from res2net_fused._native import library
from res2net_fused.chain import reference
from res2net_fused.chain.config import ChainConfig

pytestmark = pytest.mark.skipif(not library.cpu_library().loaded, reason="needs the CPU library")

OPERATOR = torch.ops.res2net_fused.hierarchical_conv2d
SETTINGS = 1, 1, 1, True, "last", None, "relu"


def tensors(size=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 32, size, size, generator=generator).to(memory_format=torch.channels_last)
    weights = [torch.randn(8, 8, 3, 3, generator=generator) * 0.1 for _ in range(3)]
    return x, weights, [torch.randn(8, generator=generator) for _ in range(3)]


def call(x, weights, biases, backend="auto", operator=OPERATOR.default):
    return operator(x, weights, biases, None, "plain", *SETTINGS, backend)


def expected(x, weights, biases):
    return reference.hierarchical_conv2d(x, weights, biases, ChainConfig())


def decisions(forget=False):
    return torch.ops.res2net_fused_native.known_decisions(forget)


def test_a_decision_is_kept_for_calls_of_the_same_kind():
    decisions(forget=True)
    x, weights, biases = tensors()
    for made in (1, 1):
        assert_close(call(x, weights, biases), expected(x, weights, biases))
        assert decisions() == made
    others = [(x.contiguous(), weights, biases), (x[:1], weights, biases), (x, weights, None), tensors(size=10)]
    for made, other in enumerate(others, start=2):
        assert_close(call(*other), expected(*other))
        assert decisions() == made


@pytest.mark.parametrize("variable", ["RES2NET_FUSED_BACKEND", "RES2NET_FUSED_CPU_ARITHMETIC", "RES2NET_FUSED_CPU_ISA"])
def test_environment_variables_are_noticed_between_two_calls(variable, monkeypatch):
    x, weights, biases = tensors()
    out = call(x, weights, biases)
    monkeypatch.setenv(variable, "unheard of")
    with pytest.raises(ValueError, match=f"{variable}=.*allowed are"):
        call(x, weights, biases)
    monkeypatch.delenv(variable)
    assert torch.equal(call(x, weights, biases), out)


def test_another_backend_is_noticed_between_two_calls(monkeypatch):
    x, weights, biases = tensors()
    call(x, weights, biases)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "reference")
    assert torch.equal(call(x, weights, biases), expected(x, weights, biases))
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="RES2NET_FUSED_BACKEND=triton cannot run"):
        call(x, weights, biases)


@pytest.mark.parametrize("operator", [OPERATOR, OPERATOR.default], ids=["packet", "overload"])
def test_errors_are_those_of_python(operator):
    x, weights, biases = tensors()
    call(x, weights, biases)
    with torch.no_grad(), pytest.raises(ValueError, match="biases holds 3 tensors"):
        call(x, weights[:2], biases, operator=operator)
    with pytest.raises(TypeError, match="both must have one dtype"):
        call(x.half(), weights, biases, operator=operator)
    with pytest.raises(TypeError, match="biases.1. is torch.float64"):
        call(x, [weight.requires_grad_() for weight in weights], [biases[0], biases[1].double(), biases[2]], operator=operator)


def test_a_refusal_is_not_raised_again_for_another_error():
    x, weights, biases = tensors()
    with pytest.raises(ValueError, match="biases holds"):
        call(x, weights[:2], biases)
    for wrong in ("no list", 2.5):
        with pytest.raises(RuntimeError, match=f"{wrong}"):
            OPERATOR.default(x, wrong)


def test_tangents_are_refused_after_a_call_without():
    x, weights, biases = tensors()
    with torch.no_grad():
        call(x, weights, biases)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(forward_ad.make_dual(x, x), weights, biases)


@pytest.mark.parametrize("kind", [list, tuple])
def test_one_weight_of_many_that_requires_grad(kind):
    x, weights, biases = tensors()
    weights[1].requires_grad_()
    out = call(x, kind(weights), kind(biases))
    (gradient,) = torch.autograd.grad(out.square().sum(), weights[1])
    (wanted,) = torch.autograd.grad(expected(x, weights, biases).square().sum(), weights[1])
    assert_close(gradient, wanted)


def test_packed_weights_need_no_gradient_mode():
    x, weights, biases = tensors()
    packed = pack_weights(weights, biases)
    out = hierarchical_conv2d(x, packed)
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(hierarchical_conv2d(x, packed), out)


def test_many_threads_ask_for_many_problems():
    decisions(forget=True)
    problems = [tensors(size) for size in range(4, 16)]

    def work():
        return [call(*problem) for problem in problems]

    for outs in run_together(*[work] * 4):
        for out, problem in zip(outs, problems, strict=True):
            assert_close(out, expected(*problem))
    assert decisions() == len(problems)


@pytest.mark.parametrize("make", [torch._neg_view, lambda b: torch._efficientzerotensor(b.shape)], ids=["negated", "zeros"])
@pytest.mark.parametrize("which", ["x", "weights", "biases"])
def test_tensors_whose_values_are_not_in_memory(which, make):
    """The dispatcher makes ordinary ones of them, but not in a list that may be absent."""
    x, weights = torch.randn(1, 16, 5, 6), [torch.randn(4, 4, 3, 3) for _ in range(3)]
    biases = [torch.randn(4) for _ in range(3)]
    if which == "x":
        x = make(x)
    else:
        tensors = weights if which == "weights" else biases
        tensors[1] = make(tensors[1])
    exact = reference.hierarchical_conv2d(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], ChainConfig()
    )
    assert_close(hierarchical_conv2d(x, weights, biases, backend="cpu"), exact, 5e-6)
    assert_close(hierarchical_conv2d(x, pack_weights(weights, biases, backend="cpu"), backend="cpu"), exact, 5e-6)
