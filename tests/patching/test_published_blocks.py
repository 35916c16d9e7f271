"""`accelerate` on every published kind of block: what it is taken for, its results and gradients, and what is left alone."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, randomize, relative_error, timm_or_skip
from official_style import Bottle2neck
from published_blocks.classifiers import (
    AntiSpoofingBlock,
    CifarBlock,
    DlaBlock,
    PaddleBlock,
    Res2NextBlock,
    V1bBlock,
    projection,
)
from published_blocks.detectors import DeformableConv, Detectron2Block, FrozenBatchNorm2d, MaskRCNNBlock, MMDetectionBlock
from published_blocks.speakers import BasicBlockRes2Net, ERes2NetBlock, FusedERes2NetBlock, GatedBlock
from torch import nn

from res2net_fused import accelerate, explain, freeze, restore
from res2net_fused.backends import policy
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.fused_forward import FusedForward


@pytest.fixture(autouse=True)
def clamped_chains_pay(monkeypatch):
    """What runs where it is faster must be right everywhere."""
    own = policy.clamped_chain_pays
    monkeypatch.setattr(policy, "clamped_chain_pays", lambda problem: True)
    return own


ADDS, STAGE = ("adds", "last", None), ("stage", "last", "avg3")  # adds or not, the group that passes, its pool

BLOCKS = {
    # name: (a block, channels of x, what it must be taken for)
    "official": (lambda: Bottle2neck(32, 8), 32, ADDS),
    "official_stage": (lambda: Bottle2neck(24, 8, 1, projection(24, 32, 1), stype="stage"), 24, STAGE),
    "official_strided": (lambda: Bottle2neck(24, 8, 2, projection(24, 32, 2), stype="stage"), 24, STAGE),
    "v1b": (lambda: V1bBlock(32, 8, 1, False), 32, ADDS),
    "v1b_strided": (lambda: V1bBlock(24, 8, 2, True), 24, STAGE),
    "res2next": (lambda: Res2NextBlock(64, 16), 64, ADDS),
    "res2next_strided": (lambda: Res2NextBlock(24, 16, 2, projection(24, 64, 2), stype="stage"), 24, STAGE),
    "dla": (lambda: DlaBlock(32, 32), 32, ADDS),
    "dla_next": (lambda: DlaBlock(32, 32, groups=8), 32, ADDS),
    "dla_dilated": (lambda: DlaBlock(32, 32, dilation=2), 32, ADDS),
    "mmdetection": (lambda: MMDetectionBlock(32, 8), 32, ADDS),
    "mmdetection_layer1.0": (lambda: MMDetectionBlock(24, 8, first=True), 24, ("stage", "last", None)),
    "mmdetection_strided": (lambda: MMDetectionBlock(24, 8, 2, True), 24, STAGE),
    "mmpretrain_layer1.0": (lambda: MMDetectionBlock(24, 8, first=True, pools_always=True), 24, STAGE),
    "paddle": (lambda: PaddleBlock(32, 8), 32, ADDS),
    "paddle_layer1.0": (lambda: PaddleBlock(24, 8, 1, False), 24, ADDS),
    "paddle_strided": (lambda: PaddleBlock(24, 8, 2, False), 24, ("stage", "last", "avg3_nopad")),
    "detectron2": (lambda: Detectron2Block(32, 8, norm=lambda c: FrozenBatchNorm2d(c, 1e-5)), 32, ADDS),
    "detectron2_learned": (lambda: Detectron2Block(32, 8, norm=nn.BatchNorm2d), 32, ADDS),
    "detectron2_first": (lambda: Detectron2Block(24, 8), 24, ("stage", "last", None)),
    "detectron2_strided": (lambda: Detectron2Block(24, 8, 2), 24, ("stage", "last", None)),
    "detectron2_3x3": (lambda: Detectron2Block(24, 8, 2, stride_in_1x1=False), 24, STAGE),
    "maskrcnn": (lambda: MaskRCNNBlock(32, 8), 32, ADDS),
    "maskrcnn_strided": (lambda: MaskRCNNBlock(24, 8, 2, True), 24, STAGE),
    "cifar": (lambda: CifarBlock(32, 8), 32, ("adds", "first", None)),
    "cifar_strided": (lambda: CifarBlock(24, 8, projection(24, 32, 2), 2, se=False), 24, ("adds", "first", None)),
    "anti_spoofing": (lambda: AntiSpoofingBlock(32, 16, 1, False), 32, ADDS),
    "anti_spoofing_strided": (lambda: AntiSpoofingBlock(24, 16, 2, True), 24, STAGE),
    "anti_spoofing_plain": (lambda: AntiSpoofingBlock(24, 16, 1, True, gated=False), 24, STAGE),
    "wespeaker": (lambda: BasicBlockRes2Net(32, 16, scale=4), 32, ADDS),
    "wespeaker_strided": (lambda: BasicBlockRes2Net(24, 16, 2), 24, ADDS),
    "eres2net": (lambda: ERes2NetBlock(32, 16), 32, ("adds", "none", None)),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


def block_and_input(name, dtype=torch.float64, seed=0):
    make, channels, _ = BLOCKS[name]
    generator = torch.Generator().manual_seed(5)
    x = 20 * torch.randn(2, channels, 7, 10, generator=generator, dtype=torch.float64)  # beyond Hardtanh's bounds too
    return randomize(make(), seed).to(dtype), x.to(dtype)


def results_of(block, x, *, grad):
    """Output, gradients of x and of all parameters, buffers after the call."""
    x = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = block(x)
    if not grad:
        return [out]
    gradients = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *block.parameters()])
    return [out, *gradients, *(b.double() for b in block.buffers())]


@blocks
def test_is_taken_for_what_it_is(name):
    block, x = block_and_input(name)
    original = type(block)
    keys = list(block.state_dict())
    accelerate(block)
    (report,) = explain(block)
    assert isinstance(block, FusedForward) and isinstance(block, original), report
    config = getattr(block, STATE).config
    assert ("adds" if config.hierarchical else "stage", config.passthrough, config.pool) == BLOCKS[name][2]
    assert list(block.state_dict()) == keys
    restore(block)
    assert type(block) is original


@pytest.mark.parametrize(("training", "grad"), [(False, False), (False, True), (True, True), (True, False)])
@blocks
def test_results_and_gradients_stay(name, training, grad):
    block, x = block_and_input(name)
    block.train(training)
    fused = accelerate(copy.deepcopy(block))
    expected, got = results_of(block, x, grad=grad), results_of(fused, x, grad=grad)
    (report,) = explain(fused)
    assert report.fused, report
    for ours, own in zip(got, expected, strict=True):
        assert_close(ours, own, 1e-10)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@blocks
def test_eval_in_float32_on_the_default_backend(name, channels_last, frozen):
    block, x = block_and_input(name)
    with torch.no_grad():
        exact = block.eval()(x)
        block.float()
        x = x.float().contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        eager = relative_error(block(x), exact)
        accelerate(block)
        if frozen:
            freeze(block)
        for _ in range(2):  # folded, then kept
            out = block(x)
            assert_close(out, exact, max(5e-6, 4 * eager))
            assert out.is_contiguous(memory_format=torch.channels_last), "which the weights of 1x1 convolutions hand on"
    (report,) = explain(block)
    assert report.fused, report


@blocks
def test_copies_compile_and_new_weights(name):
    block, x = block_and_input(name)
    accelerate(block.eval())
    with torch.no_grad():
        expected = block(x)
        twin = pickle.loads(pickle.dumps(block))
        assert torch.equal(twin(x), expected)
        if name in ("detectron2_strided", "wespeaker_strided", "paddle", "cifar_strided"):
            compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
            assert_close(compiled(x), expected, 1e-11)
        other, _ = block_and_input(name, seed=3)
        block.load_state_dict(other.state_dict())
        assert_close(block(x), other.eval()(x), 1e-11)
        for tensor in [*block.parameters(), *block.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.1)
        assert_close(block(x), restore(copy.deepcopy(block))(x), 1e-11)


# Blocks that are handed their shortcut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("keyword", [False, True], ids=["by_place", "by_name"])
@pytest.mark.parametrize("stride", [1, 2])
def test_dla_with_its_shortcut(stride, keyword, training):
    block = randomize(DlaBlock(24, 32, stride)).double().train(training)
    fused = accelerate(copy.deepcopy(block))
    x, shortcut = torch.randn(2, 24, 8, 9).double(), torch.randn(2, 32, 8 // stride, (9 - 1) // stride + 1).double()
    shortcut.requires_grad_()
    results = []
    for module in (block, fused):
        out = module(x, residual=shortcut) if keyword else module(x, shortcut)
        results.append([out, *torch.autograd.grad(out.square().sum(), [shortcut, *module.parameters()])])
        with torch.no_grad():
            results[-1].append(module(x, shortcut))
    (report,) = explain(fused)
    assert report.fused, report
    for own, ours in zip(*results, strict=True):
        assert_close(ours, own, 1e-10)


def test_a_given_shortcut_that_is_not_simply_added_is_not_fused():
    class Scaled(DlaBlock):
        def forward(self, x, residual=None):
            return super().forward(x, None if residual is None else 2 * residual)

    block = accelerate(Scaled(32, 32).eval())
    x = torch.randn(1, 32, 5, 5)
    with torch.no_grad():
        block(x)
        assert explain(block)[0].fused
        out = block(x, x)
        assert explain(block)[0].fused is False
        assert_close(out, restore(block)(x, x), 1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["dla60_res2net", "dla60_res2next"])
def test_the_dla_of_timm(kind, training):
    channels = (8, 16, 64, 64, 128, 128)
    model = timm_or_skip().create_model(kind, levels=(1, 1, 1, 2, 1, 1), channels=channels, num_classes=5)
    model = randomize(model).double().train(training)
    fused = accelerate(copy.deepcopy(model))
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for ours, own in zip(results_of(fused, x, grad=True), results_of(model, x, grad=True), strict=True):
        assert_close(ours, own, 1e-8)
    reports = explain(fused)
    assert len(reports) == sum(hasattr(m, "convs") for m in model.modules()) > 4
    assert all(r.fused for r in reports), reports


# Hooks, checkpointing, other norms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [("detectron2", "conv1.norm"), ("detectron2", "conv3"), ("paddle", "branch2a"), ("paddle", "branch2b.1.norm"),
     ("cifar", "bn2.0"), ("wespeaker", "relu")],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_hooks_on_parts_fire_as_often_as_before(name, where, training):
    counts = []
    for fuse in (False, True):
        block, x = block_and_input(name)
        block.train(training)
        if fuse:
            accelerate(block)
        calls = []
        block.get_submodule(where).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        block(x)
        counts.append(len(calls))
    assert counts[0] == counts[1] >= 1


def test_checkpointing_stays_the_blocks_own():
    block = accelerate(MMDetectionBlock(32, 8, with_cp=True).train())
    block(torch.randn(2, 32, 7, 7, requires_grad=True)).sum().backward()
    assert "with_cp" in explain(block)[0].reason
    with torch.no_grad():
        block.eval()(torch.randn(2, 32, 7, 7))
    assert explain(block)[0].fused


def test_frozen_norms_train_the_convolutions_fused():
    block, x = block_and_input("maskrcnn")
    twin = accelerate(copy.deepcopy(block)).train()
    for ours, own in zip(results_of(twin, x, grad=True), results_of(block.train(), x, grad=True), strict=True):
        assert_close(ours, own, 1e-10)
    assert explain(twin)[0].fused


def test_a_frozen_norm_with_arithmetic_of_its_own():
    class Shifted(FrozenBatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 0.25

    block = randomize(MaskRCNNBlock(32, 8, norm=Shifted)).eval()
    twin, x = accelerate(copy.deepcopy(block)), torch.randn(2, 32, 7, 8)
    assert torch.equal(twin(x), block(x)) and explain(twin)[0].reason == "norm layer Shifted cannot be folded"


def test_a_convolution_with_arithmetic_of_its_own():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, None, self.stride, self.padding)

    block = Bottle2neck(32, 8)
    block.convs[1] = Standardized(3, 3, 3, padding=1, bias=False)
    accelerate(block)
    assert type(block) is Bottle2neck and "convs[1] (Standardized" in explain(block)[0].reason


def test_clamped_activations_are_fused_by_themselves_in_channels_last(clamped_chains_pay, monkeypatch):
    monkeypatch.setattr(policy, "clamped_chain_pays", clamped_chains_pay)
    block, keep = BasicBlockRes2Net(32, 16).eval(), torch.preserve_format
    x = torch.randn(2, 32, 9, 9)
    for layout, backend, fused in (
        (torch.contiguous_format, "auto", False), (torch.channels_last, "auto", True), (torch.contiguous_format, "cpu", True)
    ):  # fmt: skip
        accelerate(block, backend=backend, memory_format=keep)
        with torch.no_grad():
            block(x.contiguous(memory_format=layout))
        (report,) = explain(block)
        assert report.fused is fused and (fused or "channels-last only" in report.reason)


# Left alone -------------------------------------------------------------------------------------------------------------


def deformable():
    block = MMDetectionBlock(32, 8)
    block.convs[1] = DeformableConv(block.width)
    return block


LEFT_ALONE = {
    "eres2net_attention": (lambda: FusedERes2NetBlock(32, 16, scale=4), "fuse_models (AttentionFusion)"),
    "gated": (lambda: GatedBlock(32, 16, scale=4), "gates (Linear)"),
    "deformable": (deformable, "DeformableConv"),
    "plugin": (lambda: MMDetectionBlock(32, 8, plugin=nn.Conv2d(32, 32, 1)), "after_conv3_plugin (Conv2d)"),
    "pool_that_grows": (lambda: MaskRCNNBlock(24, 8, 1, True, dilation=2), "forward could not be tried"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_is_recognised_and_left_alone_with_the_reason(name):
    make, reason = LEFT_ALONE[name]
    block = make().eval()
    own = type(block)
    accelerate(block)
    (report,) = explain(block)
    assert type(block) is own and report.fused is False
    assert reason in report.reason


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_group_norm_runs_the_blocks_own_forward(training):
    block, x = MMDetectionBlock(32, 8, norm="gn").train(training), torch.randn(2, 32, 7, 7)
    expected = block(x)
    accelerate(block)
    assert_close(block(x), expected, 1e-6)
    assert "GroupNorm" in explain(block)[0].reason
