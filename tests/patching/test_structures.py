"""Blocks found by their structure, whatever their parts are called, and ordinary blocks that must not be taken for such."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, randomize, timm_or_skip
from published_blocks.structures import (
    BLOCKS,
    CodecChain,
    FoldableConv,
    RawNetBlock,
    WithoutNorms,
    YoloBlock,
    YoloBottle2neck,
    unit,
)
from torch import nn

from res2net_fused import accelerate, explain, freeze, restore
from res2net_fused.backends import policy
from res2net_fused.modules.block_state import FusedModule

TAKEN = [name for name, (_, _, taken) in BLOCKS.items() if taken]


@pytest.fixture(autouse=True)
def chains_pay(monkeypatch):
    """What runs where it is faster must be right everywhere."""
    monkeypatch.setattr(policy, "chain_pays_1d", lambda *_: True)


def block_and_input(name):
    make, shape, _ = BLOCKS[name]
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return randomize(make()).double().eval(), x


def results_of(block, x, grad):
    x = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = block(x)
    gradients = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *block.parameters()]) if grad else ()
    return [out, *gradients, *block.buffers()]


@pytest.mark.parametrize("name", TAKEN)
def test_is_taken_over_and_given_back(name):
    block, x = block_and_input(name)
    own, keys = type(block), list(block.state_dict())
    with torch.no_grad():
        expected = block(x)
        accelerate(nn.Sequential(block))
        assert isinstance(block, FusedModule) and isinstance(block, own), explain(block)
        for _ in range(2):
            assert_close(block(x), expected, 1e-11)
        (report,) = explain(block)
        assert report.fused, report
        assert list(block.state_dict()) == keys
        assert_close(pickle.loads(pickle.dumps(block))(x), expected, 1e-11)
        assert_close(freeze(copy.deepcopy(block))(x), expected, 1e-11)
        for parameter in block.parameters():
            parameter.mul_(1.1)
        assert_close(block(x), restore(copy.deepcopy(block))(x), 1e-11)
    restore(block)
    assert type(block) is own


@pytest.mark.parametrize(("training", "grad"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("name", TAKEN)
def test_gradients_and_training(name, training, grad):
    block, x = block_and_input(name)
    block.train(training)
    fused = accelerate(copy.deepcopy(block))
    for ours, own in zip(results_of(fused, x, grad), results_of(block, x, grad), strict=True):
        assert_close(ours, own, 1e-10)
    (report,) = explain(fused)
    assert report.fused or (training and "in training mode" in report.reason), report


def test_another_max_pool_on_the_passed_group_is_left_alone_with_the_reason():
    block, x = block_and_input("max_pool_of_five")
    expected = block(x)
    accelerate(block)
    assert torch.equal(block(x), expected)
    assert "which has a MaxPool2d" in explain(block)[0].reason


@pytest.mark.parametrize("kind", [YoloBlock, YoloBottle2neck])
def test_norms_that_are_folded_after_accelerate(kind):
    block = randomize(kind(unit=FoldableConv)).double().eval()
    _, x = block_and_input("yolo")
    with torch.no_grad():
        expected = block(x)
        accelerate(block)
        for _ in range(3):
            assert_close(block(x), expected, 1e-11)
        block.fuse()
        for _ in range(3):
            assert_close(block(x), expected, 1e-11)
        (report,) = explain(block)
        assert not report.fused
        accelerate(block)
        assert_close(block(x), expected, 1e-11)
        assert explain(block)[0].fused


def test_folded_wrappers_with_another_activation_compiled_and_not():
    block = randomize(YoloBlock(act=nn.SiLU(), unit=FoldableConv)).eval().fuse()
    x = torch.randn(2, 32, 9, 10).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = copy.deepcopy(block).double()(x.double())
        accelerate(block, backend="cpu")
        assert_close(block(x), expected)
        assert explain(block)[0].fused
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected)
        block.m[0].forward = lambda u: u
        own = restore(copy.deepcopy(block))
        assert torch.equal(compiled(x), own(x))


class Switched(FoldableConv):
    gain = 1.0

    def scaled(self, x):
        return self.act(self.conv(x)) * self.gain


@pytest.mark.parametrize("way", ["function", "method_that_reads_more", "another_method_later"])
def test_other_forwards_in_place_of_a_wrappers_own(way):
    """Of those nothing is known, or changes of what they read would not be noticed."""
    block = randomize(YoloBlock(unit=Switched)).double().eval().fuse()
    _, x = block_and_input("yolo")
    step = block.m[1]
    with torch.no_grad():
        if way == "another_method_later":
            accelerate(block)
            assert_close(block(x), restore(copy.deepcopy(block))(x), 1e-11)
        step.forward = (lambda u: 2 * torch.relu(step.conv(u))) if way == "function" else step.scaled
        if way != "another_method_later":
            accelerate(block)
        block(x)
        step.gain = 3.0
        found = block(x)
        assert not explain(block)[0].fused
        assert_close(found, restore(block)(x), 1e-11)


@pytest.mark.parametrize("change", ["hook", "activation", "activation_hook", "removed_norm"])
def test_changes_to_a_wrapper_are_seen(change):
    block, x = block_and_input("yolo")
    accelerate(block)
    calls = []
    with torch.no_grad():
        block(x)
        if change == "hook":
            block.m[1].register_forward_hook(lambda *_: calls.append(1))
        elif change == "activation_hook":
            block.m[2].act.register_forward_hook(lambda *_: calls.append(1))
        elif change == "activation":
            block.m[1].act = nn.Tanh()
        else:
            block.m[1].bn = nn.Identity()
        expected = restore(copy.deepcopy(block))(x)
        calls.clear()
        assert_close(block(x), expected, 1e-11)
    assert len(calls) == int("hook" in change)
    assert explain(block)[0].fused is (change == "removed_norm")


class Halved(YoloBlock):
    def forward(self, x):
        return super().forward(x) / 2


class Backwards(CodecChain):
    def forward(self, hidden_states):
        return super().forward(hidden_states).flip(1)


class TwoInputs(WithoutNorms):
    def forward(self, x, mask):
        return super().forward(x) * mask


class TwiceAdded(RawNetBlock):
    def forward(self, x):
        return super().forward(x) * 1.01


@pytest.mark.parametrize("kind", [Halved, Backwards, TwoInputs, TwiceAdded])
def test_the_structure_alone_proves_nothing(kind):
    block = kind().eval()
    accelerate(block)
    (report,) = explain(block)
    assert type(block) is kind and report.fused is False
    assert ("mask" if kind is TwoInputs else "no known recurrence") in report.reason


class BareChain(nn.Module):
    """The chain alone over images: convolutions, norms and one activation, or wrappers; the last group passes, or the first."""

    def __init__(self, width=6, steps=3, kind="lists", act=None, first=False, stride=1, pool=None):
        super().__init__()
        self.width, self.kind, self.first, self.stride, self.pool = width, kind, first, stride, pool or nn.Identity()
        if kind == "lists":
            self.k = nn.ModuleList(nn.Conv2d(width, width, 3, stride, 1) for _ in range(steps))
            self.n = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(steps))
            self.act = act or nn.ReLU()
        else:
            self.k = nn.ModuleList(FoldableConv(width, width, 3, act=act or True) for _ in range(steps))

    def step(self, i, u):
        return self.act(self.n[i](self.k[i](u))) if self.kind == "lists" else self.k[i](u)

    def forward(self, x):
        pieces, out = list(x.split(self.width, 1)), []
        passed = self.pool(pieces.pop(0 if self.first else -1))
        for i, piece in enumerate(pieces):
            out.append(self.step(i, piece if i == 0 or self.stride > 1 else piece + out[-1]))
        return torch.cat([passed, *out] if self.first else [*out, passed], 1)


BARE = {
    "lists": BareChain,
    "gelu": lambda: BareChain(act=nn.GELU()),
    "wrappers_silu": lambda: BareChain(4, 5, "wrappers", nn.SiLU()),
    "wrappers_first": lambda: BareChain(kind="wrappers", first=True),
    "strided": lambda: BareChain(stride=2, pool=nn.AvgPool2d(3, 2, 1)),
    "unknown_activation": lambda: BareChain(kind="wrappers", act=nn.Tanh()),
}


@pytest.mark.parametrize("name", BARE)
def test_a_chain_over_images_without_a_bottleneck_is_listed_and_left_alone(name):
    block = randomize(BARE[name]()).eval()
    x = torch.randn(2, 24, 7, 10)
    expected = block(x)
    model = accelerate(nn.Sequential(block))
    assert torch.equal(model(x), expected)
    (report,) = explain(model)
    assert report.name == "0" and report.fused is False and "without the 1x1 convolutions" in report.reason


def test_a_chain_inside_a_block_is_not_listed_beside_it():
    block, x = block_and_input("chain_inside")
    assert [report.name for report in explain(accelerate(nn.Sequential(block)))] == ["0"]


# Not Res2Net blocks -----------------------------------------------------------------------------------------------------


class C2f(nn.Module):
    """YOLO's split, whose convolutions come in pairs."""

    class Pair(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.cv1, self.cv2 = unit(c, c, 3), unit(c, c, 3)

        def forward(self, x):
            return x + self.cv2(self.cv1(x))

    def __init__(self, c1=32, c2=32, n=2):
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = unit(c1, 2 * self.c, 1), unit((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(self.Pair(self.c) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Dilated1d(nn.Module):
    """An ordinary stack of equal convolutions along rows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def ordinary(library, name):
    if library == "timm":
        return timm_or_skip().create_model(name)
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.get_model(name, weights=None, **({"init_weights": False} if "ception" in name else {}))


TIMM = ("resnext50_32x4d", "cs3darknet_s", "cspresnet50", "dm_nfnet_f0", "starnet_s1", "dla46_c", "vovnet39a", "hgnetv2_b0",
        "mobilenetv4_conv_small", "inception_v4")  # fmt: skip
TORCHVISION = ("resnet18", "densenet121", "googlenet", "shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_y_400mf")


@pytest.mark.parametrize(
    ("library", "name"), [*(("timm", name) for name in TIMM), *(("torchvision", name) for name in TORCHVISION)]
)
def test_ordinary_networks_are_not_listed(library, name):
    try:
        with torch.device("meta"):
            model = ordinary(library, name)
    except (NotImplementedError, RuntimeError):  # an __init__ that reads its tensors
        model = ordinary(library, name)
    accelerate(model)
    assert explain(model) == [] and not any(isinstance(m, FusedModule) for m in model.modules())


class Stack(nn.Module):
    """An ordinary stack of equal convolutions over images, which would take groups of channels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(unit(8, 8, 3) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("kind", [C2f, Dilated1d, Stack, lambda: C2f.Pair(8)])
def test_ordinary_blocks_are_not_listed(kind):
    assert explain(accelerate(kind())) == []
