"""The shortcut's 1x1 convolution, folded with its BatchNorm and made part of the block; and when it runs as it is."""

import pytest
import torch
from helpers import SqueezeExcite, assert_close, randomize, runnable_backends
from torch import nn

from res2net_fused import Bottle2neck, freeze
from res2net_fused.modules.block_parts import parts_of
from res2net_fused.modules.folding import projection_of
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

X = torch.randn(2, 24, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def shortcut(stride=1, pool=None, norm=nn.BatchNorm2d, **conv):
    layers = [nn.Conv2d(24, 32, **({"kernel_size": 1, "stride": stride, "bias": False} | conv)), norm(32)]
    return nn.Sequential(*([pool] if pool is not None else []), *layers)


def make(downsample, stride=1, dtype=torch.float64, **keywords):
    block = Bottle2neck(24, 8, stride=stride, stype="stage", downsample=downsample, **keywords)
    return randomize(block).to(dtype).eval()


def expected(block, x=X):
    with torch.no_grad():
        return ReferenceBottle2neck.forward(block, x)


def fused(block, x=X):
    with torch.no_grad():
        return block(x)


FOLDED = {
    "plain": lambda: make(shortcut()),
    "strided": lambda: make(shortcut(2), 2),
    "bias": lambda: make(shortcut(bias=True)),
    "pooled": lambda: make(shortcut(pool=nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)), 2),
    "identity pool": lambda: make(shortcut(pool=nn.Identity())),
}
UNFOLDED = {
    "3x3": lambda: make(shortcut(kernel_size=3, padding=1)),
    "groups": lambda: make(shortcut(groups=2)),
    "no norm": lambda: make(nn.Sequential(nn.Conv2d(24, 32, 1))),
    "another norm": lambda: make(shortcut(norm=lambda c: nn.GroupNorm(4, c))),
    "activation behind it": lambda: make(nn.Sequential(*shortcut(), nn.ReLU())),
    "not a Sequential": lambda: make(nn.Conv2d(24, 32, 1)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_is_folded(name):
    block = FOLDED[name]()
    assert projection_of(parts_of(block)) is not None
    assert_close(fused(block), expected(block), 1e-12)
    freeze(block)
    assert_close(fused(block), expected(block), 1e-12)


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("backend", runnable_backends("cpu"))
def test_on_every_backend(name, backend, monkeypatch):
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", backend)
    block = FOLDED[name]()
    exact = expected(block)
    block, x = block.float(), X.float()
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_close(fused(block, x.contiguous(memory_format=layout)), exact)


@pytest.mark.parametrize("name", UNFOLDED)
def test_runs_as_it_is(name):
    block = UNFOLDED[name]()
    assert projection_of(parts_of(block)) is None
    assert_close(fused(block), expected(block), 1e-12)


@pytest.mark.parametrize("name", ["se", "drop_path"])
def test_is_left_alone_where_something_comes_before_the_addition(name):
    block = make(shortcut())
    fused(block)
    module = randomize(SqueezeExcite(32, dtype=torch.float64)) if name == "se" else nn.Dropout()
    setattr(block, name, module.eval())
    assert projection_of(parts_of(block)) is None
    assert_close(fused(block), expected(block), 1e-12)


CHANGES = {
    "weight": lambda d: d[0].weight.add_(0.5),
    "norm's weight": lambda d: d[1].weight.mul_(3),
    "running statistics": lambda d: d[1].running_mean.add_(1),
    "eps": lambda d: setattr(d[1], "eps", 0.3),
    "another convolution": lambda d: d.__setitem__(0, randomize(nn.Conv2d(24, 32, 1).double(), 9)),
    "another norm": lambda d: d.__setitem__(1, nn.Identity()),
    "training norm": lambda d: d[1].train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change):
    block = make(shortcut())
    before = fused(block)
    with torch.no_grad():
        CHANGES[change](block.downsample)
    after = fused(block)
    assert (after - before).norm() > 1e-3 * before.norm()
    assert_close(after, expected(block), 1e-12)


def test_another_shortcut_shows():
    block = make(shortcut())
    fused(block)
    block.downsample = randomize(shortcut(), 7).double().eval()
    assert_close(fused(block), expected(block), 1e-12)


@pytest.mark.parametrize("where", ["", "0", "1"])
@pytest.mark.parametrize("frozen", [False, True])
def test_hooks_see_their_calls(where, frozen):
    block = make(shortcut())
    fused(block)
    if frozen:
        freeze(block)
    calls = []
    handle = block.downsample.get_submodule(where).register_forward_hook(lambda *args: calls.append(1))
    assert_close(fused(block), expected(block), 1e-12)
    assert len(calls) == 2  # the fused block's and the reference's
    handle.remove()
    assert_close(fused(block), expected(block), 1e-12)


def test_gradients_run_through_the_shortcuts_own_modules():
    block = make(shortcut())
    fused(block)
    block(X).sum().backward()
    ours = [p.grad.clone() for p in block.downsample.parameters()]
    block.zero_grad()
    ReferenceBottle2neck.forward(block, X).sum().backward()
    for mine, reference in zip(ours, block.downsample.parameters(), strict=True):
        assert_close(mine, reference.grad, 1e-12)


def test_compiles():
    torch.compiler.reset()  # graphs of other tests count towards the limit of recompilations
    block = make(shortcut(2), 2)
    exact = expected(block)
    with torch.no_grad():
        assert_close(torch.compile(block, fullgraph=True)(X), exact, 1e-12)
