"""`accelerate` on the 1-D blocks of speaker networks: written in their style, and SpeechBrain's own."""

import copy
import importlib.util
import pickle
import sys
import types

import pytest
import torch
from helpers import assert_close, randomize
from published_blocks.speakers1d import ESPnetBlock, SpeechBrainChain, WeSpeakerChain
from torch import nn

from res2net_fused import accelerate, explain, freeze, hierarchical_conv1d, refresh, restore
from res2net_fused.backends import policy
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.fused_forward1d import FusedForward1d, parts_1d


@pytest.fixture(autouse=True)
def chains_pay(monkeypatch):
    """What runs where it is faster must be right everywhere."""
    monkeypatch.setattr(policy, "chain_pays_1d", lambda *_: True)


def speechbrain_block(**keywords):
    """SpeechBrain's own; skipped where it is not installed. It wants torchaudio, of which this block uses nothing."""
    if importlib.util.find_spec("speechbrain") is None:
        pytest.skip("speechbrain is not installed (pip install --no-deps speechbrain hyperpyyaml ruamel.yaml)")
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        from speechbrain.lobes.models.ECAPA_TDNN import Res2NetBlock
    except ImportError as error:
        pytest.skip(f"speechbrain cannot be imported here: {error}")
    return Res2NetBlock(32, 32, scale=8, kernel_size=3, **keywords)


def with_relu(block, activation):
    block.relu = activation
    return block


class ByFunction(WeSpeakerChain):
    """Mish as a function, which no module tells of."""

    def forward(self, x):
        pieces = torch.split(x, self.width, 1)
        out, sp = [], pieces[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            sp = bn(nn.functional.mish(conv(sp if i == 0 else sp + pieces[i])))
            out.append(sp)
        return torch.cat([*out, pieces[-1]], 1)


BLOCKS = {
    # name: (a block, the group that passes, its padding)
    "speechbrain": (lambda: speechbrain_block(dilation=2), "first", "reflect"),
    "speechbrain_dropout": (lambda: speechbrain_block(dilation=4, dropout=0.3), "first", "reflect"),
    "speechbrain_style": (SpeechBrainChain, "first", "reflect"),
    "speechbrain_style_4": (lambda: SpeechBrainChain(scale=4, dilation=3, dropout=0.2), "first", "reflect"),
    "wespeaker": (WeSpeakerChain, "last", "zeros"),
    "wespeaker_no_bias": (lambda: WeSpeakerChain(bias=False), "last", "zeros"),
    "espnet": (ESPnetBlock, "last", "zeros"),
    "silu": (lambda: SpeechBrainChain(scale=4, activation=nn.SiLU), "first", "reflect"),
    "gelu_dropout": (lambda: SpeechBrainChain(scale=4, activation=lambda: nn.GELU("tanh"), dropout=0.2), "first", "reflect"),
    "leaky_relu": (lambda: with_relu(ESPnetBlock(), nn.LeakyReLU(0.2)), "last", "zeros"),
    "functional_mish": (lambda: ByFunction(bias=False), "last", "zeros"),
    "synchronised": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(WeSpeakerChain()), "last", "zeros"),
    "synchronised_silu": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(SpeechBrainChain(scale=4, activation=nn.SiLU)),
        "first",
        "reflect",
    ),
    "synchronised_block": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(ESPnetBlock()), "last", "zeros"),
}
blocks = pytest.mark.parametrize("name", BLOCKS)
X = torch.randn(2, 32, 23, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def make(name, seed=0):
    return randomize(BLOCKS[name][0](), seed).double().eval()


def run(block, x=X):
    with torch.no_grad():
        return block(x)


@blocks
def test_is_taken_for_what_it_is_and_given_back(name):
    block = make(name)
    own, keys, expected = type(block), list(block.state_dict()), run(block)
    accelerate(nn.Sequential(block))
    assert isinstance(block, own) and isinstance(block, FusedForward1d), explain(block)
    config = getattr(block, STATE).config
    assert (config.passthrough, config.padding_mode) == BLOCKS[name][1:]
    assert list(block.state_dict()) == keys
    assert explain(block)[0].fused is None
    assert_close(run(block), expected, 1e-12)
    (report,) = explain(block)
    assert report.fused and report.backend == "cpu" and "product" in report.plan, report
    restore(block)
    assert type(block) is own and STATE not in vars(block)
    assert torch.equal(run(block), expected)


@pytest.mark.parametrize("length", [9, 64, 701])
@blocks
def test_float32(name, length):
    block = make(name)
    x = torch.randn(1, 32, length, dtype=torch.float64)
    expected = run(block, x)
    accelerate(block.float())
    for _ in range(2):
        assert_close(run(block, x.float()), expected, 5e-6)


@blocks
def test_gradients_in_eval_mode(name):
    block = make(name)
    fused = accelerate(copy.deepcopy(block))
    results = []
    for module in (block, fused):
        x = X.clone().requires_grad_()
        results.append(torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]))
    assert explain(fused)[0].fused
    for own, ours in zip(*results, strict=True):
        assert_close(ours, own, 1e-11)


@blocks
def test_training_mode_runs_the_own_forward(name):
    block = make(name).train()
    fused = accelerate(copy.deepcopy(block))
    results = []
    for module in (block, fused):
        torch.manual_seed(4)
        out = module(X)
        out.sum().backward()
        results.append([out, *(p.grad for p in module.parameters()), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert "in training mode" in explain(fused)[0].reason
    assert_close(run(fused.eval()), run(block.eval()), 1e-12)


@blocks
def test_new_weights_copies_and_frozen_ones(name):
    block = accelerate(make(name))
    expected = run(block)
    assert torch.equal(run(copy.deepcopy(block)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(block))), expected)
    other = make(name, seed=5)
    block.load_state_dict(other.state_dict())
    assert_close(run(block), run(other), 1e-12)
    freeze(block)
    frozen = run(block)
    assert_close(frozen, run(other), 1e-12)
    with torch.no_grad():
        for module in sum(parts_1d(block, getattr(block, STATE).layout), []):
            module.weight.mul_(2)
            if module.bias is not None:
                module.bias.add_(1)
    assert torch.equal(run(block), frozen)
    refresh(block)
    assert_close(run(block), run(restore(copy.deepcopy(block))), 1e-12)


@pytest.mark.parametrize("what", ["weight", "bias", "statistics"])
def test_writes_are_seen(what):
    block, plain = accelerate(make("wespeaker")), make("wespeaker")
    run(block)
    for module in (block, plain):
        with torch.no_grad():
            if what == "weight":
                module.convs[1].weight.mul_(2)
            elif what == "bias":
                module.bns[2].bias.add_(1)
            else:  # statistics move without a new version
                module.bns.train()
                module(X)
                module.bns.eval()
    assert_close(run(block), run(plain), 1e-12)
    assert explain(block)[0].fused


@pytest.mark.parametrize("name", ["speechbrain_style", "espnet"])
def test_compile_and_export(name):
    block = accelerate(make(name))
    expected = run(block)
    with torch.no_grad():
        assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(X), expected, 1e-12)
        assert_close(torch.export.export(block, (X,)).module()(X), expected, 1e-12)


def test_every_backend_and_a_choice_that_cannot_run():
    block = make("speechbrain_style")
    expected = run(block)
    for backend in ("reference", "cpu"):
        accelerate(block, backend=backend)
        assert_close(run(block), expected, 1e-12)
        assert explain(block)[0].backend == backend
    accelerate(block, backend="cuda")
    with pytest.raises(RuntimeError, match="it has no 1-D kernels"):
        run(block)


@pytest.mark.parametrize(
    ("make", "shape", "fused"),
    [(SpeechBrainChain, (1, 300), True), (SpeechBrainChain, (4, 900), True), (WeSpeakerChain, (1, 200), True),
     (WeSpeakerChain, (16, 300), False)],
)  # fmt: skip
def test_left_to_itself_the_chain_runs_fused_where_that_is_measured_faster(make, shape, fused, monkeypatch):
    monkeypatch.undo()
    block = accelerate(make(512).eval())
    x = torch.randn(shape[0], 512, shape[1])
    run(block, x)
    (report,) = explain(block)
    assert report.fused is fused, report
    assert fused or "not measured" in report.reason
    block(x)
    assert explain(block)[0].fused is False, "gradients are not measured"
    accelerate(block, backend="cpu")
    run(block, x)
    assert explain(block)[0].fused


@pytest.mark.parametrize("where", ["blocks.0.conv.conv", "blocks.2.activation", "blocks.1"])
def test_hooks_fire_as_before(where):
    block = make("speechbrain_style")
    expected = run(block)
    accelerate(block)
    calls = []
    handle = block.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    assert_close(run(block), expected, 1e-12)
    assert calls == [1] and "hook" in explain(block)[0].reason
    handle.remove()
    run(block)
    assert explain(block)[0].fused


def test_a_replaced_module_is_noticed():
    block = accelerate(make("speechbrain_style"))
    block.blocks[1].activation = nn.Sigmoid().eval()
    expected = run(restore(copy.deepcopy(block)))
    assert torch.equal(run(block), expected)
    assert "replaced" in explain(block)[0].reason


# Left alone -------------------------------------------------------------------------------------------------------------


def test_a_slope_that_changes_is_noticed():
    block = accelerate(make("leaky_relu"))
    run(block), run(block)
    block.relu.negative_slope = 0.7
    assert_close(run(block), run(restore(copy.deepcopy(block))), 1e-12)
    assert not explain(block)[0].fused


class NormFirst(WeSpeakerChain):
    """The usual order: convolution, norm, ReLU."""

    def forward(self, x):
        pieces = torch.split(x, self.width, 1)
        out, sp = [], pieces[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            sp = torch.relu(bn(conv(sp if i == 0 else sp + pieces[i])))
            out.append(sp)
        return torch.cat([*out, pieces[-1]], 1)


def strided():
    block = WeSpeakerChain()
    block.convs[2] = nn.Conv1d(4, 4, 3, 2, padding=2, dilation=2)
    return block


def normalised_otherwise():
    block = WeSpeakerChain()
    block.bns[1] = nn.InstanceNorm1d(4, track_running_stats=True)
    return block


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (NormFirst(), "no known recurrence agrees"),
        (SpeechBrainChain(activation=nn.Tanh), "no known recurrence agrees"),
        (strided(), "has a stride"),
        (normalised_otherwise(), "InstanceNorm1d"),
    ],
    ids=["norm_first", "tanh", "strided", "instance_norm"],
)
def test_left_alone(block, words):
    own = type(block)
    accelerate(block)
    assert type(block) is own
    (report,) = explain(block)
    assert report.fused is False and words in report.reason


def test_other_lists_of_convolutions_are_no_blocks():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv1d(3, 8, 1), nn.Conv1d(8, 16, 1)])
            self.bns = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(16)])

    assert explain(accelerate(Other())) == []


def test_the_operator_computes_speechbrains_block():
    """The block's tensors, given to the operator by hand as the README says it."""
    block = make("speechbrain_style")
    units = list(block.blocks)
    norms = [unit.norm.norm for unit in units]
    scales = [n.weight * (n.running_var + n.eps).rsqrt() for n in norms]
    shifts = [n.bias - n.running_mean * scale for n, scale in zip(norms, scales, strict=True)]
    convs = [unit.conv.conv for unit in units]
    out = hierarchical_conv1d(
        X, [c.weight for c in convs], [c.bias for c in convs], scales, shifts,
        passthrough="first", padding_mode="reflect", dilation=2,
    )  # fmt: skip
    assert_close(out, run(block), 1e-12)
