"""What blocks keep from call to call, on cards: in captures, under autocast, over two devices and on many streams."""

import dataclasses
import functools

import pytest
import torch
from helpers import Chain, assert_close, randomize
from on_card import capture, counter
from published_blocks.speakers1d import SpeechBrainChain
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain, freeze, pack_weights, refresh
from res2net_fused.chain.config import ChainConfig
from res2net_fused.modules import fused_forward, fused_forward1d
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.fused_forward import OVERFLOWED, UNSEEN

HALVES = [torch.float16, torch.bfloat16]
KINDS = ["2d", "1d"]
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind="2d", dtype=torch.float32, seed=0):
    """A block and an x for it."""
    generator = torch.Generator().manual_seed(5)
    if kind == "1d":
        block = accelerate(randomize(SpeechBrainChain(), seed), backend="reference")
        x = torch.randn(4, 32, 23, generator=generator)
    else:
        shortcut = nn.Sequential(nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32))
        block = randomize(Bottle2neck(24, 8, downsample=shortcut), seed)
        x = torch.randn(4, 24, 5, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    return block.to("cuda", dtype).eval(), x.to("cuda", dtype)


def infer(model, x, autocast=None):
    with torch.no_grad(), torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        return model(x)


def reason(block):
    return explain(block)[0].reason


def change(block, factor=1.5):
    """New weights, of which PyTorch knows."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(factor)


@pytest.fixture
def folds(monkeypatch):
    """How often a block was folded or a chain's affine maps were worked out: `len(folds)`."""
    calls = []
    for module, name in ((fused_forward, "fold_block"), (fused_forward1d, "resolve_weights")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own: (calls.append(1), own(*args))[1])
    return calls


# Captures -------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(dtype, None) for dtype in (torch.float32, *HALVES)] + [(torch.float32, half) for half in HALVES],
    ids=["float32", "float16", "bfloat16", "autocast to float16", "autocast to bfloat16"],
)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "first"])
def test_a_capture_waits_for_nothing_and_its_replays_see_new_weights(kind, dtype, autocast, warm):
    block, x = make(kind, dtype)
    call = functools.partial(infer, block, x, autocast)
    if warm:
        call()
    graph, out = capture(call)  # where a host that waits is an error
    fused = warm or (autocast or dtype) != torch.float16 or kind == "1d"
    assert explain(block)[0].fused == fused and (fused or reason(block) == UNSEEN)
    for _ in range(2):
        graph.replay()
        assert_close(out, call(), 2e-3 if out.dtype == torch.float16 else 1e-2)
        change(block)


def test_weights_that_changed_since_the_warm_up_count_as_unseen():
    block, x = make(dtype=torch.float16)
    infer(block, x)
    change(block)
    capture(functools.partial(infer, block, x))
    assert reason(block) == UNSEEN
    infer(block, x)
    capture(functools.partial(infer, block, x))
    assert explain(block)[0].fused


def overflowing(block):
    """1 / sqrt(eps) of a dead channel is beyond float16, behind a ReLU that lets nothing through to it."""
    with torch.no_grad():
        block.bn1.bias[:8] = -100
        block.bns[0].running_var.zero_()
        block.bns[0].running_mean.zero_()
    block.bns[0].eps = 1e-12
    return block


@pytest.mark.parametrize("how", ["float16", "autocast"])
@pytest.mark.parametrize("when", ["warm", "first", "frozen", "frozen under autocast"])
def test_weights_beyond_float16_run_the_blocks_own_forward_in_a_capture(how, when):
    block, x = make(dtype=torch.float16 if how == "float16" else torch.float32)
    overflowing(block)
    call = functools.partial(infer, block, x, torch.float16 if how == "autocast" else None)
    if when == "warm":
        call()
    elif when == "frozen under autocast":
        with torch.autocast("cuda", torch.float16):
            freeze(block)
    elif when == "frozen":
        freeze(block)
    graph, out = capture(call)
    assert reason(block) == (UNSEEN if when == "first" else OVERFLOWED)
    graph.replay()
    assert out.isfinite().all() and torch.equal(out, call())


def test_weights_that_overflow_only_at_a_replay_show_as_nan():
    block, x = make(dtype=torch.float16)
    with torch.no_grad():
        block.bn1.bias.fill_(50)  # all that the chain reads is positive
    call = functools.partial(infer, block, x)
    call()
    graph, out = capture(call)
    graph.replay()
    assert torch.equal(out, call())
    with torch.no_grad():  # of which ReLU makes zeros, but for the pixels that padding reaches
        block.bns[1].weight.fill_(6e4)
        block.convs[1].weight.fill_(-100)
    graph.replay()
    assert out.isnan().all()


def test_freeze_refuses_a_capture():
    block, _ = make()
    with pytest.raises(RuntimeError, match="freeze waits.*CUDA graph is being captured"):
        capture(lambda: freeze(block))
    assert getattr(block, STATE).frozen is None


# Frozen, in every dtype -----------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("where", ["freeze", "call"])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_frozen_weights_under_autocast_are_made_once(kind, half, where, folds):
    block, x = make(kind)
    expected, in_half = infer(block, x), infer(block, x, half)
    with torch.autocast("cuda", half, enabled=where == "freeze"):
        freeze(block)
    if where == "call":
        assert torch.equal(infer(block, x, half), in_half)
    del folds[:]
    change(block)
    for _ in range(2):  # a dtype that was not there when the block was frozen has the same weights
        assert torch.equal(infer(block, x), expected) and torch.equal(infer(block, x, half), in_half)
    held = dict(getattr(block, STATE).frozen.held)
    graph, out = capture(functools.partial(infer, block, x, half))
    graph.replay()
    assert torch.equal(out, in_half)
    assert getattr(block, STATE).frozen.held == held and len(held) == 2 and not folds
    folding, _ = make(kind)
    infer(folding, x, half)
    assert graph.size() <= capture(functools.partial(infer, folding, x, half))[0].size() - 20  # which folds and packs


@kinds
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_dtype_first_met_in_a_capture_is_made_in_the_graph(kind, half, folds):
    block, x = make(kind)
    expected = infer(block, x, half)
    freeze(block)
    change(block)
    del folds[:]
    graph, out = capture(functools.partial(infer, block, x, half))
    assert explain(block)[0].fused and len(getattr(block, STATE).frozen.held) == 1 and not folds
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(infer(block, x, half), expected)  # and is not the graph's memory, which holds NaN before a replay
    capture(lambda: x * 2)
    assert torch.equal(infer(block, x, half), expected)


# Two cards ------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["own", "fp16"])
def test_replicas_of_a_frozen_model_copy_its_weights_once(kind, autocast, folds):
    block, x = make(kind)
    expected = infer(block, x, autocast)
    model = nn.DataParallel(freeze(block), [0, 1])
    del folds[:]
    change(block)  # its replicas too keep what was frozen
    first = infer(model, x, autocast)
    assert torch.equal(first, expected) and not folds
    frozen = getattr(block, STATE).frozen
    held, memory = dict(frozen.held), torch.cuda.memory_allocated(1)
    assert {device.index for dtype, device in held if dtype == (autocast or torch.float32)} == {0, 1}
    operators = []
    for _ in range(3):
        before = counter("operators")
        assert torch.equal(infer(model, x, autocast), expected)
        operators.append(counter("operators") - before)
    assert frozen.held == held and torch.cuda.memory_allocated(1) == memory and len(set(operators)) == 1
    refresh(block)
    assert not torch.equal(infer(model, x, autocast), expected)


def block_call():
    block, x = make()
    infer(block, x)
    f = getattr(block, STATE).kept[1]
    tensors = [getattr(f, field.name) for field in dataclasses.fields(f)][:9]
    return x, x, *tensors, f.packed, f.layout, True, *block.chain_config.as_kwargs().values(), "auto"


def chain_call():
    x, weights, biases = Chain().tensors((2, 7, 9), torch.float32, "cuda")
    pack = pack_weights(weights, biases, backend="triton")
    return x, weights, biases, pack.packed, pack.layout, *ChainConfig().as_kwargs().values(), "auto"


def chain_backward_call():
    x, weights, biases, _, _, *settings = chain_call()
    return x, x, x, weights, biases, *settings, [True] * 3


def row_call():
    block, x = make("1d")
    infer(block, x)
    chain, config = getattr(block, STATE).kept[1], getattr(block, STATE).config
    *settings, activation = config.as_kwargs().values()
    tensors = x, chain.weights, chain.biases, chain.scale, chain.shift, chain.weights
    return *tensors, *settings, False, "auto", activation


def row_backward_call():
    x, weights, biases, scale, shift, _, *settings, _, _, activation = row_call()
    return x, x, x, [x, x], weights, biases, scale, shift, *settings, activation, [True] * 5


OPERATORS = {
    "bottle2neck": block_call,
    "hierarchical_conv2d": chain_call,
    "hierarchical_conv2d_backward": chain_backward_call,
    "hierarchical_conv1d": row_call,
    "hierarchical_conv1d_backward": row_backward_call,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_name_the_tensor_of_another_card(name):
    operator = getattr(torch.ops.res2net_fused, name).default
    arguments, tried = OPERATORS[name](), 0
    if not name.endswith("backward"):
        with torch.no_grad():
            operator(*arguments)
    for i, (argument, value) in enumerate(zip(operator._schema.arguments, arguments, strict=True)):
        if isinstance(value, torch.Tensor):
            wrong = value.to("cuda:1")
        elif isinstance(value, list) and isinstance(value[-1], torch.Tensor):
            wrong = [*value[:-1], value[-1].to("cuda:1")]
        else:
            continue
        tried += 1
        with torch.no_grad(), pytest.raises(ValueError, match=rf"(?=.*\b{argument.name}\b)(?=.*cuda:1)"):
            operator(*arguments[:i], wrong, *arguments[i + 1 :])
    assert tried >= 4


@pytest.mark.parametrize("keep", [refresh, freeze], ids=["kept", "frozen"])
@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_an_x_of_another_device_is_refused(keep, device):
    block, x = make()
    keep(block)
    with pytest.raises(ValueError, match=f"is on cuda:0 but x is on {device}; both must be on one device"):
        infer(block, x.to(device))


# Streams --------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("keep", [refresh, freeze], ids=["kept", "frozen"])
def test_a_stream_waits_and_is_recorded_once(kind, keep):
    block, x = make(kind)
    expected = infer(keep(block), x)
    streams = [torch.cuda.Stream() for _ in range(3)]
    lent = 1 if keep is freeze else 2  # the weights, and samples of what they were made of

    def costs(stream, autocast=None):
        before = counter("waits"), counter("recorded_tensors")
        with torch.cuda.stream(stream):
            out = infer(block, x, autocast)
        assert autocast or torch.equal(out, expected)
        return counter("waits") - before[0], counter("recorded_tensors") - before[1]

    assert costs(torch.cuda.current_stream()) == (0, 0)
    for stream in streams:
        waits, tensors = costs(stream)
        assert waits == lent and tensors >= 4
    assert [costs(stream) for stream in streams * 2] == [(0, 0)] * 6
    keep(block)  # other weights, of which the streams know nothing
    infer(block, x)
    assert costs(streams[0])[0] == lent
    if keep is freeze:  # another dtype is made from them, and then lent for itself
        assert [costs(stream, torch.float16)[0] for stream in streams[1:] * 2] == [1, 1, 0, 0]
