"""`accelerate` hands channels-last to models whose images come in NCHW, and whoever looks at their weights finds them whole."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, randomize
from official_models import IMAGES, blocks_of, official, run
from official_style import Bottle2neck
from published_blocks.speakers import BasicBlockRes2Net
from torch import nn
from torch.nn.utils import parameters_to_vector, prune

from res2net_fused import accelerate, explain, restore
from res2net_fused.backends import policy
from res2net_fused.patching.channels_last import hand_on


@pytest.fixture
def model():
    return official()


def strides(model):
    return [p.stride() for p in model.parameters()]


def convolutions(model, pointwise):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and (m.kernel_size == (1, 1)) == pointwise]


def in_channels_last(model, pointwise=True):
    weights = [conv.weight for conv in convolutions(model, pointwise)]
    found = [w.stride()[1:] == (1, w.shape[3] * w.shape[1], w.shape[1]) for w in weights]
    assert all(found) or not any(found)
    return found[0]


def test_weights_keep_identity_values_memory_and_keys(model):
    before = {key: (id(p), p.data_ptr(), p.detach().clone()) for key, p in model.named_parameters()}
    accelerate(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and in_channels_last(model) and not in_channels_last(model, pointwise=False)
    for key, (identity, pointer, values) in before.items():
        assert (id(after[key]), after[key].data_ptr()) == (identity, pointer) and torch.equal(after[key], values)


def hooked(model):
    return [name for name, module in model.named_modules() if hand_on in module._forward_pre_hooks.values()]


def test_the_stem_converts_its_images(model):
    accelerate(accelerate(model))
    assert hooked(model) == ["conv1"] and len(model.conv1._forward_pre_hooks) == 1
    assert not model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    out = run(model.conv1, IMAGES)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert run(model.conv1, IMAGES[0]).shape == out.shape[1:], "an image without a batch is left as it is"
    own = model.conv1.register_forward_pre_hook(lambda module, args: None)
    restore(model)
    assert not hooked(model) and list(model.conv1._forward_pre_hooks) == [own.id]


@pytest.mark.parametrize("record", [torch.jit.script, lambda m: torch.jit.trace(m, IMAGES), torch.fx.symbolic_trace])
def test_recorders_take_the_stem(model, record):
    stem = nn.Sequential(accelerate(model).conv1, nn.ReLU())
    recorded = record(stem)
    assert torch.equal(run(recorded, IMAGES), run(stem, IMAGES))
    assert run(recorded, IMAGES).is_contiguous(memory_format=torch.channels_last)


def test_blocks_behind_nchw_images_meet_channels_last(model):
    expected = run(copy.deepcopy(model).double(), IMAGES.double())
    out = run(accelerate(model), IMAGES)
    assert_close(out, expected, 1e-5)
    assert all("channels_last" in report.plan for report in explain(model)) and len(explain(model)) == len(blocks_of(model))


def test_explain_says_where_a_block_meets_nchw(model):
    run(accelerate(model, memory_format=torch.preserve_format), IMAGES)
    remedy = "model.to(memory_format=torch.channels_last) avoids it"
    assert all(remedy in report.reason for report in explain(model))
    run(model.to(memory_format=torch.channels_last), IMAGES)
    assert not any(remedy in report.reason for report in explain(model))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bare_block_gives_what_eager_gives_with_such_weights(stride):
    downsample = nn.Sequential(nn.Conv2d(32, 64, 1, stride, bias=False), nn.BatchNorm2d(64))
    block = randomize(Bottle2neck(32, 16, stride, downsample, stype="stage" if stride > 1 else "normal")).eval()
    x = torch.randn(2, 32, 9, 7)
    expected = run(copy.deepcopy(block).double(), x.double())
    eager = run(copy.deepcopy(block).to(memory_format=torch.channels_last), x)
    out = run(accelerate(block), x)
    assert_close(out, expected, 1e-5)
    assert out.stride() == eager.stride() and explain(block)[0].fused


def bare_blocks():
    first = Bottle2neck(32, 16, 2, nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64)), stype="stage")
    return randomize(nn.Sequential(first, nn.Identity(), Bottle2neck(64, 16)))


def test_bare_blocks_keep_the_format_where_their_own_forward_trains(training_pays, monkeypatch):
    """Converted by every other of their convolutions they would lose to eager NCHW."""
    monkeypatch.setattr(policy, "training_pays", training_pays)
    eager = bare_blocks()
    blocks = accelerate(copy.deepcopy(eager))
    assert strides(blocks) == strides(eager)
    outs, gradients = [], []
    for network in (eager, blocks):
        x = torch.randn(2, 32, 9, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outs.append(network(x))
        gradients.append(torch.autograd.grad(outs[-1].square().mean(), [x, *network.parameters()]))
    assert outs[1].is_contiguous() and torch.equal(outs[0], outs[1])
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*gradients, strict=True))
    for report in explain(blocks):
        assert not report.fused and "x.contiguous(memory_format=torch.channels_last)" in report.reason
    blocks(x.contiguous(memory_format=torch.channels_last))
    assert not any("x is NCHW" in report.reason for report in explain(blocks))


def test_bare_blocks_convert_where_the_operator_trains():
    eager = bare_blocks().double()
    blocks = accelerate(copy.deepcopy(eager).float())
    assert strides(blocks) == strides(eager)
    x = torch.randn(2, 32, 9, 7)
    out, expected = blocks(x), eager(x.double())
    assert out.is_contiguous(memory_format=torch.channels_last) and all(report.fused for report in explain(blocks))
    assert_close(out, expected, 1e-5)
    gradients = (
        torch.autograd.grad(y.square().mean(), list(network.parameters())) for y, network in ((out, blocks), (expected, eager))
    )
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda blocks: pickle.loads(pickle.dumps(blocks))], ids=["copied", "pickled"]
)
def test_bare_blocks_convert_in_eval_mode(through):
    blocks = through(accelerate(bare_blocks().eval()))
    x = torch.randn(2, 32, 9, 7)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = blocks(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert all(report.fused and "channels_last" in report.plan for report in explain(blocks))
    assert run(accelerate(blocks, memory_format=torch.contiguous_format), x).is_contiguous()
    assert run(accelerate(blocks, memory_format=torch.preserve_format), x).is_contiguous()


def test_blocks_of_a_network_are_not_bare():
    """Even where their own call came first: what stands in front of them converts then, and their weights."""
    block = accelerate(bare_blocks())
    network = nn.Sequential(nn.Conv2d(3, 32, 3), block)
    accelerate(network)
    assert hooked(network) == ["0"] and in_channels_last(block)
    assert network(torch.randn(2, 3, 9, 7)).is_contiguous(memory_format=torch.channels_last)


def test_restore_gives_the_strides_back(model):
    before = strides(model)
    accelerate(accelerate(model), memory_format=torch.channels_last)
    assert in_channels_last(model, pointwise=False) and strides(restore(model)) == before


@pytest.mark.parametrize(
    "wanted, one_by_one, others",
    [(torch.preserve_format, False, False), (torch.contiguous_format, False, False), (torch.channels_last, True, True)],
    ids=["keep", "nchw", "channels_last"],
)
def test_a_format_can_be_named(model, wanted, one_by_one, others):
    values = copy.deepcopy(model.state_dict())
    accelerate(model, memory_format=wanted)
    assert in_channels_last(model) is one_by_one and in_channels_last(model, pointwise=False) is others and not hooked(model)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_an_unknown_format_is_refused(model):
    with pytest.raises(ValueError, match="memory_format is torch.channels_last_3d; allowed are None"):
        accelerate(model, memory_format=torch.channels_last_3d)


def test_what_runs_no_kernel_keeps_its_strides(model):
    for others, backend in ((nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3)), "auto"), (model, "reference")):
        before = strides(others)
        assert strides(accelerate(others, backend=backend)) == before and not hooked(others)
    half = official().half()
    assert strides(accelerate(half)) == strides(official())


def test_weights_of_other_kinds_stay(model):
    tied = convolutions(model, pointwise=True)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    tied[3].weight = tied[2].weight
    frozen = copy.deepcopy(tied[2].weight)
    model.layer2.to("meta")
    accelerate(model)
    assert "weight" not in model.layer1[0].conv1._parameters
    assert tied[3].weight is tied[2].weight and torch.equal(tied[2].weight, frozen) if not tied[2].weight.is_meta else True
    assert all(p.stride() == q.stride() for p, q in zip(model.layer2.parameters(), official().layer2.parameters(), strict=True))


def test_shared_memory_stays_shared(model):
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    for p, piece in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        piece.copy_(p.detach().flatten())
        p.data = piece.view_as(p)
    expected = run(copy.deepcopy(model).double(), IMAGES.double())
    accelerate(model, memory_format=torch.channels_last)
    assert in_channels_last(model) and not in_channels_last(model, pointwise=False)
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == {flat.data_ptr()}
    assert_close(run(model, IMAGES), expected, 1e-5)


def trained(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES.double()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_an_optimizer_goes_on_with_its_state(model, options, monkeypatch):
    """PyTorch's fused ones on CPUs walk through the memory of weight, gradient and state side by side."""
    monkeypatch.setattr(policy, "channels_last_pays", lambda device, dtype: True)
    model = model.double()
    plain = copy.deepcopy(model)
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3, **options)
        trained(each, optimizer, 2)
        if each is model:
            accelerate(model)
            assert in_channels_last(model)
        trained(each, optimizer, 2)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, 1e-9)


def test_pruning_vectors_and_lbfgs_take_the_weights_as_they_are(model):
    accelerate(model)
    vector = parameters_to_vector(model.parameters())
    assert torch.equal(vector, torch.cat([p.flatten() for p in model.parameters()]))
    block = next(iter(blocks_of(model).values()))
    prune.l1_unstructured(block.convs[0], "weight", 0.5)
    prune.global_unstructured([(block.conv1, "weight"), (block.conv3, "weight")], prune.L1Unstructured, amount=0.3)
    for part in (block.convs[0], block.conv1, block.conv3):
        prune.remove(part, "weight")
    expected = run(restore(copy.deepcopy(model)).double(), IMAGES.double())
    assert_close(run(model, IMAGES), expected, 1e-5)

    conv = block.conv1
    optimizer = torch.optim.LBFGS(conv.parameters(), max_iter=2)

    def loss():
        optimizer.zero_grad()
        value = conv(torch.ones(1, conv.in_channels, 3, 3)).square().sum()
        value.backward()
        return value

    before = loss()
    optimizer.step(loss)
    assert loss() < before


def test_copies_and_pickles_keep_the_format(model):
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert strides(other) == strides(model) and hooked(other) == ["conv1"]
        assert strides(restore(other)) == strides(official())


def test_speaker_blocks_run_fused_behind_nchw():
    """Their clamped chains are measured to gain in channels-last only."""
    blocks = BasicBlockRes2Net(16, 16), BasicBlockRes2Net(32, 16)
    model = randomize(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *blocks)).eval()
    x = torch.randn(2, 1, 10, 14)
    expected = run(copy.deepcopy(model).double(), x.double())
    assert_close(run(accelerate(model), x), expected, 1e-5)
    assert [report.fused for report in explain(model)] == [True, True]
