"""Blocks that are called with their shortcut, as DLA calls them."""

import copy

import pytest
import torch
from helpers import BOUNDS, assert_close, import_timm, randomize, runnable_backends
from torch import nn

from res2net_fused import explain, freeze
from res2net_fused.models.layers import SqueezeExcite
from res2net_fused.modules.block_parts import parts_of
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.bottle2neck import DlaBottle2neck
from res2net_fused.modules.folding import fold_block
from res2net_fused.modules.reference_blocks import ReferenceDlaBottle2neck
from res2net_fused.ops.bottle2neck import fused_bottle2neck

KINDS = {
    "normal": {},
    "strided": {"stride": 2},
    "next": {"cardinality": 2, "base_width": 16},
    "dilated": {"dilation": 2},
    "dilated stage": {"dilation": 2, "stage": True},
    "one group": {"scale": 1, "base_width": 64},
    "attention": {"attn_layer": SqueezeExcite},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, dtype=torch.float64):
    """The fused block in eval mode, plain PyTorch's of the same weights, x and a shortcut."""
    block = randomize(DlaBottle2neck(24, 32, **KINDS[kind])).to(dtype).eval()
    plain = ReferenceDlaBottle2neck(24, 32, **KINDS[kind]).to(dtype).eval()
    plain.load_state_dict(block.state_dict())
    stride = KINDS[kind].get("stride", 1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 24, 9, 7, generator=generator, dtype=torch.float64).to(dtype)
    shortcut = torch.randn(2, 32, -(-9 // stride), -(-7 // stride), generator=generator, dtype=torch.float64).to(dtype)
    return block, plain, x, shortcut


def fused(block):
    (report,) = explain(block)
    return report.fused, report.reason


@kinds
def test_eval(kind):
    block, plain, x, shortcut = make(kind)
    with torch.no_grad():
        expected = plain(x, shortcut)
        calls = [lambda: block(x, shortcut), lambda: block(x, shortcut=shortcut), lambda: block(x, shortcut, None)]
        for call in calls:
            assert_close(call(), expected, 1e-12)
            assert fused(block)[0]
        freeze(block)
        assert_close(block(x, shortcut), expected, 1e-12)
        assert_close(block(x, shortcut + 1), plain(x, shortcut + 1), 1e-12)
    assert shortcut.equal(make(kind)[3]), "the caller's tensor stays as it was"


@kinds
@pytest.mark.parametrize("backend", runnable_backends("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_every_backend(kind, backend, dtype, monkeypatch, poisoned_memory):
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", backend)
    block, plain, x, shortcut = make(kind, dtype)
    with torch.no_grad():
        expected = plain.double()(x.double(), shortcut.double())
        for layout in (torch.contiguous_format, torch.channels_last):
            out = block(x.contiguous(memory_format=layout), shortcut.contiguous(memory_format=layout))
            assert_close(out, expected, BOUNDS[dtype])
        wide = torch.empty(2, 40, *shortcut.shape[2:], dtype=dtype).fill_(7)  # a slice of a wider tensor
        wide[:, 4:36] = shortcut
        assert_close(block(x, wide[:, 4:36]), expected, BOUNDS[dtype])
    assert fused(block)[0]


@kinds
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients(kind, training):
    block, plain, x, shortcut = make(kind)
    block.train(training), plain.train(training)
    inputs = [x.requires_grad_(), shortcut.requires_grad_()]
    got = torch.autograd.grad(block(*inputs).square().sum(), [*inputs, *block.parameters()])
    expected = torch.autograd.grad(plain(*inputs).square().sum(), [*inputs, *plain.parameters()])
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-10)
    for a, b in zip(block.buffers(), plain.buffers(), strict=True):
        assert_close(a, b, 1e-14)
    assert fused(block)[0]


def test_gradients_of_the_shortcut_alone():
    block, plain, x, shortcut = make("normal")
    block.requires_grad_(False), plain.requires_grad_(False)
    shortcut.requires_grad_()
    got, expected = (torch.autograd.grad(m(x, shortcut).square().sum(), shortcut)[0] for m in (block, plain))
    assert_close(got, expected, 1e-12)


def test_x_is_the_shortcut_where_none_is_given():
    block = randomize(DlaBottle2neck(32, 32).double()).eval()
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_close(block(x), ReferenceDlaBottle2neck.forward(block, x), 1e-12)
        assert_close(block(x, None), block(x, x), 1e-12)


def test_copies_know_their_shortcut():
    block, plain, x, shortcut = make("normal")
    twin = copy.deepcopy(block)
    assert getattr(twin, STATE).shortcut == "shortcut"
    with torch.no_grad():
        assert_close(twin(x, shortcut), plain(x, shortcut), 1e-12)
    assert fused(twin)[0]


OTHER_CALLS = {
    "children": (lambda block, x, s: block(x, s, [x]), "called with more than x and shortcut"),
    "number": (lambda block, x, s: block(x, 0.5), "shortcut is a float"),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_calls_run_the_blocks_own_forward(name):
    call, reason = OTHER_CALLS[name]
    block, plain, x, shortcut = make("normal")
    with torch.no_grad():
        assert_close(call(block, x, shortcut), call(plain, x, shortcut), 1e-12)
    assert fused(block) == (False, fused(block)[1]) and reason in fused(block)[1]


def test_a_shortcut_beside_a_downsample_runs_the_blocks_own_forward():
    block, plain, x, shortcut = make("normal")
    block.downsample = nn.Conv2d(24, 32, 1).double()
    with torch.no_grad():
        assert_close(block(x, shortcut), plain(x, shortcut), 1e-12)
    assert "downsample" in fused(block)[1]


def test_given_twice_is_the_callers_error():
    block, _, x, shortcut = make("normal")
    with pytest.raises(TypeError, match="multiple values for argument 'shortcut'"):
        block(x, shortcut, shortcut=shortcut)


@pytest.mark.parametrize("size", [(1, 32, 9, 7), (2, 1, 9, 7), (2, 32, 1, 1), (32, 1, 7)], ids=str)
def test_a_shortcut_that_the_block_broadcasts(size):
    block, plain, x, _ = make("normal", torch.float32)
    with torch.no_grad():
        for shortcut in (torch.randn(size), torch.randn(size)):
            assert_close(block(x, shortcut), plain(x, shortcut), 5e-6)
    assert fused(block)[0]


@pytest.mark.parametrize("backend", runnable_backends("cpu"))
def test_the_operator_says_which_shortcut_it_needs(backend):
    block, _, x, shortcut = make("normal", torch.float32)
    folded = fold_block(parts_of(block), torch.float32)
    for wrong in (shortcut[:1], shortcut[:, :, 1:], shortcut[:, :1], shortcut[0]):
        with pytest.raises(ValueError, match=r"shortcut is \(.*\(2, 32, 9, 7\) is needed"):
            fused_bottle2neck(x, wrong, folded, True, getattr(block, STATE).config, backend)


def test_a_shortcut_of_another_size_is_an_error():
    block, _, x, shortcut = make("normal", torch.float32)
    with torch.no_grad(), pytest.raises(RuntimeError):
        block(x, shortcut[:, :, 1:])


def test_autocast():
    block, plain, x, shortcut = make("strided", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = block(x, shortcut)
    assert fused(block)[0]
    with torch.no_grad():
        assert_close(out, plain.double()(x.double(), shortcut.double()), BOUNDS[torch.bfloat16])


def test_in_timms_dla():
    if import_timm() is None:
        pytest.skip("timm is not installed")
    from timm.models.dla import DLA
    from timm.models.dla import DlaBottle2neck as Theirs

    shape = {"levels": (1, 1, 1, 2, 1, 1), "channels": (4, 8, 32, 32, 64, 64), "cardinality": 1, "base_width": 28}
    theirs = randomize(DLA(**shape, block=Theirs, num_classes=5).double()).eval()
    ours = DLA(**shape, block=DlaBottle2neck, num_classes=5).double().eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours(images), theirs(images), 1e-10)
    assert len(explain(ours)) == 10 and all(report.fused for report in explain(ours))
    with pytest.raises(ValueError, match="device is 'meta'; only None"):
        DlaBottle2neck(8, 8, device="meta")
