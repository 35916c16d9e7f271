"""What `accelerate` takes for a Res2Net block, and what only looks like one."""

import copy

import pytest
import torch
from helpers import assert_close
from official_models import IMAGES, blocks_of, official, run
from official_style import (
    Bottle2neck,
    Res2Net,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from res2net_fused import accelerate, explain, restore
from res2net_fused.modules.fused_forward import FusedForward
from res2net_fused.patching import recognition


class Scaled(Bottle2neck):
    def forward(self, x):
        return super().forward(x) * 1.001


class Shuffled(Bottle2neck):
    """Takes its groups in another order."""

    def pass_through(self, piece):
        return piece.flip(1)


class TrainsOtherwise(Bottle2neck):
    def forward(self, x):
        out = super().forward(x)
        return out * 0.5 if self.training else out


class NeedsMore(Bottle2neck):
    def forward(self, x, mask):
        return super().forward(x) * mask


class Broken(Bottle2neck):
    def forward(self, x):
        raise KeyError("cfg")


class LayerScale(Bottle2neck):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = nn.Parameter(torch.ones(32, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gamma


OTHERS = [Scaled, Shuffled, TrainsOtherwise, NeedsMore, Broken, LayerScale]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_block_that_computes_something_else_is_left_alone(kind):
    model = nn.Sequential(Bottle2neck(32, 8), kind(32, 8)).eval()
    accelerate(model)
    assert type(model[1]) is kind and isinstance(model[0], FusedForward)
    reports = {r.name: r for r in explain(model)}
    assert reports["1"].fused is False
    words = {"NeedsMore": "mask", "Broken": "KeyError"}.get(kind.__name__, "no known recurrence")
    assert words in reports["1"].reason


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "conv1", nn.Conv2d(32, 12, 3, padding=1)),
        lambda b: setattr(b, "conv3", nn.Linear(12, 32)),
        lambda b: b.convs.__setitem__(1, nn.Conv2d(3, 3, 5, padding=2)),
        lambda b: b.convs.__setitem__(1, nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        lambda b: b.convs.__setitem__(0, nn.Conv2d(3, 3, 3, padding=2, dilation=2)),
        lambda b: parametrizations.weight_norm(b.convs[0]),
    ],
    ids=["conv1_3x3", "conv3_linear", "5x5", "reflect", "one_dilated", "weight_norm"],
)
def test_structure_that_is_not_fused_is_left_alone(change):
    block = Bottle2neck(32, 8)
    change(block)
    accelerate(block)
    assert type(block) is Bottle2neck
    (report,) = explain(block)
    assert report.fused is False and "conv" in report.reason


class Configurable(Bottle2neck):
    """Its result depends on an attribute that is neither a number nor a module."""

    def __init__(self, *args, last=torch.relu, options=(1.0,), **kwargs):
        super().__init__(*args, **kwargs)
        self.last = last
        self.options = options

    def forward(self, x):
        return self.last(super().forward(x)) * self.options[0]


OTHER_SETTINGS = {"function": {"last": torch.tanh}, "tuple": {"options": (2.0,)}, "list": {"options": [2.0]}}


@pytest.mark.parametrize("settings", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_blocks_of_one_class_with_other_settings_are_confirmed_apart(settings):
    plain, other = Configurable(32, 8).eval(), Configurable(32, 8, **settings).eval()
    x = torch.randn(2, 32, 5, 5)
    expected = run(other, x)
    accelerate(nn.Sequential(plain, other))
    assert isinstance(plain, FusedForward)
    assert type(other) is Configurable
    assert torch.equal(run(other, x), expected)


def test_confirmation_runs_once_per_configuration(monkeypatch):
    confirmed = []
    confirm = recognition._confirm
    monkeypatch.setattr(recognition, "_confirmed", {})
    monkeypatch.setattr(recognition, "_confirm", lambda *block: confirmed.append(block) or confirm(*block))
    accelerate(Res2Net(layers=(3, 3, 1)))
    assert len(confirmed) == 5  # three stage blocks of their own sizes, and a normal one for layer1 and for layer2
    accelerate(Res2Net(layers=(1, 2, 1)))
    assert len(confirmed) == 5


def test_recognition_leaves_the_model_and_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = official().train()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    accelerate(model)
    assert torch.equal(torch.rand(3), expected)
    assert seeded == [99, 99], "the GPUs' generators were seeded, and are not given back"
    assert all(m.training for m in model.modules())
    for (name, a), b in zip(model.state_dict().items(), state.values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("how", ["device", "inference", "no_grad", "autocast", "float64"])
def test_recognition_does_not_depend_on_the_callers_modes(how, monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    block = Bottle2neck(32, 8)
    contexts = {
        "device": torch.device("meta"),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    if how == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        with contexts.get(how, torch.enable_grad()):
            accelerate(block)
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(block, FusedForward), explain(block)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = Res2Net()
    accelerate(model)
    assert all(isinstance(b, FusedForward) for b in blocks_of(model).values())
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(official().state_dict(), assign=True)
    assert_close(run(model.eval(), IMAGES), run(official(), IMAGES), 5e-6)


def test_other_models_are_not_touched():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert accelerate(model) is model
    assert explain(model) == [] and "0 of 0" in str(explain(model))


def test_bad_arguments():
    with pytest.raises(TypeError, match="model is a Tensor; an nn.Module"):
        accelerate(torch.zeros(1))
    with pytest.raises(ValueError, match="backend is 'tpu'; allowed are 'auto', 'reference'"):
        accelerate(Res2Net(), backend="tpu")


def test_backend_is_used_and_can_be_changed():
    model = accelerate(official(), backend="triton")
    with torch.no_grad(), pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        model.double()(IMAGES.double())
    accelerate(model, backend="reference")
    run(model, IMAGES.double())
    assert {r.backend for r in explain(model)} == {"reference"}


def test_restore_forgets_refusals():
    block = Scaled(32, 8)
    attributes = sorted(vars(block))
    restore(accelerate(block))
    assert sorted(vars(block)) == attributes


class Failing(Bottle2neck):
    """Fails as long as `error` is set."""

    error = None

    def forward(self, x):
        if Failing.error is not None:
            raise Failing.error
        return super().forward(x)


TRANSIENT = {
    "memory": MemoryError(),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "other": OSError("a file of weights is not there yet"),
}


@pytest.mark.parametrize("error", TRANSIENT.values(), ids=TRANSIENT)
def test_a_failure_is_not_remembered(error, monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    monkeypatch.setattr(Failing, "error", error)
    block = accelerate(Failing(32, 8))
    assert type(block) is Failing and "could not be tried" in explain(block)[0].reason
    monkeypatch.setattr(Failing, "error", None)
    assert isinstance(accelerate(block), FusedForward)
    assert isinstance(accelerate(Failing(32, 8)), FusedForward)


def test_memory_that_lacks_while_ours_is_tried_is_no_disagreement(monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    with monkeypatch.context() as patch:
        patch.setattr(recognition, "bottle2neck", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert type(accelerate(Bottle2neck(32, 8))) is Bottle2neck
    assert isinstance(accelerate(Bottle2neck(32, 8)), FusedForward)


class Watching(TorchDispatchMode):
    """Sees each operator, and breaks what float64 needs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called under the mode")


def test_a_model_made_under_fake_tensors_and_then_a_real_one(monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    with FakeTensorMode():
        inside = accelerate(Bottle2neck(32, 8))
        outside = Bottle2neck(32, 8)
    accelerate(outside)
    for block in (inside, outside, accelerate(Bottle2neck(32, 8))):
        assert isinstance(block, FusedForward), explain(block)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert inside.eval()(torch.randn(2, 32, 5, 7)).shape == (2, 32, 5, 7)


def test_recognition_under_a_mode_that_watches(monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    block = Bottle2neck(32, 8)
    with Watching():
        accelerate(block)
    assert isinstance(block, FusedForward), explain(block)


def test_what_is_tried_in_a_trace_is_tried_again(monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    block = Bottle2neck(32, 8).eval()
    torch.jit.trace(lambda x: accelerate(block) and x + 1, torch.ones(1), check_trace=False)
    assert recognition._confirmed == {}
    assert isinstance(accelerate(Bottle2neck(32, 8)), FusedForward)
