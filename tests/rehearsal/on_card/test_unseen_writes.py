"""Writes that PyTorch does not see, on cards: noticed at most one call later, with a warning, and nothing is waited for."""

import copy
import warnings

import pytest
import torch
from helpers import randomize
from on_card import capture, counter
from published_blocks.speakers1d import SpeechBrainChain
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain, freeze
from res2net_fused.modules.weight_samples import WRITTEN_UNSEEN
from res2net_fused.patching.explain import OUTDATED


def make(kind):
    if kind == "1d":
        block = accelerate(randomize(SpeechBrainChain()), backend="reference")
        return block.cuda().eval(), torch.randn(4, 32, 23, device="cuda")
    model = nn.Sequential(*(randomize(Bottle2neck(32, 8), seed) for seed in range(3 if kind == "model" else 1)))
    return accelerate(model.cuda().eval()), torch.randn(2, 32, 5, 6, device="cuda")


kinds = pytest.mark.parametrize("kind", ["block", "model", "1d"])


def infer(model, x):
    with torch.no_grad():
        return model(x)


def average(model):
    for parameter in model.parameters():
        parameter.data.copy_(parameter * 0.9 + 0.01)


def quietly(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return infer(model, x)


@kinds
def test_swapped_weights_are_noticed_one_call_later(kind):
    model, x = make(kind)
    before = quietly(model, x)
    for _ in range(4):
        assert torch.equal(quietly(model, x), before)
    average(model)
    assert torch.equal(quietly(model, x), before)
    assert all(OUTDATED in report.reason for report in explain(model))
    with pytest.warns(UserWarning) as caught:
        after = infer(model, x)
    assert [str(warning.message) for warning in caught] == [WRITTEN_UNSEEN] and "refresh" in WRITTEN_UNSEEN
    assert torch.equal(after, infer(copy.deepcopy(model), x)) and not torch.equal(after, before)
    assert all(OUTDATED not in report.reason for report in explain(model))
    for _ in range(4):
        assert torch.equal(quietly(model, x), after)


@kinds
def test_nothing_is_waited_for(kind):
    model, x = make(kind)
    waits = counter("host_waits")
    for _ in range(5):
        infer(model, x)
    assert counter("host_waits") == waits


def test_one_block_of_a_model_looks_in_each_call():
    model, x = make("model")
    looks = []
    for _ in range(7):
        before = counter("operators")
        infer(model, x)
        looks.append(counter("operators") - before)
    assert len(set(looks[1:])) == 1, looks
    single, _ = make("block")
    infer(single, x)
    before = counter("operators")
    infer(single, x)
    assert 3 * (counter("operators") - before) > looks[-1]


def test_a_write_to_one_block_is_noticed_when_its_turn_has_come():
    model, x = make("model")
    infer(model, x)
    infer(model, x)
    model[1].conv3.weight.data.mul_(2)
    with pytest.warns(UserWarning, match="refresh"):
        for _ in range(4):
            infer(model, x)


def test_no_look_is_captured_or_frozen():
    model, x = make("model")
    infer(model, x)
    graph, out = capture(lambda: infer(model, x))
    average(model)
    graph.replay()
    assert torch.equal(out, infer(copy.deepcopy(model), x))  # a graph folds at each replay
    freeze(model)
    before = quietly(model, x)
    average(model)
    for _ in range(3):
        assert torch.equal(quietly(model, x), before)


def test_a_change_that_pytorch_sees_warns_of_nothing():
    model, x = make("model")
    for _ in range(3):
        quietly(model, x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        assert torch.equal(quietly(model, x), infer(copy.deepcopy(model), x))


def test_nan_is_no_change():
    model, x = make("block")
    with torch.no_grad():
        model[0].conv1.weight[0] = torch.nan
    for _ in range(4):
        quietly(model, x)
