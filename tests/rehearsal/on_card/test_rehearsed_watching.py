"""Writes that PyTorch does not see on stand-in cards: noticed one call later, with one warning, by one launch a model call."""

import contextlib
import copy
import gc
import pickle
import warnings

import pytest
import torch
from card.triton_driver import LAUNCHES
from helpers import assert_close, randomize, run_together
from on_card import capture
from published_blocks.speakers1d import SpeechBrainChain
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain, freeze, refresh
from res2net_fused.backends.triton import samples
from res2net_fused.modules import watched_weights
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.patching.explain import OUTDATED

X = torch.randn(2, 32, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def nothing_fails(monkeypatch):
    failed = set()
    monkeypatch.setattr(watched_weights, "_failed", failed)
    yield
    assert not failed


def make(count=3, device="cuda", seed=0):
    """Blocks one behind the other, in float64: a stale value cannot hide behind rounding."""
    blocks = [randomize(Bottle2neck(32, 8).double(), seed + i) for i in range(count)]
    return nn.Sequential(*blocks).to(device).eval()


def images(model):
    return X.to(next(model.parameters()).device)


def infer(model, x=None):
    x = images(model) if x is None else x
    with torch.no_grad():
        return model(x)


def own(model, x=None):
    x = images(model) if x is None else x
    with torch.no_grad():
        for block in model:
            x = ReferenceBottle2neck.forward(block, x)
    return x


def average(model):
    """Weights swapped as torch-ema does."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter * 0.9 + 0.01)


class Seen(list):
    """The blocks of each comparing launch that was made, and `said`: the warnings."""

    said: list[str]


@contextlib.contextmanager
def seen():
    found = Seen()
    own_launch = samples.compare_samples

    def counted(table, noticed):
        found.append(len(table))
        own_launch(table, noticed)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(watched_weights, "compare_samples", counted)
        yield found
    found.said = [str(w.message) for w in caught if "refresh" in str(w.message)]


def assert_noticed(model, call=infer):
    """At the latest one call later, with one warning, and quiet again."""
    with seen() as found:
        call(model)
        call(model)
        assert_close(call(model), own(model), 1e-12)
    assert found.said == [watched_weights.WRITTEN]
    with seen() as found, LAUNCHES.recorded() as launches:
        assert_close(call(model), own(model), 1e-12)
    assert found == [len(model)] and not found.said
    assert [launch.kernel for launch in launches].count("compare_samples") == 1


WRITES = {
    "average": average,
    "one_weight": lambda m: m[1].convs[0].weight.data.mul_(2),
    "statistics": lambda m: m[2].bn3.running_var.data.mul_(2),
    "one_norm_bias": lambda m: m[0].bns[1].bias.data.add_(1),
    "sign_of_the_first": lambda m: m[0].conv1.weight.data.copysign_(-m[0].conv1.weight).mul_(2),
    "storage": lambda m: m[1].conv3.weight.untyped_storage().copy_((m[1].conv3.weight.detach() * 2).untyped_storage()),
}


QUICK = ("average", "one_norm_bias")
MARKED = [pytest.param(write, id=n, marks=[pytest.mark.slow] * (n not in QUICK)) for n, write in WRITES.items()]


@pytest.mark.parametrize("write", MARKED)
def test_dense_writes_are_noticed_one_call_later(write):
    model = make()
    before = infer(model)
    with seen() as found:
        assert torch.equal(infer(model), before) and torch.equal(infer(model), before)
    assert found == [3, 3] and not found.said
    for _ in range(2):
        write(model)
        assert_noticed(model)
    assert not torch.equal(infer(model), before)


def test_the_call_after_a_write_knows_nothing_yet():
    """One block by itself leads itself; `explain` compares every element and names what helps."""
    model = make(1)
    before = infer(model)
    average(model)
    assert OUTDATED in explain(model)[0].reason
    with seen() as found:
        assert torch.equal(infer(model), before)
        assert_close(infer(model), own(model), 1e-12)
        assert OUTDATED not in explain(model)[0].reason
    assert len(found.said) == 1


def test_what_is_seen_otherwise_warns_of_nothing():
    model = make()
    infer(model)
    with seen() as found:
        for change in (
            lambda: [p.mul_(1.1) for p in model.parameters()], lambda: model.load_state_dict(make(seed=7).state_dict()),
            lambda: refresh(model), lambda: average(model) or refresh(model), lambda: model.train().eval(),
        ):  # fmt: skip
            with torch.no_grad():
                change()
            for _ in range(3):
                assert_close(infer(model), own(model), 1e-12)
    assert not found.said


def test_nothing_is_launched_for_who_has_asked_for_nothing():
    frozen, training, differentiated = freeze(make()), make().train(), make()
    with LAUNCHES.recorded() as launches:
        before = infer(frozen)
        average(frozen)
        for _ in range(3):
            assert torch.equal(infer(frozen), before)
            training(X.cuda())
            differentiated(X.cuda()).sum().backward()
    assert "compare_samples" not in {launch.kernel for launch in launches}


def test_a_capture_holds_no_comparison():
    model = make()
    x = images(model)
    infer(model), infer(model)
    with LAUNCHES.recorded() as launches:
        graph, out = capture(lambda: infer(model, x))
        average(model)
        graph.replay()
    assert "compare_samples" not in {launch.kernel for launch in launches}
    assert_close(out, own(model), 1e-12)  # which folds at each replay
    assert_noticed(model)


def test_models_in_turns_watch_their_own_blocks():
    first, second = make(2), make(3, seed=5)
    for _ in range(2):
        infer(first), infer(second)
    with seen() as found:
        infer(first), infer(second), infer(first), infer(second)
    assert found == [2, 3, 2, 3]
    average(second)
    assert_noticed(second)
    with seen() as found:
        infer(first), infer(first)
    assert found == [2, 2] and not found.said


def test_parts_of_a_model_called_alone():
    model = make(4)
    for _ in range(3):
        infer(model)
    for part in (model[1:3], model[2:], model[3:]):
        infer(part), infer(part)
        average(part)
        assert_noticed(part)
        infer(model)
        with seen() as found:
            infer(model), infer(model)
        assert found == [4, 4] and not found.said
    average(model)
    with seen() as found:
        infer(model), infer(model)
        assert_close(infer(model), own(model), 1e-12)
    assert len(found.said) == 1


def test_1d_chains_notice_too():
    block = accelerate(randomize(SpeechBrainChain()).eval(), backend="reference").cuda()
    x = torch.randn(4, 32, 23, device="cuda")
    before = infer(block, x)
    average(block)
    with seen() as found:
        infer(block, x)
        after = infer(block, x)
    assert len(found.said) == 1 and not torch.equal(after, before)
    assert torch.equal(infer(refresh(block), x), after)


def test_two_cards_in_one_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make(2, "cuda:0"), make(2, "cuda:1", seed=3)

        def forward(self, x):
            return self.second(self.first(x).to("cuda:1"))

    model = Both()
    infer(model), infer(model)
    with seen() as found:
        infer(model)
    assert found == [2, 2]  # one launch on each
    average(model.second)
    with seen() as found:
        infer(model), infer(model)
        out = infer(model)
    assert len(found.said) == 1
    assert_close(out, own(model.second, own(model.first).to("cuda:1")), 1e-12)


def test_replicas():
    """Those on other cards are copied and folded at each call; the first one may have the model's own parameters."""
    model = nn.DataParallel(make(), [0, 1])
    infer(model), infer(model)
    average(model.module)
    infer(model)
    assert_close(infer(model), own(model.module), 1e-12)


def test_other_streams_wait_for_the_samples():
    model = make()
    infer(model), infer(model)
    with torch.cuda.stream(torch.cuda.Stream()):
        infer(model)
        average(model)
        assert_noticed(model)


@pytest.mark.parametrize("how", ["emptied", "replaced", "moved", "dropped"])
def test_what_is_gone_is_not_read(how):
    """No launch is told of an address at which no tensor of a block lies any more."""
    model = make()
    infer(model), infer(model)
    block, rest = model[1], nn.Sequential(model[0], model[2])
    weight = block.convs[0].weight
    data = weight.detach() * 2
    if how == "emptied":
        weight.data = torch.empty(0, dtype=data.dtype, device="cuda")
    elif how == "replaced":
        block.convs[0].weight = nn.Parameter(data)
    elif how == "moved":
        weight.data = data
    else:
        del model[1], block
    del weight
    gc.collect()
    with seen() as found:
        infer(rest)
    # What a block keeps holds the tensors that it was made of until the block is called again.
    assert found == [3 if how == "replaced" else 2] and not found.said
    if how == "emptied":
        block.convs[0].weight.data = data
    for _ in range(2):
        assert_close(infer(model), own(model), 1e-12)


def test_state_stays_out_of_copies_and_files():
    model = make()
    keys = set(model.state_dict())
    infer(model), infer(model)
    assert set(model.state_dict()) == keys
    assert "Watched" not in str(pickle.dumps(model)) and "Member" not in str(pickle.dumps(model))
    twin = copy.deepcopy(model)
    assert vars(twin[0])[STATE].member is None
    infer(twin), infer(twin)
    average(twin)
    assert_noticed(twin)
    with seen() as found:
        infer(model), infer(model)
    assert not found.said


def test_threads_watch_for_themselves():
    model = make()
    infer(model)
    run_together(*[lambda: [infer(model) for _ in range(5)]] * 3)
    average(model)
    assert_noticed(model)


def test_memory_is_bounded():
    """Models come and go in one outer module, as in a search; what watched them goes with them."""

    class Outer(nn.Module):
        def forward(self, x, inner):
            return inner[0](x)

    outer = Outer()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        outer(X.cuda(), [keeper := make(1)])
        for _ in range(5):
            outer(X.cuda(), [make(1)])
    gc.collect()
    together = vars(keeper[0])[STATE].member.leads
    with torch.no_grad():
        outer(X.cuda(), [make(1)])
    assert len(together.references) <= 3
    del keeper, together
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**16


def test_where_the_kernel_cannot_run_nothing_else_changes(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no compiler")

    model = make()
    with monkeypatch.context() as patch:
        patch.setattr(watched_weights, "keep_samples", fails)
        before = infer(model)
        average(model)
        for _ in range(3):
            assert torch.equal(infer(model), before)
    assert "no compiler" in caplog.text and len(caplog.records) == 1
    assert OUTDATED in explain(model)[0].reason
    watched_weights._failed.clear()
    assert_close(infer(refresh(model)), own(model), 1e-12)
