"""`freeze`: weights that stay as they were until `refresh`, and what thaws them."""

import copy

import pytest
import torch
from helpers import assert_close, randomize
from kept_weights import X, assert_current, fused, kept_tensors, make, own_forward
from torch import nn

from res2net_fused import Bottle2neck, freeze, refresh
from res2net_fused.modules.block_state import STATE


def test_freeze_fixes_the_weights_until_refresh(folds):
    block = make()
    assert freeze(block) is block
    frozen = fused(block)
    with torch.no_grad():
        block.conv1.weight.mul_(2)
    before = len(folds)
    assert torch.equal(fused(block), frozen)
    assert len(folds) == before
    refresh(block)
    assert_current(block)


@pytest.mark.parametrize(
    "thaw",
    [
        lambda b: b.train().eval(),
        lambda b: b.to(torch.float32).double(),
        lambda b: b.load_state_dict(randomize(copy.deepcopy(b), seed=9).state_dict()),
    ],
    ids=["train", "to", "load_state_dict"],
)
def test_what_thaws(thaw):
    block = freeze(make())
    fused(block)
    with torch.no_grad():
        block.conv1.weight.mul_(2)
    thaw(block)
    assert_current(block)


def test_eval_keeps_a_frozen_block_frozen(folds):
    block = freeze(make())
    before = len(folds)
    block.eval()
    fused(block)
    assert len(folds) == before


def test_frozen_weights_are_the_same_in_every_dtype(folds):
    block, x = make().float(), X.float()

    def in_half():
        with torch.autocast("cpu", torch.bfloat16):
            return fused(block, x)

    expected = in_half(), fused(block, x)
    freeze(block)
    with torch.no_grad():
        block.conv1.weight.mul_(2)
    del folds[:]
    for _ in range(2):
        assert all(map(torch.equal, (in_half(), fused(block, x)), expected))
        held = dict(getattr(block, STATE).frozen.held)
        assert not folds and {dtype for dtype, _ in held} == {torch.float32, torch.bfloat16}
    in_half()
    assert getattr(block, STATE).frozen.held == held  # nothing is made again
    refresh(block)
    assert not torch.equal(in_half(), expected[0])


def test_freeze_makes_what_the_next_call_needs():
    block = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        freeze(block)
        held = dict(getattr(block, STATE).frozen.held)
        fused(block, X.float())
    assert list(held) == [(torch.bfloat16, torch.device("cpu"))] and getattr(block, STATE).frozen.held == held


def test_freeze_without_values():
    """A model is planned before it has weights."""
    with torch.device("meta"):
        block = Bottle2neck(32, 8).eval()
        assert freeze(block)(torch.empty(2, 32, 5, 6)).shape == (2, 32, 5, 6)


def test_frozen_blocks_still_have_gradients():
    block = freeze(make())
    block(X).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_freeze_of_a_training_block_raises_and_changes_nothing():
    model = nn.Sequential(make(), make())
    model[1].bns[0].train()
    with pytest.raises(RuntimeError, match="block '1'.*training mode.*eval"):
        freeze(model)
    assert not kept_tensors(model[0])


@pytest.mark.parametrize(
    "norm", [lambda c: nn.GroupNorm(1, c), lambda c: nn.BatchNorm2d(c, track_running_stats=False)], ids=["gn", "no_stats"]
)
def test_freeze_leaves_blocks_alone_that_cannot_be_folded(norm):
    model = nn.Sequential(make(), make(norm_layer=norm))
    expected = own_forward(model[1], fused(model[0]))
    freeze(model)
    assert kept_tensors(model[0]) and not kept_tensors(model[1])
    assert_close(fused(model), expected, 1e-12)
