"""Blocks with other activations than ReLU: what is taken over, results, gradients and training, tracing, what is left alone."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import assert_close, randomize, relative_error
from official_style import Bottle2neck as Published
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain, freeze
from res2net_fused.backends import policy
from res2net_fused.chain.activations import shows_slope
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.bottle2neck import DlaBottle2neck
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck, ReferenceDlaBottle2neck

LAYERS = {
    "relu6": nn.ReLU6,
    "leaky_relu:0.01": nn.LeakyReLU,
    "leaky_relu:0.2": functools.partial(nn.LeakyReLU, 0.2),
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": lambda inplace: nn.GELU(),
    "gelu_tanh": lambda inplace: nn.GELU("tanh"),
    "mish": nn.Mish,
}
every = pytest.mark.parametrize("name", LAYERS)
X = torch.randn(2, 32, 9, 11, generator=torch.Generator().manual_seed(5)) * 2
X = X.contiguous(memory_format=torch.channels_last)


def published(name, **keywords):
    """A block of the official code with that activation."""
    block = randomize(Published(32, 8, **keywords)).eval()
    block.relu = LAYERS[name](inplace=True)
    return block


def exact(block, x=X):
    with torch.no_grad():
        return copy.deepcopy(block).double()(x.double())


@every
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_accelerated_blocks(name, backend):
    block = published(name)
    expected = exact(block)
    accelerate(block, backend=backend)
    assert getattr(block, STATE).config.activation == name
    for layout in (torch.channels_last, torch.contiguous_format):
        x = X.contiguous(memory_format=layout)
        with torch.no_grad():
            assert_close(block(x), expected)
            assert_close(block(x), expected)
        assert explain(block)[0].fused
    with torch.no_grad():
        assert_close(freeze(block)(X), expected)


@every
def test_what_stays_in_nchw_is_left_alone(name):
    block = published(name)
    expected = exact(block)
    accelerate(block, memory_format=torch.preserve_format)
    for x, fused in ((X.contiguous(), False), (X, True)):
        with torch.no_grad():
            assert_close(block(x), expected)
        (report,) = explain(block)
        assert report.fused is fused and (fused or "in channels-last only" in report.reason)


@every
@pytest.mark.parametrize("stage", [False, True], ids=["normal", "stage"])
@pytest.mark.parametrize("dla", [False, True], ids=["res2net", "dla"])
def test_blocks_of_the_package(dla, stage, name):
    def make(kind):
        if dla:
            return kind(32, 32, stage=stage, act_layer=LAYERS[name])
        return kind(32, 8, stype="stage" if stage else "normal", act_layer=LAYERS[name])

    block = randomize(make(DlaBottle2neck if dla else Bottle2neck)).eval()
    plain = make(ReferenceDlaBottle2neck if dla else ReferenceBottle2neck).eval()
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert_close(block(X), exact(plain))
    assert explain(block)[0].fused and getattr(block, STATE).config.activation == name


@every
def test_gradients_in_eval_mode(name):
    block = published(name)
    plain = copy.deepcopy(block).double()
    accelerate(block)
    x, x64 = X.clone().requires_grad_(), X.double().requires_grad_()
    out, expected = block(x), plain(x64)
    assert explain(block)[0].fused
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert_close(out, expected)
    bound = 2e-3 if shows_slope(name) else 2e-5  # a kink met from the other side is no error
    assert relative_error(x.grad, x64.grad) <= bound
    for (key, a), b in zip(block.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) <= bound, key


@every
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_training(name, backend):
    block = published(name).train()
    plain = copy.deepcopy(block).double()
    accelerate(block, backend=backend)
    out, expected = block(X), plain(X.double())
    (report,) = explain(block)
    assert report.fused is shows_slope(name)
    assert report.fused or "is not fused in training mode: its output does not show its derivative" in report.reason
    assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(block.parameters(), plain.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) <= 2e-3
    for a, b in zip(block.buffers(), plain.buffers(), strict=True):
        assert_close(a.double(), b.double(), 1e-5)


@every
def test_half_types_and_autocast(name):
    block = published(name)
    expected = exact(block)
    with torch.no_grad():
        eager = relative_error(copy.deepcopy(block).bfloat16()(X.bfloat16()), expected)
        accelerate(block)
        assert relative_error(copy.deepcopy(block).bfloat16()(X.bfloat16()), expected) <= max(2 * eager, 1.5e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(block(X), expected) <= max(2 * eager, 1.5e-2)
        assert explain(block)[0].fused


@pytest.mark.parametrize("name", ["silu", "leaky_relu:0.2", "relu6", "gelu"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_compiled_without_a_break(name, gradients):
    block = accelerate(published(name))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        out, own = compiled(X), block(X)
    assert_close(out, own.double(), 1e-6)
    if gradients:
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("name", ["silu", "leaky_relu:0.2"])
def test_exported_and_pickled(name):
    block = accelerate(published(name))
    expected = exact(block)
    with torch.no_grad():
        program = torch.export.export(block, (X,))
        assert any("res2net_fused" in str(node.target) for node in program.graph.nodes)
        assert_close(program.module()(X), expected)
        again = pickle.loads(pickle.dumps(block))
        assert_close(again(X), expected)
    assert explain(again)[0].fused


# What is left alone, or changes ----------------------------------------------------------------------------------------


class Squared(nn.SiLU):
    def forward(self, x):
        return super().forward(x).square()


class Tuned(nn.LeakyReLU):
    """Other code behind the forward of a known class."""

    def __getattribute__(self, name):
        return 0.5 if name == "negative_slope" and "calls" in self.__dict__ else super().__getattribute__(name)

    def __call__(self, x):
        self.calls = True
        return super().__call__(x)


@pytest.mark.parametrize("activation", [nn.ELU(), nn.PReLU(), nn.Hardtanh(), Squared(), nn.Softplus(), nn.Sigmoid()], ids=str)
def test_other_activations_run_the_blocks_own_forward(activation):
    block = published("silu")
    block.relu = activation
    expected = block(X)
    accelerate(block)
    assert torch.equal(block(X), expected)
    (report,) = explain(block)
    assert report.fused is False and f"activation {type(activation).__name__} is not fused" in report.reason


def test_an_activation_that_is_not_what_its_class_says():
    block = published("leaky_relu:0.01")
    block.relu = Tuned(0.1)
    expected = copy.deepcopy(block)(X)
    accelerate(block)
    assert_close(block(X), expected)
    assert "is not the activation leaky_relu:0.1" in explain(block)[0].reason


@pytest.mark.parametrize("name", ["leaky_relu:0.01", "silu"])
def test_settings_that_change_after_accelerate_are_seen(name):
    block = published(name)
    accelerate(block)
    with torch.no_grad():
        block(X)
        for other in (nn.ReLU(), nn.LeakyReLU(0.4), nn.GELU("tanh")):
            block.relu = other
            assert_close(block(X), exact(block))
            assert explain(block)[0].fused is False
    again = published("leaky_relu:0.2")
    accelerate(again)
    again.relu.negative_slope = 0.7
    with torch.no_grad():
        assert_close(again(X), exact(again))


def test_hooks_on_the_activation_fire():
    block, calls = accelerate(published("silu")), []
    block.relu.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        assert_close(block(X), exact(block))
    assert len(calls) >= 5 and "hook" in explain(block)[0].reason


def test_the_default_is_that_of_clamped_chains(monkeypatch):
    asked = []
    monkeypatch.setattr(policy, "clamped_chain_pays", lambda problem: asked.append(problem) is not None)
    block = accelerate(published("silu"))
    with torch.no_grad():
        block(X)
    assert asked and explain(block)[0].fused is False
