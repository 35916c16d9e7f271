"""A network's stem taken over by `accelerate`: float64's results, and PyTorch's own modules wherever somebody may look."""

import contextlib
import copy
import gc
import io
import pickle
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import BOUNDS, HALVES, assert_close, randomize, relative_error, run_together, timm_or_skip
from networks import small
from official_models import official, timm_model
from official_style import Bottle2neck
from official_style import Res2Net as Official
from torch import nn
from torch.nn.utils import parametrizations

from res2net_fused import accelerate, explain, freeze, refresh, restore
from res2net_fused._native import library
from res2net_fused.backends.cpu import stem as kernels
from res2net_fused.modules.block_state import STATE
from res2net_fused.patching.explain import OUTDATED
from res2net_fused.patching.stem import CHANGED, FusedStem

pytestmark = pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason)
X = torch.randn(2, 3, 38, 45, generator=torch.Generator().manual_seed(4))


class Published(Official):
    """The published layout: 7x7 and max pooling in front."""

    def __init__(self, **keywords):
        super().__init__(Bottle2neck, (2, 1, 1), **keywords)
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.rest(x)

    def rest(self, x):
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def published():
    return randomize(Published()).eval()


def ours(name):
    return lambda: randomize(small(name)).eval()


NETWORKS = {
    "published": published,
    "official_style": official,
    "timm": lambda: timm_model("res2net50_26w_4s"),
    "timm_d": lambda: timm_model("res2net50d"),
    "ours": ours("res2net50_26w_4s"),
    "ours_v1b": ours("res2net50_v1b"),
    "ours_dla": ours("dla60_res2net"),
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
both = pytest.mark.parametrize("make", [published, NETWORKS["timm_d"]], ids=["published", "timm_d"])


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def plain(model):
    """A copy that knows nothing of this package."""
    return restore(copy.deepcopy(model))


def assert_right(model, x=X):
    """Within what PyTorch's own rounding does to such a network, in float64 of its weights as they are now."""
    own = plain(model)
    exact = run(own.double(), x.double())
    assert_close(run(model, x), exact, 4 * relative_error(run(own.to(x.dtype), x), exact) + 1e-6)


@pytest.fixture
def calls(monkeypatch):
    """The x of every native call of a stem."""
    seen = []
    forward = kernels.stem_forward
    monkeypatch.setattr(kernels, "stem_forward", lambda x, *rest: seen.append(x) or forward(x, *rest))
    monkeypatch.setattr(kernels, "why_not_confirmed", lambda x, weights: None)
    return seen


def fused(model, calls, x=X):
    """Whether this call of the network takes the native stem, with the right result either way."""
    before = len(calls)
    assert_right(model, x)
    assert len(calls) - before <= 1
    assert explain(model).stems[0].fused == (len(calls) > before)
    return len(calls) > before


def accelerated(make, calls):
    model = accelerate(make())
    assert fused(model, calls)
    return model


# Results ------------------------------------------------------------------------------------------------------------------


@networks
def test_agrees_with_float64_and_is_listed(make, calls):
    model = make()
    blocks = len(explain(accelerate(model), X[:1]))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert fused(model, calls, X.contiguous(memory_format=layout))
    report = explain(model, X)
    assert len(report) == blocks == sum(r.fused is True for r in report), "the stem is none of the blocks"
    (stem,) = report.stems
    assert stem.fused and stem.backend == "cpu" and "by rows" in stem.plan and stem.name in str(report)
    assert f"{blocks} of {blocks} blocks fused" in str(report)


@both
@pytest.mark.parametrize("size", [(1, 3, 33, 32), (5, 3, 31, 34), (3, 3, 64, 31)], ids=str)
def test_sizes_and_batches(make, size, calls):
    model = accelerated(make, calls)
    assert fused(model, calls, torch.randn(size, generator=torch.Generator().manual_seed(8)))
    assert fused(model, calls, torch.randn(*size, generator=torch.Generator().manual_seed(8))[:, :, 1:, ::1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types(dtype, calls, monkeypatch):
    monkeypatch.setattr("res2net_fused.backends.policy.why_left_to_pytorch", lambda device, dtype: None)
    model = accelerate(published().to(dtype))
    got = {}
    model.layer1.register_forward_pre_hook(lambda module, args: got.update(x=args[0]))
    run(model, X.to(dtype))
    own = plain(model).double()
    exact = own.maxpool(own.relu(own.bn1(own.conv1(X.to(dtype).double()))))
    assert len(calls) == 1 and got["x"].dtype == dtype
    assert_close(got["x"], exact, BOUNDS[dtype])


@both
def test_the_first_block_is_handed_what_the_modules_would(make, calls):
    """Shape, memory format and values, NaN too."""
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        x = x.clone(memory_format=torch.preserve_format)
        x[1, 2, 9, 9] = torch.nan
        got = []
        for model in (make(), accelerate(make()), accelerate(make(), memory_format=torch.preserve_format)):
            model.layer1.register_forward_pre_hook(lambda module, args, got=got: got.append(args[0]))
            run(model, x)
        assert len(calls) >= 2
        assert got[1].is_contiguous(memory_format=torch.channels_last)
        assert got[2].stride() == got[0].stride()
        for found in got[1:]:
            assert torch.equal(found.isnan(), got[0].isnan()) and got[0].isnan().any()
            assert_close(found.nan_to_num(), got[0].nan_to_num())
        calls.clear()


def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch):
    forward = kernels.stem_forward
    monkeypatch.setattr(kernels, "_compared", {})
    monkeypatch.setattr(kernels, "stem_forward", lambda *arguments: forward(*arguments) * 1.01)
    model = accelerate(published())
    assert_right(model)
    assert "differs from float64" in explain(model).stems[0].reason


def test_other_backends_and_devices_leave_it_to_pytorch(calls, monkeypatch):
    model = accelerate(published(), backend="reference")
    assert not fused(model, calls) and "reference" in explain(model).stems[0].reason
    assert fused(accelerate(model), calls)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "reference")
    assert not fused(model, calls)


# Whoever looks between ---------------------------------------------------------------------------------------------------


@networks
def test_its_modules_are_untouched(make, calls):
    """Called by themselves they are what they were, and so are their classes."""
    model = make()
    before = {name: type(child) for name, child in model.named_modules() if name.split(".")[0] in vars(model)["_modules"]}
    own = plain(model)
    accelerate(model)
    run(model)
    stem = vars(model)[STATE].config
    count, u, v = len(calls), X, X
    for name in stem:
        u, v = getattr(model, name)(u), getattr(own, name)(v)
        assert_close(u, v)
        assert all(type(m) is before[n] for n, m in model.named_modules() if n.split(".")[0] == name)
    assert len(calls) == count and isinstance(model, type(own))


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda m, args, out: seen.append(out.clone())),
    "before": lambda module, seen: module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone())),
    "changes": lambda module, seen: module.register_forward_hook(lambda m, args, out: seen.append(out.clone()) or out + 1),
}


@pytest.mark.parametrize("part", ["conv1", "bn1", "relu", "maxpool"])
@pytest.mark.parametrize("kind", [k for k in HOOKS if k != "backward"])
def test_hooks_see_what_they_would(part, kind, calls):
    model = accelerated(published, calls)
    own, seen = plain(model), [[], []]
    handles = [HOOKS[kind](getattr(m, part), s) for m, s in zip((model, own), seen, strict=True)]
    before = len(calls)
    assert_close(run(model), run(own))
    assert len(calls) == before and "hook" in explain(model).stems[0].reason
    assert len(seen[0]) == len(seen[1]) == 1
    assert_close(seen[0][0], seen[1][0])
    handles[0].remove()
    assert fused(model, calls), "the hook is gone"


@pytest.mark.parametrize("part", ["conv1", "conv1.4", "bn1"])
def test_hooks_inside_a_deep_stem(part, calls):
    model = accelerated(NETWORKS["timm_d"], calls)
    seen = []
    handle = HOOKS["forward"](model.get_submodule(part), seen)
    assert not fused(model, calls) and seen
    handle.remove()
    assert fused(model, calls)


def test_hooks_of_the_network_and_of_its_stages_see_the_network(calls):
    model = accelerated(published, calls)
    count, seen = len(calls), []
    model.register_forward_hook(lambda module, args, out: seen.append(module))
    model.layer2.register_forward_hook(lambda module, args, out: seen.append(model.conv1))
    run(model)
    assert len(calls) == count + 1
    assert [type(module) for module in seen] == [nn.Conv2d, type(model)] and seen[1] is model


def test_global_hooks_see_every_call(calls):
    model = accelerated(published, calls)
    before, seen = len(calls), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    assert len(calls) == before and {model.conv1, model.bn1, model.relu, model.maxpool} <= set(seen)


def strided(model):
    model.conv1.stride = (1, 1)


def other_bn(model):
    model.bn1 = randomize(nn.Sequential(nn.BatchNorm2d(model.bn1.num_features)), seed=11).eval()


def gelu(model):
    model.relu = nn.GELU()


def larger_pool(model):
    model.maxpool.kernel_size = 5
    model.maxpool.padding = 2


def replaced_pool(model):
    model.maxpool = nn.AvgPool2d(2)


def instance_norm(model):
    model.bn1 = nn.InstanceNorm2d(model.bn1.num_features)


def patched(model):
    own = model.bn1.forward
    model.bn1.forward = lambda x: own(x) * 2


def patched_convolution(model):
    model.conv1._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias, 2, 3) + 1


def parametrized(model):
    parametrizations.weight_norm(model.conv1)


def grouped(model):
    model.conv1 = randomize(nn.Conv2d(3, model.conv1.out_channels, 7, 2, 3, dilation=2, bias=True), seed=12)


def reflected(model):
    model.conv1 = randomize(nn.Conv2d(3, model.conv1.out_channels, 7, 2, 3, padding_mode="reflect"), seed=12)


def same_padding(model):
    model.conv1 = randomize(nn.Conv2d(3, model.conv1.out_channels, 7, padding="same"), seed=12)


def indices(model):
    model.maxpool.ceil_mode = True


def rest_replaced(model):
    own = type(model).rest
    model.rest = types.MethodType(lambda self, x: own(self, x * 2), model)


REFUSED = [
    gelu, larger_pool, instance_norm, patched, patched_convolution, parametrized, grouped, reflected,
    same_padding, indices, rest_replaced,
]  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("before", [True, False])
def test_parts_that_are_not_fused(change, before, calls):
    """Before and after `accelerate`; the network's own modules run, and `explain` says why."""
    model = published()
    if not before:
        accelerate(model)
        assert fused(model, calls)
    change(model)
    if before:
        accelerate(model)
    own = copy.deepcopy(model) if change is not rest_replaced else model
    count = len(calls)
    out = run(model)
    assert len(calls) == count
    assert_close(out, run(restore(own)), 1e-5)
    if change is not rest_replaced:
        assert explain(model).stems[0].fused in (False, None) and len(explain(model).stems[0].reason) > 10


@pytest.mark.parametrize("change", [strided, other_bn, replaced_pool], ids=lambda f: f.__name__)
def test_parts_that_are_fused_as_they_are_now(change, calls):
    model = accelerated(published, calls)
    change(model)
    run(model)
    assert fused(model, calls)


def test_parts_in_training(calls):
    model = accelerated(published, calls)
    model.bn1.train()
    own, count = plain(model), len(calls)
    for _ in range(3):
        assert_close(run(model), run(own), 1e-5)
    assert len(calls) == count and "training" in explain(model).stems[0].reason
    assert_close(model.bn1.running_var, own.bn1.running_var)
    model.bn1.eval()
    assert fused(model, calls)
    model.train()
    own = plain(model)
    assert_close(run(model), run(own), 1e-4)
    assert len(calls) == count + 1
    model.eval()
    assert fused(model, calls)


def test_gradients_are_pytorch_s(calls):
    model = accelerated(published, calls)
    own, x, count = plain(model), X.clone().requires_grad_(), len(calls)
    model(x).square().sum().backward()
    assert len(calls) == count and "gradients" in explain(model).stems[0].reason
    gradient, x.grad = x.grad, None
    own(x).square().sum().backward()
    assert_close(gradient, x.grad, 1e-4)
    assert_close(model.conv1.weight.grad, own.conv1.weight.grad, 1e-4)
    model.requires_grad_(False)
    assert model(X).grad_fn is None and len(calls) == count + 1, "nothing wants a gradient"
    model.bn1.bias.requires_grad_(True)
    model(X).sum().backward()
    assert len(calls) == count + 1 and model.bn1.bias.grad is not None


def test_autocast_and_other_dtypes_are_pytorch_s(calls):
    model = accelerated(published, calls)
    count = len(calls)
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert len(calls) == count and "autocast" in explain(model).stems[0].reason
    with pytest.raises(RuntimeError, match="type"):
        run(model, X.double())
    with pytest.raises(RuntimeError, match="channels"):
        run(model, X[:, :2])
    run(model.double(), X.double())
    assert len(calls) == count
    assert fused(model.float(), calls)


# Whoever records, copies or rebuilds the network ----------------------------------------------------------------------------


def test_copies_and_files(calls, tmp_path):
    model = freeze(accelerated(published, calls))
    expected = run(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert isinstance(other, FusedStem) and fused(other, calls)
        assert_close(run(other), expected)
        with torch.no_grad():
            other.conv1.weight.mul_(2)
        assert fused(other, calls)
    assert torch.equal(run(model), expected)


def traced(model):
    return torch.jit.trace(model, X, check_trace=False)


def exported(model):
    return torch.export.export(model, (X,)).module()


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def recompiled(model):
    return torch.fx.symbolic_trace(model)


RECORDED = [
    *((f, "published") for f in (traced, exported, compiled, recompiled)),
    *((f, "timm_d") for f in (traced, recompiled, torch.jit.script)),
    *(pytest.param(f, "timm_d", marks=pytest.mark.slow) for f in (exported, compiled)),
    (torch.jit.script, "ours"),
]


@pytest.mark.parametrize("record,name", RECORDED, ids=lambda value: getattr(value, "__name__", value))
def test_recorded_networks_have_their_own_operators(record, name, calls):
    make = NETWORKS[name]
    model = accelerated(make, calls)
    expected, count = run(plain(model).double(), X.double()), len(calls)
    with torch.no_grad():
        found = record(model)
        assert_close(found(X), expected, 1e-4)
    assert len(calls) == count
    assert fused(model, calls), "recording leaves the network as it is"


def test_extractors_of_features_see_every_module(calls):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = accelerated(published, calls)
    count = len(calls)
    found = run(extraction.create_feature_extractor(model, {"conv1": "a", "bn1": "b", "relu": "c", "maxpool": "d"}))
    own, u = plain(model), X
    for key, name in zip("abcd", ("conv1", "bn1", "relu", "maxpool"), strict=True):
        u = getattr(own, name)(u)
        if name == "conv1":
            assert_close(found[key], u)  # bn1's and relu's are one tensor, which ReLU writes in place
    assert_close(found["d"], u)
    assert len(calls) == count and fused(model, calls)


def test_timm_s_features(calls):
    timm = timm_or_skip()
    model = accelerated(NETWORKS["timm"], calls)
    count, own = len(calls), plain(model)
    with torch.no_grad():
        assert all(map(torch.equal, own.forward_intermediates(X)[1][:1], model.forward_intermediates(X)[1][:1]))
        assert_close(model.forward_features(X), own.forward_features(X), 1e-5)
    assert len(calls) == count, "only the network's own forward is known"
    sizes = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 40)}
    features = accelerate(timm.create_model("res2net50_26w_4s", features_only=True, **sizes).eval())
    expected = run(plain(features))
    for a, b in zip(run(features), expected, strict=True):
        assert_close(a, b, 1e-5)
    assert len(calls) == count and "keeps or returns" in explain(features).stems[0].reason
    assert not isinstance(features, FusedStem)


def test_quantization_finds_its_modules(calls):
    model = accelerated(published, calls)
    count = len(calls)
    fused_modules = torch.ao.quantization.fuse_modules(model, [["conv1", "bn1", "relu"]])
    assert type(fused_modules.bn1) is nn.Identity
    assert_close(run(fused_modules), run(plain(model)), 1e-4)
    assert len(calls) == count
    folded = copy.deepcopy(model)
    folded.conv1, folded.bn1 = nn.utils.fuse_conv_bn_eval(folded.conv1, folded.bn1), nn.Identity()
    assert_close(run(folded), run(plain(model)), 1e-4)


@pytest.mark.parametrize("mode", ["profiler", "flops", "vmap"])
def test_whoever_counts_or_transforms(mode, calls):
    model = accelerate(published(), memory_format=torch.preserve_format)
    assert fused(model, calls)
    own, count = plain(model), len(calls)
    if mode == "flops":
        from torch.utils.flop_counter import FlopCounterMode

        counts = []
        for m in (model, own):
            with FlopCounterMode(display=False) as counter:
                run(m)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] and len(calls) == count
    elif mode == "vmap":
        with torch.no_grad():
            assert_close(torch.func.vmap(model)(X[:, None]), torch.func.vmap(own)(X[:, None]), 1e-4)
        assert len(calls) == count
    else:
        with torch.profiler.profile() as profile:
            run(model)
        assert any("cpu_stem_forward" in event.name for event in profile.events())


# The network's own forward ---------------------------------------------------------------------------------------------------


class LooksAtShape(Published):
    def forward(self, x):
        x = self.conv1(x)
        size = x.shape[-2:]
        x = self.maxpool(self.relu(self.bn1(x)))
        return self.rest(x), F.interpolate(x, size=size)


class ReturnsBetween(Published):
    def forward(self, x):
        c1 = self.relu(self.bn1(self.conv1(x)))
        return self.rest(self.maxpool(c1)), c1


class KeepsBetween(Published):
    kept = []  # noqa: RUF012

    def forward(self, x):
        x = self.conv1(x)
        self.kept.append(x)
        return self.rest(self.maxpool(self.relu(self.bn1(x))))


class Branches(Published):
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.rest(self.maxpool(x) + F.max_pool2d(x, 3, 2, 1))


class Functional(Published):
    def forward(self, x):
        return self.rest(self.maxpool(F.relu(self.bn1(self.conv1(x)))))


class Twice(Published):
    def forward(self, x):
        return self.rest(self.maxpool(self.relu(self.bn1(self.bn1(self.conv1(x))))))


class Scales(Published):
    def forward(self, x):
        return self.rest(self.maxpool(self.relu(self.bn1(self.conv1(x) * 2))))


class Asks(Published):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        if isinstance(x, torch.Tensor) and x.is_cpu:
            x = x + 1
        return self.rest(self.maxpool(self.relu(x)))


class Chooses(Published):
    def forward(self, x):
        if x.mean() > 0:
            x = -x
        return self.rest(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


class Counts(Published):
    count = 0

    def forward(self, x):
        self.count += 1
        return self.rest(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


class Writes(Published):
    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        setattr(self, "seen", x)  # noqa: B010
        return self.rest(x)


class ReadsWeight(Published):
    def forward(self, x):
        x = x.to(self.conv1.weight.dtype)
        return self.rest(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


LEFT_ALONE = {
    LooksAtShape: "looks at", ReturnsBetween: "keeps or returns", KeepsBetween: "keeps or returns", Branches: "looks at",
    Functional: "called in turn", Twice: "in turn", Scales: "called in turn", Asks: "looks at",
    Chooses: "could not be followed", Counts: "writes count", ReadsWeight: "reads weight of conv1",
    Writes: "writes seen",
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT_ALONE, ids=lambda kind: kind.__name__)
def test_forwards_that_look_between(kind, calls):
    model = randomize(kind()).eval()
    own = copy.deepcopy(model)
    (stem,) = explain(accelerate(model)).stems
    assert stem.fused is False and LEFT_ALONE[kind] in stem.reason, stem.reason
    assert type(model) is kind
    found, expected = run(model), run(own)
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True):
        assert_close(a, b, 1e-5)
    assert not calls


class Normalises(Published):
    """All that a forward may do before and behind its stem."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1))
        self.outs = [1, 2]
        self.doubled = False

    def forward(self, x, extra=None):
        size = x.shape[-2:]
        x = (x - self.mean) * 2
        if extra is not None:
            x = x + extra
        u = self.conv1(x)
        u = self.bn1(u)
        v = self.relu(u)
        x = self.maxpool(v)
        if self.doubled:
            x = x * 2
        for name in ("layer1", "layer2", "layer3"):
            x = getattr(self, name)(x)
        mask = F.interpolate(x, size=size, mode="bilinear")
        return self.fc(self.avgpool(x).flatten(1)), mask[:, :1]


def test_what_comes_before_and_behind_is_free(calls):
    model = randomize(Normalises()).eval()
    own = plain(model).double()
    accelerate(model)
    for double, extra in ((False, None), (True, None), (False, 1.0)):
        model.doubled, own.doubled = double, double
        run(model)
        count = len(calls)
        with torch.no_grad():
            found, expected = model(X, extra=extra), own(X.double(), extra=extra)
        assert len(calls) - count == (extra is None)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 1e-4)


def test_settings_that_its_code_reads_are_looked_at_again(calls):
    class Switched(Published):
        scaled = False

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return self.rest(self.maxpool(x * 2 if self.scaled else x))

    model = accelerate(randomize(Switched()).eval())
    assert fused(model, calls)
    for place in (Switched, model):
        place.scaled = True
        run(model)
        assert fused(model, calls), "as far as the ReLU"
        assert vars(model)[STATE].config == ("conv1", "bn1", "relu")
        place.scaled = False
        run(model)
        assert fused(model, calls)


def test_a_forward_that_is_replaced(calls):
    class Own(Published):
        pass

    model = accelerate(randomize(Own()).eval())
    expected, count = run(model), len(calls)
    forward = model.forward
    model.forward = lambda x: forward(x) + 1
    assert_close(run(model), expected + 1)
    del model.forward
    Own.forward = lambda self, x: self.rest(self.maxpool(self.relu(self.bn1(self.conv1(x)).neg())))
    different = run(model)
    assert_close(different, run(restore(copy.deepcopy(model))), 1e-5)
    assert relative_error(different, expected) > 1e-2
    del Own.forward
    assert_close(run(model), expected)
    assert len(calls) > count


def test_a_class_that_somebody_puts_on_top(calls):
    model = accelerated(published, calls)
    base, count = type(model), len(calls)
    model.__class__ = type("Top", (base,), {"rest": lambda self, x: base.rest(self, x) * 3})
    assert_close(run(model), 3 * run(plain(model).maxpool and published()), 1e-5)
    assert len(calls) == count


def test_what_was_promised_and_is_not_kept_is_run_again(calls, monkeypatch):
    """The last defence: a forward that calls the modules otherwise than it did is run again on the modules themselves."""
    monkeypatch.setattr("res2net_fused.patching.stem.KnownStem.alike", lambda *arguments: True)
    model = accelerated(published, calls)
    for forward in (
        lambda self, x: self.rest(self.maxpool(self.relu(self.bn1(self.conv1(x)).neg()))),
        lambda self, x: self.rest(self.maxpool(self.bn1(self.conv1(x)))),
        lambda self, x: self.rest(self.maxpool(self.relu(self.bn1(self.relu(self.conv1(x)))))),
        lambda self, x: self.rest(F.max_pool2d(self.relu(self.bn1(self.conv1(x))), 3, 2, 1)),
    ):
        monkeypatch.setattr(Published, "forward", forward)
        assert_close(run(model), run(plain(model)), 1e-5)
        assert explain(model).stems[0].reason == CHANGED


def test_networks_without_a_stem_are_left_alone():
    block = accelerate(randomize(Bottle2neck(16, 8, baseWidth=32)).eval())
    assert explain(block).stems == []
    sequential = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Bottle2neck(16, 4))
    assert explain(accelerate(sequential.eval())).stems == []
    no_blocks = accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    assert explain(no_blocks).stems == []


def test_a_network_inside_another(calls):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = published(), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.backbone(x))

    model = accelerate(Detector().eval())
    assert fused(model, calls)
    assert explain(model).stems[0].name == "backbone.conv1, bn1, relu, maxpool"
    assert fused(nn.DataParallel(model).module.cpu(), calls)  # which a machine with a GPU has moved there


# Kept weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folds(monkeypatch):
    """Every folding of a stem."""
    seen = []
    pack = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda weights: seen.append(1) or pack(weights))
    return seen


WRITES = {
    "in_place": lambda m: m.conv1.weight.mul_(2),
    "data": lambda m: m.conv1.weight.data.mul_(2),
    "numpy": lambda m: m.bn1.running_var.numpy().__imul__(2),
    "replaced": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight * 2)),
    "replaced_data": lambda m: setattr(m.conv1.weight, "data", m.conv1.weight.data * 2),
    "statistics": lambda m: m.bn1.running_mean.add_(1),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "bias": lambda m: m.bn1.bias.data.add_(1),
    "loaded": lambda m: m.load_state_dict(randomize(published(), seed=9).state_dict()),
    "loaded_child": lambda m: m.conv1.load_state_dict(randomize(published(), seed=9).conv1.state_dict()),
    "gains_a_bias": lambda m: setattr(m.conv1, "bias", nn.Parameter(torch.ones(16))),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_are_noticed_at_the_next_call(write, calls):
    model = accelerated(published, calls)
    before = run(model)
    with torch.no_grad():
        write(model)
    run(model)
    assert fused(model, calls)
    assert relative_error(run(model), before) > 1e-3


def test_parameters_that_are_given_for_one_call(calls):
    model = accelerated(published, calls)
    before, own = run(model), plain(model)
    with torch.no_grad():
        given = {name: value * 1.5 for name, value in model.named_parameters()}
        for _ in range(2):
            assert_close(torch.func.functional_call(model, given, X), torch.func.functional_call(own, given, X), 1e-5)
    assert_close(run(model), before)


def test_an_optimizer_s_steps_are_noticed(calls):
    model = accelerated(published, calls)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        assert fused(model, calls)


def test_weights_are_folded_once(calls, folds):
    model = accelerate(published())
    for _ in range(3):
        run(model)
    assert len(folds) == 1
    refresh(model)
    run(model)
    assert len(folds) == 2


def test_freeze_keeps_them_until_refresh(calls, folds):
    model = freeze(accelerate(published()))
    before, count = run(model), len(folds)
    assert count == 1 and len(calls) == 1
    with torch.no_grad():
        model.conv1.weight.mul_(2)
        model.bn1.running_mean.add_(1)
    assert torch.equal(run(model), before) and len(folds) == count and len(calls) == 2
    refresh(model)
    assert fused(model, calls) and relative_error(run(model), before) > 1e-3
    for thaw in (lambda: model.train().eval(), lambda: model.to(torch.float64).float(), lambda: restore(model)):
        accelerate(model)
        freeze(model)
        with torch.no_grad():
            model.conv1.weight.mul_(1.5)
        thaw()
        assert_right(model)


def test_without_the_native_library(monkeypatch, folds):
    monkeypatch.setattr(kernels, "why_not", lambda device, dtype: "the native extension is not built")
    model = freeze(accelerate(published()))
    assert_right(model)
    assert not folds and "not built" in explain(model).stems[0].reason


def test_explain_tells_of_writes_that_no_sample_shows(calls):
    model = accelerated(published, calls)
    model.conv1.weight.detach().numpy().reshape(-1)[1] += 1000
    run(model)
    reason = explain(model).stems[0].reason
    assert OUTDATED in reason or fused(model, calls)
    assert OUTDATED not in explain(refresh(model), X).stems[0].reason
    assert fused(model, calls)


def test_restore_takes_it_back(calls):
    model = published()
    own, before = type(model), set(vars(model))
    accelerate(model)
    assert type(model) is not own
    restore(model)
    assert type(model) is own and set(vars(model)) == before and not hasattr(model, STATE)
    run(model)
    assert not calls
    assert fused(accelerate(accelerate(model)), calls)


def test_threads_share_it(calls):
    model = accelerate(published())
    expected = run(plain(model))

    def work():
        for _ in range(5):
            assert_close(run(model), expected, 1e-5)

    run_together(work, work, lambda: [refresh(model) for _ in range(20)], lambda: [freeze(model) for _ in range(5)])


def test_a_network_is_freed_with_its_last_reference(calls):
    model = accelerated(published, calls)
    run(model)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_inference_mode_and_weights_made_in_it(calls):
    model = accelerate(published())
    with torch.inference_mode():
        out = model(X)
    assert_close(out, run(plain(model)), 1e-5)
    assert len(calls) == 1 and fused(model, calls)
    with torch.inference_mode():
        other = accelerate(published())
        expected = restore(copy.deepcopy(other))(X)
        assert_close(other(X), expected, 1e-5)


def test_parameters_are_saved_as_before(calls):
    model = published()
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    with contextlib.closing(io.BytesIO()) as file:
        torch.save(model.state_dict(), file)
