"""A network's stem found and taken over by `accelerate`: float64's results, or its own modules where it is no such stem."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import BOUNDS, HALVES, assert_close, randomize, relative_error
from official_style import Bottle2neck
from stem_cases import (
    Published,
    X,
    accelerated,
    assert_right,
    both,
    fused,
    needs_library,
    networks,
    plain,
    published,
    run,
)
from torch import nn
from torch.nn.utils import parametrizations

from res2net_fused import accelerate, explain, restore
from res2net_fused.backends.cpu import stem as kernels
from res2net_fused.modules.block_state import STATE
from res2net_fused.patching.stem import CHANGED

pytestmark = needs_library

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


# Parts of kinds that are not fused ---------------------------------------------------------------------------------------


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
