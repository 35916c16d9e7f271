"""Writes that PyTorch does not see: noticed at the next call on CPUs, by `explain` where samples miss them."""

import copy

import pytest
import torch
from helpers import assert_close, randomize
from kept_weights import X, assert_current, fused, make
from published_blocks.speakers1d import SpeechBrainChain
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain, freeze, refresh, restore
from res2net_fused._native import library
from res2net_fused.backends.cpu.settings import operators
from res2net_fused.patching.explain import OUTDATED

pytestmark = pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason)


def average(block):
    """Weights swapped as torch-ema does."""
    for parameter in block.parameters():
        parameter.data.copy_(parameter * 0.9 + 0.01)


def swap_twice(block):
    """New storages, the second of which may lie where the kept one was."""
    weight = block.convs[1].weight
    for factor in (2.0, 3.0):
        weight.data = weight.data.clone() * factor


def transpose(block):
    """The same memory, read in another order."""
    weight = block.convs[0].weight
    weight.data = weight.data.transpose(0, 1)


def write_storage(block):
    weight = block.conv3.weight
    weight.untyped_storage().copy_((weight.detach() * 2).untyped_storage())


def shrink_channels_last(block):
    block.to(memory_format=torch.channels_last)
    fused(block)
    block.convs[2].weight.data.mul_(0.5)


UNSEEN = {
    "average": average,
    "data_mul": lambda b: b.convs[0].weight.data.mul_(2),
    "data_swapped_twice": swap_twice,
    "data_transposed": transpose,
    "numpy_of_a_buffer": lambda b: b.bn1.running_var.numpy().__imul__(2),
    "numpy_of_a_weight": lambda b: b.conv1.weight.detach().numpy().__iadd__(1),
    "numpy_of_one_norm_bias": lambda b: b.bns[2].bias.detach().numpy().__iadd__(1),
    "detached_zero": lambda b: b.conv3.weight.data.zero_(),
    "sign": lambda b: b.bns[0].weight.data.neg_(),
    "storage": write_storage,
    "channels_last": shrink_channels_last,
    "half_of_the_channels": lambda b: b.convs[0].weight.data[::2].zero_(),
}


@pytest.mark.parametrize("write", UNSEEN.values(), ids=UNSEEN.keys())
@pytest.mark.parametrize("shortcut", [False, True], ids=["plain", "projection"])
def test_dense_writes_are_noticed_at_the_next_call(write, shortcut, folds):
    projection = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)) if shortcut else None
    block = make(downsample=projection)
    before = fused(block)
    write(block)
    assert_current(block)
    assert not torch.equal(fused(block), before), "the write changed nothing: not a test"
    settled = len(folds)
    fused(block)
    assert len(folds) == settled, "the changed block is not cached again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_swapped_and_swapped_back(dtype):
    """Evaluation with averaged weights inside training: the two sets in turn, in the dtypes of networks."""
    block = randomize(Bottle2neck(32, 8)).to(dtype).eval()
    x = X.to(dtype)
    first, own = fused(block, x), [p.detach().clone() for p in block.parameters()]
    average(block)
    second = fused(block, x)
    assert not torch.equal(first, second) and torch.equal(second, fused(refresh(block), x))
    for parameter, value in zip(block.parameters(), own, strict=True):
        parameter.data.copy_(value)
    assert torch.equal(fused(block, x), first)


def test_a_folded_projection_is_watched():
    block = make(downsample=nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)))
    for change in (lambda: block.downsample[0].weight.data.mul_(2), lambda: block.downsample[1].running_mean.numpy().fill(3)):
        fused(block)
        change()
        assert_current(block)


def make_1d():
    block = accelerate(randomize(SpeechBrainChain()).eval(), backend="reference")
    return block, torch.randn(4, 32, 23, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "write",
    [
        average,
        lambda b: [m.weight.data.mul_(2) for m in b.modules() if isinstance(m, nn.Conv1d)],
        lambda b: [m.running_mean.numpy().__iadd__(1) for m in b.modules() if isinstance(m, nn.BatchNorm1d)],
        lambda b: next(m for m in b.modules() if isinstance(m, nn.BatchNorm1d)).bias.data.add_(1),
    ],
    ids=["average", "convolutions", "statistics", "one_norm"],
)
def test_1d_chains_notice_too(write):
    block, x = make_1d()
    before = fused(block, x)
    assert explain(block)[0].fused
    write(block)
    after = fused(block, x)
    assert not torch.equal(after, before)
    assert_close(after, fused(restore(copy.deepcopy(block)), x), 1e-5)


def test_frozen_blocks_stay_as_documented():
    block = freeze(make())
    before = fused(block)
    average(block)
    assert torch.equal(fused(block), before) and OUTDATED not in explain(block)[0].reason
    refresh(block)
    assert_current(block)


def unsampled(tensor):
    """The index of an element that `cpu_samples` does not read, in memory order."""
    flat = tensor.detach().view(-1)
    before = operators.cpu_samples([tensor])
    for i in range(flat.numel()):
        old = flat[i].item()
        flat[i] = old + 1
        seen = operators.cpu_samples_differ([tensor], before)
        flat[i] = old
        if not seen:
            return i
    raise AssertionError("all elements are read")


@pytest.mark.parametrize("kind", ["2d", "1d"])
def test_explain_names_what_samples_miss(kind):
    block, x = (make(), X) if kind == "2d" else make_1d()
    weight = block.convs[1].weight if kind == "2d" else next(m for m in block.modules() if isinstance(m, nn.Conv1d)).weight
    i = unsampled(weight)
    before = fused(block, x)
    assert OUTDATED not in explain(block)[0].reason
    weight.data.view(-1)[i] += 7
    after = fused(block, x)
    assert OUTDATED in explain(block)[0].reason
    assert torch.equal(after, before) or kind == "1d"  # of which not every backend reads the packed weights
    refresh(block)
    fused(block, x)
    assert OUTDATED not in explain(block)[0].reason


def test_explain_is_silent_about_changes_that_the_next_call_sees():
    block = make()
    fused(block)
    with torch.no_grad():
        block.conv1.weight.mul_(2)
    assert OUTDATED not in explain(block)[0].reason
    fused(block)
    block.conv1.weight.data[0] = torch.nan  # which equals nothing, itself included
    refresh(block)
    fused(block)
    assert OUTDATED not in explain(block)[0].reason


# The operator ---------------------------------------------------------------------------------------------------------


TENSORS = {
    "scalar": torch.tensor(3),
    "bytes": torch.arange(40, dtype=torch.uint8),
    "half": torch.randn(5, 3, 3, 3).half(),
    "double": torch.randn(300, dtype=torch.float64),
    "channels_last": torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last),
    "slice": torch.randn(9, 8, 7)[2:, ::2, 1],
    "expanded": torch.randn(4, 1).expand(4, 5),
    "five_dimensions": torch.randn(2, 3, 2, 3, 2),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_first_and_last_elements_are_read(tensor):
    for index in (0, -1):
        changed = tensor.clone()
        element = changed[(index,) * tensor.dim()] if tensor.dim() else changed
        element.add_(1)
        before = operators.cpu_samples([tensor])
        assert before.numel() == 16 * tensor.element_size() and not operators.cpu_samples_differ([tensor.clone()], before)
        assert operators.cpu_samples_differ([changed], before)


def test_short_vectors_are_read_whole():
    for size in range(1, 9):
        vector = torch.zeros(size)
        before = operators.cpu_samples([vector])
        for i in range(size):
            vector[i] = 1
            assert operators.cpu_samples_differ([vector], before)
            vector[i] = 0


def test_what_has_no_elements_is_skipped():
    freed = torch.randn(8)
    freed.untyped_storage().resize_(0)
    shrunk = torch.randn(8)
    shrunk.untyped_storage().resize_(16)
    nothing = [torch.empty(3, device="meta"), torch.empty(0, 4), freed, shrunk]
    samples = operators.cpu_samples(nothing)
    assert samples.numel() == 0 and not operators.cpu_samples_differ(nothing, samples)
    kept = torch.randn(8)
    samples = operators.cpu_samples([kept])
    kept.untyped_storage().resize_(0)
    assert operators.cpu_samples_differ([kept], samples)


def test_no_copy_on_write_is_undone():
    tensor = torch.randn(8)
    lazy = torch._lazy_clone(tensor)
    operators.cpu_samples([lazy])
    assert torch._C._is_cow_tensor(lazy)


def test_meta_blocks_are_not_read():
    with torch.device("meta"):
        block = Bottle2neck(32, 8).eval()
        for _ in range(2):
            assert fused(block, torch.empty(2, 32, 5, 6)).shape == (2, 32, 5, 6)
