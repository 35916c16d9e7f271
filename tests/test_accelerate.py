"""`accelerate` and `restore` on models that know nothing of this package: hand-written in the published style, and timm's."""

import copy
import io
import pickle

import pytest
import torch
from helpers import SqueezeExcite, assert_close, randomize, relative_error, timm_or_skip
from official_style import (
    Bottle2neck,
    FirstPassesBottle2neck,
    IdentityPassBottle2neck,
    Res2Net,
    UncountedPadBottle2neck,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

from res2net_fused import accelerate, explain, freeze, recognition, restore
from res2net_fused.fused_block import STATE, FusedForward

BLOCK_KINDS = {
    "official": Bottle2neck,
    "identity_pass": IdentityPassBottle2neck,
    "uncounted_pad": UncountedPadBottle2neck,
    "first_passes": FirstPassesBottle2neck,
}
IMAGES = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(4))


def official(block=Bottle2neck, **keywords):
    return randomize(Res2Net(block, **keywords)).eval()


def timm_model(name, **keywords):
    timm = timm_or_skip()
    sizes = {"layers": (2, 1, 1, 1), "channels": (16, 24, 32, 40), "num_classes": 5}
    return randomize(timm.create_model(name, **sizes, **keywords)).eval()


MODELS = {
    "official": lambda: official(),
    "official_s8": lambda: official(baseWidth=14, scale=8),
    "official_s2": lambda: official(baseWidth=48, scale=2),
    "official_s1": lambda: official(baseWidth=64, scale=1),
    "identity_pass": lambda: official(IdentityPassBottle2neck),
    "uncounted_pad": lambda: official(UncountedPadBottle2neck),
    "timm_26w_4s": lambda: timm_model("res2net50_26w_4s"),
    "timm_14w_8s": lambda: timm_model("res2net50_14w_8s"),
    "timm_next": lambda: timm_model("res2next50"),
    "timm_d": lambda: timm_model("res2net50d"),
    "timm_se": lambda: timm_model("res2net50_26w_4s", block_args={"scale": 4, "attn_layer": SqueezeExcite}),
    "timm_dilated": lambda: timm_model("res2net50_26w_4s", output_stride=8),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def images_for(model):
    return IMAGES if isinstance(model, Res2Net) else torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def blocks_of(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "convs")}


def run(model, x):
    with torch.no_grad():
        return model(x)


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
def test_train_is_bitwise_the_same(make):
    model = make().train()
    accelerated = accelerate(copy.deepcopy(model))
    x = images_for(model)
    results = []
    for module in (model, accelerated):
        torch.manual_seed(7)
        out = module(x)
        out.square().sum().backward()
        results.append(out)
    assert torch.equal(*results)
    for (name, a), b in zip(model.state_dict().items(), accelerated.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(model.named_parameters(), accelerated.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


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
    config, reason = recognition.recognise(block)
    assert config is not None, reason
    assert (config.hierarchical, config.passthrough, config.pool) == expected
    assert (config.stride, config.dilation, config.groups) == (stride, 1, 1)


# What only looks like a Res2Net block ---------------------------------------------------------------------------------


class Scaled(Bottle2neck):
    def forward(self, x):
        return super().forward(x) * 1.001


class Shuffled(Bottle2neck):
    """Takes its groups in another order."""

    def pass_through(self, piece):
        return piece.flip(1)


class TrainsOtherwise(Bottle2neck):
    def forward(self, x):
        out = super().forward(x)
        return out * 0.5 if self.training else out


class NeedsMore(Bottle2neck):
    def forward(self, x, mask):
        return super().forward(x) * mask


class Broken(Bottle2neck):
    def forward(self, x):
        raise KeyError("cfg")


class LayerScale(Bottle2neck):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = nn.Parameter(torch.ones(32, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gamma


OTHERS = [Scaled, Shuffled, TrainsOtherwise, NeedsMore, Broken, LayerScale]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_block_that_computes_something_else_is_left_alone(kind):
    model = nn.Sequential(Bottle2neck(32, 8), kind(32, 8)).eval()
    accelerate(model)
    assert type(model[1]) is kind and isinstance(model[0], FusedForward)
    reports = {r.name: r for r in explain(model)}
    assert reports["1"].fused is False
    words = {"NeedsMore": "mask", "Broken": "KeyError"}.get(kind.__name__, "no known recurrence")
    assert words in reports["1"].reason


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "conv1", nn.Conv2d(32, 12, 3, padding=1)),
        lambda b: setattr(b, "conv3", nn.Linear(12, 32)),
        lambda b: b.convs.__setitem__(1, nn.Conv2d(3, 3, 5, padding=2)),
        lambda b: b.convs.__setitem__(1, nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        lambda b: b.convs.__setitem__(0, nn.Conv2d(3, 3, 3, padding=2, dilation=2)),
        lambda b: parametrizations.weight_norm(b.convs[0]),
    ],
    ids=["conv1_3x3", "conv3_linear", "5x5", "reflect", "one_dilated", "weight_norm"],
)
def test_structure_that_is_not_fused_is_left_alone(change):
    block = Bottle2neck(32, 8)
    change(block)
    accelerate(block)
    assert type(block) is Bottle2neck
    (report,) = explain(block)
    assert report.fused is False and "conv" in report.reason


class Configurable(Bottle2neck):
    """Its result depends on an attribute that is neither a number nor a module."""

    def __init__(self, *args, last=torch.relu, options=(1.0,), **kwargs):
        super().__init__(*args, **kwargs)
        self.last = last
        self.options = options

    def forward(self, x):
        return self.last(super().forward(x)) * self.options[0]


@pytest.mark.parametrize("settings", [{"last": torch.tanh}, {"options": (2.0,)}, {"options": [2.0]}], ids=str)
def test_blocks_of_one_class_with_other_settings_are_confirmed_apart(settings):
    plain, other = Configurable(32, 8).eval(), Configurable(32, 8, **settings).eval()
    x = torch.randn(2, 32, 5, 5)
    expected = run(other, x)
    accelerate(nn.Sequential(plain, other))
    assert isinstance(plain, FusedForward)
    assert type(other) is Configurable
    assert torch.equal(run(other, x), expected)


def test_confirmation_runs_once_per_configuration(monkeypatch):
    confirmed = []
    confirm = recognition._confirm
    monkeypatch.setattr(recognition, "_confirmed", {})
    monkeypatch.setattr(recognition, "_confirm", lambda block: confirmed.append(block) or confirm(block))
    accelerate(Res2Net(layers=(3, 3, 1)))
    assert len(confirmed) == 5  # three stage blocks of their own sizes, and a normal one for layer1 and for layer2
    accelerate(Res2Net(layers=(1, 2, 1)))
    assert len(confirmed) == 5


def test_recognition_leaves_the_model_and_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = official().train()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    accelerate(model)
    assert torch.equal(torch.rand(3), expected)
    assert seeded == [99, 99], "the GPUs' generators were seeded, and are not given back"
    assert all(m.training for m in model.modules())
    for (name, a), b in zip(model.state_dict().items(), state.values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("how", ["device", "inference", "no_grad", "autocast", "float64"])
def test_recognition_does_not_depend_on_the_callers_modes(how, monkeypatch):
    monkeypatch.setattr(recognition, "_confirmed", {})
    block = Bottle2neck(32, 8)
    contexts = {
        "device": torch.device("meta"),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    if how == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        with contexts.get(how, torch.enable_grad()):
            accelerate(block)
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(block, FusedForward), explain(block)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = Res2Net()
    accelerate(model)
    assert all(isinstance(b, FusedForward) for b in blocks_of(model).values())
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(official().state_dict(), assign=True)
    assert_close(run(model.eval(), IMAGES), run(official(), IMAGES), 5e-6)


def test_other_models_are_not_touched():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert accelerate(model) is model
    assert explain(model) == [] and "0 of 0" in str(explain(model))


def test_bad_arguments():
    with pytest.raises(TypeError, match="model is a Tensor; an nn.Module"):
        accelerate(torch.zeros(1))
    with pytest.raises(ValueError, match="backend is 'tpu'; allowed are 'auto', 'reference'"):
        accelerate(Res2Net(), backend="tpu")


def test_backend_is_used_and_can_be_changed():
    model = accelerate(official(), backend="triton")
    with torch.no_grad(), pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        model.double()(IMAGES.double())
    accelerate(model, backend="reference")
    run(model, IMAGES.double())
    assert {r.backend for r in explain(model)} == {"reference"}


# Eligibility, at each call --------------------------------------------------------------------------------------------


def fired_by(model, module, x=IMAGES):
    """How often a forward hook on `module` fires in one call of `model`, and what the model returns."""
    calls = []
    handle = module.register_forward_hook(lambda m, i, o: calls.append(m))
    out = run(model, x)
    handle.remove()
    return len(calls), out


@pytest.mark.parametrize("where", ["layer1.1", "layer1", "layer1.1.downsample", "layer2.0.downsample"])
def test_hooks_outside_the_chain_fire_and_keep_it_fused(where):
    model = official()
    module = dict(model.named_modules()).get(where)
    if module is None:
        pytest.skip("no such module in this block")
    expected = run(model, IMAGES)
    accelerate(model)
    count, out = fired_by(model, module)
    assert count == 1
    assert_close(out, expected, 5e-6)
    assert all(r.fused for r in explain(model))


INNER = ["conv1", "bn1", "convs.0", "convs.2", "bns.1", "conv3", "bn3", "relu", "pool"]


@pytest.mark.parametrize("where", INNER)
def test_hooks_inside_the_chain_fire_as_before(where):
    model = official()
    module = model.layer2[0].get_submodule(where)
    expected_count, expected = fired_by(model, module)
    accelerate(model)
    run(model, IMAGES)
    count, out = fired_by(model, module)
    assert count == expected_count >= 1
    assert_close(out, expected, 5e-6)
    run(model, IMAGES)
    assert all(r.fused for r in explain(model)), "the hook is gone"


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_other_hooks_inside_the_chain(kind):
    model = accelerate(official())
    calls = []
    register = getattr(model.layer1[1].convs[1], f"register_{kind}_hook")
    register(lambda *args: calls.append(1) and None)
    model(IMAGES).sum().backward()
    assert calls
    reports = {r.name: r for r in explain(model)}
    assert reports["layer1.1"].fused is False and "hook" in reports["layer1.1"].reason
    assert reports["layer1.0"].fused


def test_global_hooks_see_every_module():
    model = official()
    accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        run(model, IMAGES)
    finally:
        handle.remove()
    assert model.layer1[1].convs[0] in seen


def test_feature_extraction_by_a_hook_that_changes_the_output():
    model = official()
    change = lambda m, i, o: o * 0  # noqa: E731
    model.layer1[1].bns[0].register_forward_hook(change)
    expected = run(model, IMAGES)
    assert_close(run(accelerate(model), IMAGES), expected, 5e-6)


def circular(conv):
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False, padding_mode="circular")


def new_pool(block):
    block.pool = nn.MaxPool2d(3, 2, padding=1)


CHANGES = {
    # what a user may do after accelerate: the change to layer2.0, and a word of the reason
    "weight_norm": (lambda b: parametrizations.weight_norm(b.convs[0]), "parametrized"),
    "spectral_norm": (lambda b: parametrizations.spectral_norm(b.conv1), "parametrized"),
    "pruning": (lambda b: prune.l1_unstructured(b.convs[1], "weight", 0.5), "hook"),
    "group_norm": (lambda b: setattr(b, "bn1", nn.GroupNorm(1, b.bn1.num_features)), "GroupNorm"),
    "identity_norm": (lambda b: b.bns.__setitem__(0, nn.Identity()), "Identity"),
    "sync_norm": (lambda b: nn.SyncBatchNorm.convert_sync_batchnorm(b), "SyncBatchNorm"),
    "one_norm_in_training": (lambda b: b.bns[1].train(), "training"),
    "dropped_statistics": (lambda b: setattr(b.bn3, "running_mean", None) or setattr(b.bn3, "running_var", None), "statistics"),
    "dilation": (lambda b: [setattr(c, "dilation", (2, 2)) or setattr(c, "padding", (2, 2)) for c in b.convs], "geometry"),
    "padding_mode": (lambda b: setattr(b, "convs", nn.ModuleList(circular(c) for c in b.convs)), "geometry"),
    "activation": (lambda b: setattr(b, "relu", nn.GELU()), "GELU"),
    "pool": (new_pool, "pool"),
    "pool_settings": (lambda b: setattr(b.pool, "count_include_pad", False), "pool"),
    "instance_forward": (lambda b: setattr(b.convs[0], "forward", lambda u: u[:, :, ::2, ::2] * 2), "forward"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_what_cannot_run_fused_runs_the_original(change, reason, frozen):
    model = official()
    plain = copy.deepcopy(model)
    accelerate(model)
    run(model, IMAGES)
    if frozen:
        freeze(model)
    for m in (model, plain):
        torch.manual_seed(3)
        change(m.layer2[0])
    assert_close(run(model, IMAGES), run(plain, IMAGES), 5e-6)
    report = {r.name: r for r in explain(model)}["layer2.0"]
    assert report.fused is False and reason in report.reason
    assert sum(r.fused is True for r in explain(model)) == len(blocks_of(model)) - 1


def test_becoming_eligible_again():
    model = accelerate(official())
    handle = model.layer1[0].conv1.register_forward_hook(lambda m, i, o: None)
    run(model, IMAGES)
    assert not explain(model)[0].fused
    handle.remove()
    run(model, IMAGES)
    assert explain(model)[0].fused


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


def test_restore_forgets_refusals():
    block = Scaled(32, 8)
    attributes = sorted(vars(block))
    restore(accelerate(block))
    assert sorted(vars(block)) == attributes


def test_restore_of_a_plain_model_does_nothing():
    model = official()
    restore(model)
    assert type(model.layer1[0]) is Bottle2neck


class Sharded:
    """As FSDP2's FSDPModule: put in front of a module's class, by `__class__`."""

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
