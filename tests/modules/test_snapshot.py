"""Whatever may change between two calls of a block is changed, and plain PyTorch's answer is demanded at the next call."""

import contextlib
import copy
import gc
import weakref

import numpy
import pytest
import torch
from block_changes import (
    CHANGES,
    FOLDED,
    HOOKS,
    NOTHING,
    OWN_CHANGES,
    WEIGHTS,
    Plugged,
    attribute,
    hook,
    in_training,
    own_classes,
    own_forward,
    published,
    tensor,
)
from helpers import assert_close, randomize
from official_style import Bottle2neck as Official
from published_blocks.speakers1d import ESPnetBlock, SpeechBrainChain
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from res2net_fused import accelerate, freeze, restore
from res2net_fused._native import library
from res2net_fused.backends import policy
from res2net_fused.backends.selection import ENVIRONMENT_VARIABLE
from res2net_fused.modules import fused_forward, fused_forward1d
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.snapshot import Snapshot

X = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(3))


def run(block, x=X):
    with torch.no_grad():
        return block(x)


def asked(block, x=X):
    """Whether a call of the block asks anew for all that `why_not_fused` looks at."""
    calls = []
    own, fused_forward.why_not_fused = fused_forward.why_not_fused, lambda *args: calls.append(args) or own(*args)
    try:
        run(block, x)
    finally:
        fused_forward.why_not_fused = own
    return bool(calls)


def settled(block, x=X):
    for _ in range(3):
        run(block, x)
    assert not asked(block, x) and vars(block)[STATE].last_refusal is None
    return block


PAIRS = {}


@pytest.fixture(params=["cached", "frozen", "compared by Python"])
def keep(request, monkeypatch):
    """Whether weights are frozen; compared by Python: as where the pybind11 module, which is faster, is not there."""
    if request.param == "compared by Python":
        monkeypatch.setattr(library, "same_dicts", lambda: None)
    return request.param


def pair(make, keep):
    """A block that is not asked any more, and the same in plain PyTorch; every test leaves them as they are."""
    if (make, keep) not in PAIRS:
        block = make()
        PAIRS[make, keep] = block, restore(copy.deepcopy(block))
    block, twin = PAIRS[make, keep]
    if keep == "frozen":
        freeze(block)  # norms in training mode have thawed it
    assert_close(run(settled(block)), run(twin))
    return block, twin


def demand(block, twin, change, before, shown=True):
    """Plain PyTorch's answer at the next call after the change of both, and again once it is taken back; the last refusal.

    shown: whether the change alters that answer.
    """
    back = [change(twin), change(block)]
    try:
        expected = run(twin)
        assert not shown or not torch.equal(expected, before), "the change changes nothing: not a test"
        for _ in range(3):
            assert_close(run(block), expected)
        return vars(block)[STATE].last_refusal
    finally:
        for undo in back[::-1]:
            undo()
        for _ in range(2):
            assert_close(run(block), before)


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen_at_the_next_call(name, keep):
    if keep == "frozen" and name in FOLDED:
        pytest.skip("what is frozen stays as it is")
    block, twin = pair(published, keep)
    refusal = demand(block, twin, CHANGES[name], run(twin), "backward" not in name)
    assert "hook" not in name or "downsample" in name or "hook" in refusal


@pytest.mark.parametrize("name", OWN_CHANGES)
def test_every_setting_of_own_classes_is_seen_at_the_next_call(name, keep):
    block, twin = pair(own_classes, keep)
    demand(block, twin, OWN_CHANGES[name], run(twin))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_write_to_weights_is_seen_at_the_next_call(name):
    block, twin = pair(published, "cached")
    assert demand(block, twin, WEIGHTS[name], run(twin)) is None
    block, twin = pair(published, "frozen")
    before, back = run(twin), WEIGHTS[name](block)
    assert_close(run(block), before)
    back()
    assert_close(run(block), before)


# Around a call --------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **kwargs or {})


def test_what_lies_around_a_call_is_seen(keep, monkeypatch):
    block, twin = pair(published, keep)
    before = run(twin)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    assert_close(run(block), before)
    handle.remove()
    assert block.convs[0] in seen
    with torch.autocast("cpu", torch.bfloat16):
        out = run(block)
        assert out.dtype == run(twin).dtype == torch.bfloat16
        assert_close(out, run(twin), 1.5e-2)
    for double in (block, twin):
        double.double()
    assert_close(run(block, X.double()), run(twin, X.double()))
    for single in (block, twin):
        single.float()
    pair(published, keep)
    kept = vars(block)[STATE].kept
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert_close(run(block), before)
    assert keep == "frozen" or vars(block)[STATE].kept is not kept, "packed for another backend"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nothing")
    with pytest.raises(ValueError, match="nothing"):
        run(block)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert_close(torch.func.vmap(lambda x: run(block, x))(X[None])[0], before)
    with torch.autograd.forward_ad.dual_level():
        dual = run(block, torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
    with torch.no_grad():
        assert "res2net_fused::" not in str(torch.jit.trace(block, X, check_trace=False).graph)
    with Operators() as mode:
        assert_close(run(block), before)
    assert "aten.convolution.default" in mode.names
    with torch.device("meta"):  # a mode that asks for nothing else
        assert_close(run(block), before)
    assert not asked(block)


def test_gradients_are_seen(keep):
    block, twin = pair(published, keep)
    for each in (block, twin):
        each.requires_grad_(False)
    assert not block(X).requires_grad
    x = X.clone().requires_grad_()
    (expected,), (grad,) = (torch.autograd.grad(each(x).square().sum(), [x]) for each in (twin, block))
    assert_close(grad, expected, 1e-4)
    for name in ("convs.1.weight", "downsample.2.bias"):
        for each in (block, twin):
            each.get_parameter(name).requires_grad_()
        own = [torch.autograd.grad(each(X).square().sum(), [each.get_parameter(name)])[0] for each in (block, twin)]
        assert_close(*own, 1e-4)
        for each in (block, twin):
            each.get_parameter(name).requires_grad_(False)
    assert not block(X).requires_grad
    for each in (block, twin):
        each.requires_grad_()


OTHERS = {
    "channels_last": X.contiguous(memory_format=torch.channels_last),
    "one image": X[:1],
    "pixel": X[:, :, :1, :1].contiguous(),
    "strided": torch.randn(2, 16, 10, 12)[:, :, ::2, ::2],
    "expanded": torch.randn(1, 16, 5, 6).expand(2, 16, 5, 6),
    "empty": X[:0],
    "parameter": nn.Parameter(X.clone()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_x_is_seen(name, keep):
    block, twin = pair(published, keep)
    for x in (OTHERS[name], X, OTHERS[name]):
        out = run(block, x)
        assert_close(out, run(twin, x))
        asking = copy.deepcopy(block)
        assert out.stride() == run(asking, x).stride()
        assert vars(block)[STATE].last_problem == vars(asking)[STATE].last_problem


def test_the_format_of_x_is_seen_and_the_dtype_of_weights():
    block = accelerate(randomize(Official(16, 4)).eval())
    settled(block, OTHERS["channels_last"])
    assert run(block).stride() == run(copy.deepcopy(block)).stride()
    block.conv1.weight.data = block.conv1.weight.data.double()
    with pytest.raises(RuntimeError, match="dtype|type"):
        run(block)


@pytest.mark.parametrize(
    "x", [X.double(), X[0], X.long(), X[:, :4], None], ids=["double", "3d", "integers", "channels", "none"]
)
def test_an_x_that_does_not_fit_fails_as_in_plain_pytorch(x, keep):
    block, twin = pair(published, keep)
    for _ in range(2):
        errors = []
        for each in (twin, block):
            with pytest.raises(Exception) as raised:  # noqa: PT011 - of whatever kind plain PyTorch has
                run(each, x)
            errors.append(raised.type)
        assert errors[0] is errors[1] or issubclass(errors[1], (ValueError, TypeError))
    assert not asked(block)


# What it holds --------------------------------------------------------------------------------------------------------


def test_one_element_tensors_are_told_apart_though_they_are_equal():
    block = settled(accelerate(randomize(Official(16, 4)).eval()))  # groups of one channel
    norm = block.bns[1]
    norm.bias = nn.Parameter(norm.bias.detach().clone(), requires_grad=False)
    norm.running_mean = norm.running_mean.clone()
    run(block)
    with torch.no_grad():
        norm.bias.add_(1)
        norm.running_mean.sub_(1)
    assert_close(run(block), run(restore(copy.deepcopy(block))))
    settled(block.requires_grad_(False))
    norm.bias = nn.Parameter(norm.bias.detach().clone())
    assert block(X).requires_grad


@pytest.mark.skipif(library.same_dicts() is None, reason="the pybind11 module is not built")
def test_a_block_that_is_as_it_was_is_compared_by_identity_alone(monkeypatch):
    """And one that merely equals what it was by Python, which finds no change."""
    block = settled(randomize(published()).eval())
    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "_equal", lambda self: pytest.fail("Python has compared all"))
        assert not asked(block)
    asked_python = []
    monkeypatch.setattr(Snapshot, "_equal", lambda self, own=Snapshot._equal: asked_python.append(1) or own(self))
    block.conv1.kernel_size = tuple([*block.conv1.kernel_size])  # another object
    assert not asked(block) and asked_python


def test_attributes_that_have_no_truth_when_compared_are_compared_as_objects(keep):
    block = randomize(published()).eval()
    block.conv1.table = numpy.arange(3)
    if keep == "frozen":
        freeze(block)
    settled(block)
    block.conv1.table = numpy.arange(3)
    assert asked(block)


def test_a_block_is_freed_with_its_last_reference():
    block = settled(accelerate(randomize(Official(16, 4)).eval()))
    held = weakref.ref(block), weakref.ref(block.convs[0]), weakref.ref(block.convs[0].weight)
    gc.disable()
    try:
        del block
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


def test_what_is_replaced_is_freed_at_the_next_call():
    block = settled(accelerate(randomize(Official(16, 4)).eval()))
    held = [weakref.ref(block.conv1), weakref.ref(block.bn3.weight)]
    block.conv1 = nn.Conv2d(16, 4, 1, bias=False)
    block.bn3.weight = nn.Parameter(torch.ones(16))
    run(block)
    gc.collect()
    assert [ref() for ref in held] == [None] * 2
    block = settled(block)
    block.conv1 = nn.Identity()
    with contextlib.suppress(RuntimeError):
        run(block)
    assert vars(block)[STATE].known is None


def test_copies_and_replicas_ask_for_themselves():
    block = settled(accelerate(randomize(Official(16, 4)).eval()))
    shallow, deep = copy.copy(block), copy.deepcopy(block)
    assert vars(deep)[STATE].known is None and vars(shallow)[STATE] is vars(block)[STATE]
    shallow.relu = nn.Sigmoid()  # in the dictionary that both share
    assert_close(run(block), run(restore(copy.deepcopy(block))))
    other = randomize(copy.deepcopy(deep), seed=9)
    vars(other)[STATE] = vars(deep)[STATE]
    for _ in range(3):
        for each in (deep, other):
            assert_close(run(each), run(restore(copy.deepcopy(each))))


def test_containers_that_hold_themselves_are_no_trap():
    block = accelerate(randomize(Plugged(16, 4)).eval())
    block.counts = [1.0]
    block.counts.append(block.counts)
    block.convs[0].notes = block.counts
    expected = run(block)
    for _ in range(3):
        assert torch.equal(run(block), expected)


def test_a_block_that_changes_at_every_call_takes_few_snapshots(monkeypatch):
    taken = []
    own = fused_forward.take_snapshot
    monkeypatch.setattr(fused_forward, "take_snapshot", lambda *args: taken.append(args) or own(*args))
    block = accelerate(randomize(Official(16, 4)).eval())
    for i in range(200):
        block.note = i
        run(block)
    assert len(taken) < 10
    for _ in range(70):
        run(block)
    settled(block)
    count = len(taken)
    for _ in range(20):  # refused, which takes none
        handle = block.conv1.register_forward_hook(NOTHING)
        run(block)
    assert len(taken) <= count + 1
    handle.remove()


# Along rows -----------------------------------------------------------------------------------------------------------

ROWS = torch.randn(2, 32, 23, generator=torch.Generator().manual_seed(5))
CHANGES_1D = {
    **{f"{kind}_hook": ("conv", hook(kind, "", result)) for kind, result in HOOKS.items() if "backward" not in kind},
    "own forward": ("conv", own_forward("")),
    "weight": ("conv", tensor("", "weight", lambda t: t.mul_(2))),
    ".data": ("norm", tensor("", "bias", lambda t: t.data.add_(1))),
    "parameter": ("norm", attribute("", "weight", lambda old: nn.Parameter(old.detach() * 3, requires_grad=False))),
    "eps": ("norm", attribute("", "eps", 1.0)),
    "training": ("norm", in_training("")),
}


@pytest.mark.parametrize("make", [SpeechBrainChain, ESPnetBlock])
def test_every_change_of_a_block_along_rows_is_seen(make, keep, monkeypatch):
    pays = [True]
    monkeypatch.setattr(policy, "chain_pays_1d", lambda *_: pays[0])
    block = accelerate(randomize(make()).eval())
    twin = restore(copy.deepcopy(block))
    before = run(twin, ROWS)
    for name, (part, change) in CHANGES_1D.items():
        kind = nn.Conv1d if part == "conv" else nn.BatchNorm1d
        pair = [[m for m in each.modules() if isinstance(m, kind) and 4 in m.weight.shape][-1] for each in (twin, block)]
        if keep == "frozen" and name in ("weight", ".data", "parameter", "eps"):
            continue
        if keep == "frozen":
            freeze(block)  # norms in training mode have thawed it
        for _ in range(3):
            assert_close(run(block, ROWS), before)
        with monkeypatch.context() as patch:
            patch.setattr(fused_forward1d, "why_not_fused_1d", lambda *args: pytest.fail("asked anew"))
            assert_close(run(block, ROWS), before)
        back = [change(module) for module in pair]
        expected = run(twin, ROWS)
        assert not torch.equal(expected, before), "the change changes nothing: not a test"
        for _ in range(3):
            assert_close(run(block, ROWS), expected)
        for undo in back:
            undo()
    for x in (ROWS, ROWS[:1], ROWS[:, :, :11], ROWS.mT.contiguous().mT):
        assert_close(run(block, x), run(twin, x))
    for _ in range(2):
        assert_close(run(block, ROWS), before)
    pays[0] = False
    for _ in range(2):
        assert torch.equal(run(block, ROWS[:1]), run(twin, ROWS[:1])) and "not measured" in vars(block)[STATE].last_refusal
    x = ROWS.clone().requires_grad_()
    grads = [torch.autograd.grad(each(x).square().sum(), [x])[0] for each in (block, twin)]
    assert_close(*grads, 1e-4)
