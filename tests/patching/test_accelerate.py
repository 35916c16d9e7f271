"""`accelerate` and `restore` on models that know nothing of this package: hand-written in the published style, and timm's."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_close, randomize, relative_error
from official_models import BLOCK_KINDS, IMAGES, MODELS, blocks_of, images_for, models, official, run
from official_style import (
    Bottle2neck,
    FirstPassesBottle2neck,
)
from torch import nn

from res2net_fused import accelerate, explain, restore
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.fused_forward import FusedForward
from res2net_fused.patching import recognition

# Results --------------------------------------------------------------------------------------------------------------


@models
def test_eval_results_stay_and_every_block_is_fused(make):
    model = make()
    x = images_for(model)
    own_classes = {name: type(m) for name, m in blocks_of(model).items()}
    keys = list(model.state_dict())
    before = run(model, x)
    exact = run(copy.deepcopy(model).double(), x.double())
    assert accelerate(model) is model
    after = run(model, x)
    assert relative_error(after, exact) <= max(4 * relative_error(before, exact), 5e-6)
    assert_close(after, before, 5e-6)
    reports = explain(model)
    assert {r.name for r in reports if r.fused} == set(own_classes)
    assert list(model.state_dict()) == keys
    for name, block in blocks_of(model).items():
        assert isinstance(block, own_classes[name])


@models
def test_training_mode_in_float64(make):
    model = make().double().train()
    accelerated = accelerate(copy.deepcopy(model))
    x = images_for(model).double()
    results = []
    for module in (model, accelerated):
        torch.manual_seed(7)
        out = module(x)
        out.square().sum().backward()
        results.append(out)
    assert_close(*results, 1e-12)
    assert all(report.fused for report in explain(accelerated))
    for a, b in zip(model.buffers(), accelerated.buffers(), strict=True):
        assert_close(a, b, 1e-14)
    for a, b in zip(model.parameters(), accelerated.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-10)


@pytest.mark.parametrize("kind", BLOCK_KINDS.values(), ids=BLOCK_KINDS.keys())
@pytest.mark.parametrize(("stype", "stride"), [("normal", 1), ("stage", 1), ("stage", 2)])
def test_each_kind_of_block_in_float64(kind, stype, stride):
    if kind is FirstPassesBottle2neck and stride > 1:
        pytest.skip("the CIFAR code strides in conv1")
    downsample = nn.Conv2d(32, 32, 1, stride, bias=False) if stype == "stage" else None
    block = randomize(kind(32, 8, stride, downsample, stype=stype).double()).eval()
    x = torch.randn(2, 32, 7, 9, dtype=torch.float64)
    expected = block(x)
    accelerate(block)
    assert_close(block(x), expected, 1e-12)
    assert_close(run(block, x), expected, 1e-12)
    assert explain(block)[0].fused
    x.requires_grad_()
    got = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    restore(block)
    for a, b in zip(got, torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]), strict=True):
        assert_close(a, b, 1e-11)


RECOGNISED = {
    # kind, stype, stride: hierarchical, passthrough, pool
    ("official", "normal", 1): (True, "last", None),
    ("official", "stage", 1): (False, "last", "avg3"),
    ("official", "stage", 2): (False, "last", "avg3"),
    ("identity_pass", "stage", 1): (False, "last", None),
    ("identity_pass", "stage", 2): (False, "last", "avg3"),
    ("uncounted_pad", "stage", 1): (False, "last", "avg3_nopad"),
    ("uncounted_pad", "stage", 2): (False, "last", "avg3_nopad"),
    ("first_passes", "normal", 1): (True, "first", None),
}


@pytest.mark.parametrize(("case", "expected"), RECOGNISED.items(), ids=lambda v: "-".join(map(str, v)))
def test_what_is_recognised(case, expected):
    """The same keys and shapes; the confirmation tells them apart, fresh blocks with zeroed bn3 included."""
    kind, stype, stride = case
    block = BLOCK_KINDS[kind](32, 8, stride, nn.Conv2d(32, 32, 1, stride), stype=stype)
    nn.init.zeros_(block.bn3.weight)
    recognised, reason = recognition.recognise(block, recognition.layout_of(block))
    assert recognised is not None, reason
    config = recognised.config
    assert (config.hierarchical, config.passthrough, config.pool) == expected
    assert (config.stride, config.dilation, config.groups) == (stride, 1, 1)


# What people do with models -------------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle_protocol2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "torch_save": saved_and_loaded,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("name", ["official", "uncounted_pad", "timm_26w_4s"])
def test_copies_run_fused_and_restore(name, duplicate):
    model = MODELS[name]()
    own = type(model.layer1[0])
    x = images_for(model)
    expected = run(accelerate(model), x)
    twin = duplicate(model)
    assert isinstance(twin.layer1[0], own) and type(twin.layer1[0]) is type(model.layer1[0])
    assert torch.equal(run(twin, x), expected)
    assert all(r.fused for r in explain(twin))
    restore(twin)
    assert type(twin.layer1[0]) is own
    assert torch.equal(run(model, x), expected), "the copy shares nothing with the model"


def test_files_of_the_state_dict_are_interchangeable():
    plain, model = official(), accelerate(official())
    randomize(plain, seed=8)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    run(model, IMAGES)
    model.load_state_dict(torch.load(file, weights_only=True))
    assert_close(run(model, IMAGES), run(plain, IMAGES), 5e-6)
    plain.load_state_dict(model.state_dict())


def test_functional_call():
    model, other = accelerate(official()), randomize(official(), seed=8)
    run(model, IMAGES)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        out = torch.func.functional_call(model, tensors, (IMAGES,))
    assert_close(out, run(other, IMAGES), 5e-6)
    assert_close(run(model, IMAGES), run(official(), IMAGES), 5e-6)


def test_compile_and_export():
    model = accelerate(official(layers=(2, 1, 1)))
    expected = run(model, IMAGES)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(IMAGES), expected, 5e-6)
        exported = torch.export.export(model, (IMAGES,)).module()
        assert_close(exported(IMAGES), expected, 5e-6)


def test_accelerating_twice_changes_nothing():
    model = accelerate(official())
    classes = [type(m) for m in model.modules()]
    expected = run(model, IMAGES)
    accelerate(model)
    assert classes == [type(m) for m in model.modules()]
    assert torch.equal(run(model, IMAGES), expected)
    restore(model)
    assert type(model.layer1[0]) is Bottle2neck


def test_fine_tuning_in_eval_mode():
    """Gradients through folded norms move an accelerated model as they move the plain one."""
    plain = official().double()
    model = accelerate(copy.deepcopy(plain))
    x = IMAGES.double()
    for m in (plain, model):
        optimizer = torch.optim.Adam(m.parameters(), 1e-3, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            m(x).square().mean().log().backward()
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(a, b) < 1e-6, name  # Adam divides by gradients that may be near zero
    assert_close(run(model, x), run(plain, x), 1e-6)


# restore --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["official", "timm_26w_4s"])
def test_restore_gives_everything_back(name):
    model = MODELS[name]()
    x = images_for(model)
    expected = run(model, x)
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    accelerate(model)
    run(model, x)
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(run(model, x), expected)


def test_restore_of_a_plain_model_does_nothing():
    model = official()
    restore(model)
    assert type(model.layer1[0]) is Bottle2neck


class Sharded:
    """Something put in front of a module's class by `__class__`, like FSDP2's FSDPModule."""

    def unshard(self):
        return "unsharded"


def put_on_top(module):
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (Sharded, cls), {"__doc__": cls.__doc__})


def test_a_class_swap_on_top_survives_restore():
    model = accelerate(official())
    expected = run(official(), IMAGES)
    put_on_top(model.layer1[0])
    assert_close(run(model, IMAGES), expected, 5e-6)
    assert all(r.fused for r in explain(model))
    restore(model)
    block = model.layer1[0]
    assert isinstance(block, Sharded) and isinstance(block, Bottle2neck) and not isinstance(block, FusedForward)
    assert block.unshard() == "unsharded" and type(block).__name__.startswith("FSDP")
    assert STATE not in vars(block)
    assert torch.equal(run(model, IMAGES), expected)


def test_a_class_swap_below_survives():
    """The other order: others swap first, then accelerate."""
    model = official()
    put_on_top(model.layer1[0])
    below = type(model.layer1[0])
    accelerate(model)
    assert isinstance(model.layer1[0], (FusedForward, Sharded))
    restore(model)
    assert type(model.layer1[0]) is below


def test_a_class_on_top_that_calls_super_survives_restore():
    model = accelerate(official())
    expected = run(official(), IMAGES)
    generated = type(model.layer1[0])

    class Counted(generated):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return super().forward(x)

    model.layer1[0].__class__ = Counted
    assert_close(run(model, IMAGES), expected, 5e-6)
    restore(model)
    assert torch.equal(run(model, IMAGES), expected)
    assert type(model.layer1[0]).__name__ == "Counted" and type(model.layer1[0]).calls >= 1


def test_a_class_on_top_survives_deepcopy():
    model = accelerate(official())
    put_on_top(model.layer1[0])
    twin = copy.deepcopy(model)
    assert isinstance(twin.layer1[0], Sharded)
    assert_close(run(twin, IMAGES), run(model, IMAGES), 0.0)


def test_two_blocks_under_one_class_on_top_stay_of_one_class():
    model = accelerate(official(layers=(3, 1, 1)))
    put_on_top(model.layer1[1])
    model.layer1[2].__class__ = type(model.layer1[1])
    restore(model)
    assert type(model.layer1[1]) is type(model.layer1[2])
