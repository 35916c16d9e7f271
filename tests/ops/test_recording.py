"""Whoever records PyTorch's operators sees those of the plain model: torch.jit.trace, counters, dispatch and function modes."""

import io
import subprocess
import sys

import pytest
import torch
from helpers import assert_close, randomize, timm_or_skip
from official_models import IMAGES, official, run
from published_blocks.speakers1d import ESPnetBlock
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from res2net_fused import accelerate, explain, freeze, hierarchical_conv1d, hierarchical_conv2d
from res2net_fused.backends import policy

ROWS = torch.randn(2, 32, 23, generator=torch.Generator().manual_seed(2))


def make(kind):
    """A plain model and its input."""
    return (official(), IMAGES) if kind == "2d" else (randomize(ESPnetBlock()).eval(), ROWS)


@pytest.fixture(autouse=True)
def chains_pay(monkeypatch):
    monkeypatch.setattr(policy, "chain_pays_1d", lambda *_: True)


kinds = pytest.mark.parametrize("kind", ["2d", "1d"])


class Counter(TorchDispatchMode):
    """Counts convolutions and knows nothing of other libraries' operators."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] = self.seen.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


class FunctionCounter(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def seen_by(mode, model, x):
    with mode:
        run(model, x)
    return {name: count for name, count in mode.seen.items() if "conv" in name or "res2net_fused" in name}


@pytest.mark.parametrize("mode", [Counter, FunctionCounter])
@kinds
def test_a_mode_counts_what_it_counts_of_the_plain_model(kind, mode):
    model, x = make(kind)
    expected = seen_by(mode(), model, x)
    accelerate(model)
    for _ in range(2):
        assert seen_by(mode(), model, x) == expected and expected
    assert any(f"{mode.__name__} is active" in r.reason for r in explain(model))
    run(model, x)
    assert all(r.fused for r in explain(model)), "the mode is gone"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_counter_below_another_mode_and_a_frozen_model(frozen):
    model, x = make("2d")
    expected = seen_by(Counter(), model, x)
    accelerate(model)
    if frozen:
        freeze(model)
    with FlopCounterMode(display=False):
        assert seen_by(Counter(), model, x) == expected


def test_flops_with_formulas_of_the_users_own():
    def doubled(x_shape, w_shape, _bias, *args, out_shape=None, **kwargs):
        return 1

    model, x = make("2d")
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution: doubled}) as counter:
            run(model, x)
        counts.append(counter.get_total_flops())
        accelerate(model)
    assert counts[0] == counts[1]


def test_a_profiler_and_a_default_device_change_nothing():
    model, x = make("2d")
    accelerate(model)
    with torch.profiler.profile(with_flops=True):
        run(model, x)
    assert all(r.fused for r in explain(model))
    with torch.device("cpu"):
        run(model, x)
    assert all(r.fused for r in explain(model))


# torch.jit.trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@kinds
def test_a_trace_holds_pytorchs_operators(kind, grad, training):
    model, x = make(kind)
    expected = run(model, x)
    accelerate(model, backend="cpu")
    run(model, x)
    model.train(training)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x, check_trace=not training)
    assert "res2net_fused::" not in str(traced.inlined_graph)
    if not training:
        assert_close(run(traced, x), expected, 5e-6)
        run(model, x)
        assert all(r.fused for r in explain(model))


def test_a_trace_of_the_operators_themselves():
    weights, rows = [torch.randn(4, 4, 3, 3) for _ in range(3)], [torch.randn(4, 4, 3) for _ in range(3)]
    for call, x in (
        (lambda x: hierarchical_conv2d(x, weights), torch.randn(1, 16, 5, 7)),
        (lambda x: hierarchical_conv1d(x, rows), torch.randn(1, 16, 7)),
    ):
        traced = torch.jit.trace(call, x)
        assert "res2net_fused::" not in str(traced.graph)
        assert_close(traced(x), call(x), 5e-6)


LOAD = """
import sys, torch
model = torch.jit.load(sys.argv[1])
out = model(torch.ones(1, 3, 33, 47))
assert "res2net_fused" not in sys.modules
print(float(out.sum()))
"""


def test_a_trace_loads_without_the_package(tmp_path):
    model = accelerate(official())
    torch.jit.trace(model, IMAGES).save(str(tmp_path / "model.pt"))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(run(model, torch.ones(1, 3, 33, 47)).sum()), rel=1e-4)


# torch.jit.script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["block", "in Sequential", "in ModuleList"])
def test_scripted(what):
    published = timm_or_skip().models.res2net
    layers = dict(act_layer=torch.nn.ReLU, norm_layer=torch.nn.BatchNorm2d)
    block = accelerate(randomize(published.Bottle2neck(32, 8, base_width=26, scale=4, **layers)).eval())

    class Listed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([block, block])

        def forward(self, x):
            for b in self.blocks:
                x = b(x)
            return x

    model = {"block": block, "in Sequential": torch.nn.Sequential(block), "in ModuleList": Listed()}[what]
    x = torch.randn(2, 32, 7, 9)
    file = io.BytesIO()
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, file)
    file.seek(0)
    assert "res2net_fused::" not in str(scripted.inlined_graph)
    assert_close(run(torch.jit.load(file), x), run(model, x), 5e-6)
    assert all(r.fused for r in explain(model)), "scripting leaves the model as it is"
