"""What users do to blocks after `accelerate`: parts replaced, wrapped, dropped, switched; and what their classes demand."""

import abc
import copy
import inspect
import types

import pytest
import torch
from helpers import assert_close, randomize
from official_style import Bottle2neck
from published_blocks.speakers1d import ESPnetBlock, SpeechBrainChain, WeSpeakerChain
from torch import nn

from res2net_fused import accelerate, explain, freeze, restore
from res2net_fused.backends import policy

X = torch.randn(2, 32, 9, 9, generator=torch.Generator().manual_seed(3))


def block(kind=Bottle2neck):
    return randomize(kind(32, 8, baseWidth=32)).eval()


def run(module, x=X):
    with torch.no_grad():
        return module(x)


class Fixed(nn.Module):
    """BatchNorm by its buffers, with an eps that nothing but its code knows."""

    eps_inside = 1e-5
    power = -0.5

    def __init__(self, bn):
        super().__init__()
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, getattr(bn, name).detach().clone())
        self.register_buffer("running_var", torch.full_like(bn.running_var, 1e-4))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps_inside) ** self.power
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class Coarse(Fixed):
    eps_inside = 1e-3


class Without(Fixed):
    eps_inside = 0.0


class OtherPower(Fixed):
    power = -1


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-2
        )


def own_batch_norm(bn):
    other = OwnBatchNorm(bn.num_features)
    other.load_state_dict(bn.state_dict())
    return other.eval()


def norms(make):
    def change(b):
        b.bn1, b.bn3 = make(b.bn1), make(b.bn3)
        b.bns = nn.ModuleList(map(make, b.bns))

    return change


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (Fixed, True),
        (Coarse, True),
        (Without, True),
        (own_batch_norm, True),
        (OtherPower, False),
        (lambda _: nn.Identity(), True),
    ],
)
def test_a_norm_counts_by_what_it_computes(make, fused, before):
    b = block()
    if before:
        norms(make)(b)
    plain = copy.deepcopy(b)
    accelerate(b)
    if not before:
        run(b)
        norms(make)(b)
        norms(make)(plain)
    assert_close(run(b), run(plain), 5e-6)
    (report,) = explain(b)
    assert report.fused is fused and (fused or "cannot be folded" in report.reason), report


SETTINGS = types.SimpleNamespace(coarse=False)


class Switched(nn.Conv2d):
    on = False

    def forward(self, x):
        on = self.on or SETTINGS.coarse or getattr(self, "more", {}).get("on")
        return self._conv_forward(x, (self.weight * 8).round() / 8 if on else self.weight, self.bias)


def switched(b):
    for i, conv in enumerate(b.convs):
        b.convs[i] = Switched(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False)
        b.convs[i].weight = conv.weight


@pytest.mark.parametrize("how", ["attribute", "class", "global", "dictionary"])
def test_a_switch_of_a_convolution_is_noticed(how, monkeypatch):
    b = block()
    switched(b)
    plain = copy.deepcopy(b)
    accelerate(b)
    assert_close(run(b), run(plain), 5e-6)
    assert explain(b)[0].fused
    if how == "class":
        monkeypatch.setattr(Switched, "on", True)
    elif how == "global":
        monkeypatch.setattr(SETTINGS, "coarse", True)
    else:
        for m in (b, plain):
            setattr(m.convs[1], *{"attribute": ("on", True), "dictionary": ("more", {"on": 1})}[how])
    assert_close(run(b), run(plain), 5e-6)
    assert explain(b)[0].fused is False and "convs[" in explain(b)[0].reason


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 1.1


def function_for_relu(b):
    del b.relu
    b.relu = torch.relu


SURGERY = {
    "convs[1]": lambda b: b.convs.__setitem__(1, Wrapped(b.convs[1])),
    "conv1": lambda b: setattr(b, "conv1", Wrapped(b.conv1)),
    "conv3": lambda b: setattr(b, "conv3", nn.Identity()),
    "bn1": lambda b: setattr(b, "bn1", Wrapped(b.bn1)),
    "relu": function_for_relu,
}


@pytest.mark.parametrize("how", ["accelerated", "frozen", "anew"])
@pytest.mark.parametrize("name", SURGERY)
def test_surgery_on_a_block(name, how):
    b = block()
    plain = copy.deepcopy(b)
    run(accelerate(b))
    for m in (b, plain):
        SURGERY[name](m)
    expected = run(plain) if name != "conv3" else None
    if how == "frozen":
        freeze(b)
    elif how == "anew":
        accelerate(b)
    if expected is not None:
        assert_close(run(b), expected, 5e-6)
        (report,) = explain(b)
        assert report.fused is False and (name == "bn1" or how == "anew" or name in report.reason), report


def test_accelerating_again_after_surgery_recognises_anew():
    b = block()
    plain_class = type(b)
    accelerate(b)
    inner = b.convs[1]
    b.convs[1] = Wrapped(inner)
    accelerate(b)
    assert type(b) is plain_class and "convs[1] is a Wrapped" in explain(b)[0].reason
    b.convs[1] = inner
    run(accelerate(b))
    assert explain(b)[0].fused


class Plugged(Bottle2neck):
    """Reads a setting, and calls a module that does nothing yet."""

    gain = 1.0

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.plugin = nn.Identity()

    def forward(self, x):
        return self.plugin(super().forward(x)) * self.gain


@pytest.mark.parametrize("what", [("plugin", nn.Sigmoid()), ("gain", 2.0), ("plugin", nn.Sequential(nn.Tanh()))])
def test_what_a_block_reads_besides_its_parts(what):
    b = block(Plugged)
    plain = copy.deepcopy(b)
    run(accelerate(b))
    assert explain(b)[0].fused
    for m in (b, plain):
        setattr(m, *what)
    assert torch.equal(run(b), run(plain))
    assert what[0] in explain(b)[0].reason


@pytest.mark.parametrize(
    ("make", "where"), [(WeSpeakerChain, "convs.1"), (ESPnetBlock, "bns.0"), (SpeechBrainChain, "blocks.1.conv")]
)
def test_surgery_on_a_chain_along_rows(make, where, monkeypatch):
    monkeypatch.setattr(policy, "chain_pays_1d", lambda *_: True)
    b, x = randomize(make()).eval(), torch.randn(2, 32, 23)
    plain = copy.deepcopy(b)
    run(accelerate(b), x)
    assert explain(b)[0].fused
    for m in (b, plain):
        m.set_submodule(where, Wrapped(m.get_submodule(where)))
    freeze(b)
    assert torch.equal(run(b, x), run(plain, x))
    reason = explain(b)[0].reason
    assert "replaced" in reason and ("Wrapped" in reason or "missing" in reason)
    accelerate(b)
    assert torch.equal(run(b, x), run(plain, x))
    assert explain(b)[0].fused is False


class Registered(Bottle2neck):
    names = []

    def __init_subclass__(cls, *, key, **keywords):
        super().__init_subclass__(**keywords)
        Registered.names.append(key)


class Registry(type):
    names = []

    def __new__(mcs, name, bases, body):
        Registry.names.append(name)
        return super().__new__(mcs, name, bases, body)


class ByMetaclass(Bottle2neck, metaclass=Registry):
    pass


class Abstract(Bottle2neck, abc.ABC):
    pass


class Slotted(Bottle2neck):
    __slots__ = ("gain",)

    def forward(self, x):
        return super().forward(x) * getattr(self, "gain", 1.0)


class Named(Bottle2neck):
    def forward(self, hidden_states, scale=None):
        return super().forward(hidden_states)


@pytest.mark.parametrize("kind", [Bottle2neck, Registered, ByMetaclass, Abstract, Slotted])
def test_the_class_of_an_accelerated_block_makes_plain_ones(kind):
    seen = len(Registered.names), len(Registry.names)
    b = accelerate(block(kind))
    expected = run(b)
    other = type(b)(32, 8)
    assert type(other) is kind and isinstance(b, kind) and run(other.eval()).shape == X.shape
    assert torch.equal(run(copy.deepcopy(b)), expected)
    assert inspect.signature(type(b)) == inspect.signature(kind)
    assert type(restore(b)) is kind
    assert (len(Registered.names), len(Registry.names)) == seen


@pytest.mark.parametrize("call", [lambda b: b(X), lambda b: b(hidden_states=X), lambda b: b(scale=None, hidden_states=X)])
def test_forward_has_the_signature_of_the_class(call):
    b = block(Named)
    accelerate(b)
    assert str(inspect.signature(b.forward)) == "(hidden_states, scale=None)"
    with torch.no_grad():
        out = call(b)
    assert explain(b)[0].fused
    assert torch.equal(out, run(b))
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        b(x=X)


class Flags:
    on = False


def in_a_closure():
    state = {"quant": {"on": False}}

    class Closed(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * 2 if state["quant"]["on"] else self.weight, self.bias)

    return Closed, lambda: state["quant"].update(on=True)


def in_another_class():
    class Flagged(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * 2 if Flags.on else self.weight, self.bias)

    return Flagged, lambda: setattr(Flags, "on", True)


def in_a_method():
    class Helped(nn.Conv2d):
        def scaled(self):
            return self.weight

        def forward(self, x):
            return self._conv_forward(x, self.scaled(), self.bias)

    return Helped, lambda: setattr(Helped, "scaled", lambda self: self.weight * 2)


def in_its_forward():
    class Patched(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight, self.bias)

    return Patched, lambda: setattr(Patched, "forward", lambda self, x: 2 * self._conv_forward(x, self.weight, self.bias))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("where", [in_a_closure, in_another_class, in_a_method, in_its_forward])
def test_a_switch_outside_of_the_convolution_is_noticed(where, compiled, monkeypatch):
    monkeypatch.setattr(Flags, "on", False)
    kind, turn_on = where()
    b = block()
    for i, conv in enumerate(b.convs):
        b.convs[i] = kind(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False)
    plain = copy.deepcopy(b)
    accelerate(b)
    assert_close(run(b), run(plain), 5e-6)
    assert explain(b)[0].fused
    torch._dynamo.reset()
    call = torch.compile(b, backend="eager") if compiled else b
    if compiled and where in (in_a_method, in_its_forward):
        turn_on()  # Dynamo takes the methods of a class for constants, of plain PyTorch too
    assert_close(run(call), run(plain), 5e-6)
    if not compiled or where not in (in_a_method, in_its_forward):
        turn_on()
    assert_close(run(call), run(plain), 5e-6)


@pytest.mark.parametrize("how", ["instance", "tiling"])
def test_a_method_of_one_convolution_is_noticed(how):
    b = block()
    plain = copy.deepcopy(b)
    run(accelerate(b))
    for m in (b, plain):
        name, conv = {"instance": ("forward", m.convs[0]), "tiling": ("_conv_forward", m.convs[1])}[how]
        own = getattr(conv, name)
        setattr(conv, name, lambda *args, own=own: own(*args) * 2)
    assert torch.equal(run(b), run(plain))
    assert "has a forward of its own" in explain(b)[0].reason


def test_a_setting_in_a_slot_is_noticed():
    b = block(Slotted)
    expected = run(b)
    assert_close(run(accelerate(b)), expected, 5e-6)
    assert explain(b)[0].fused
    b.gain = 2.0
    assert torch.equal(run(b), expected * 2)


def test_other_norms_of_pytorch_count_by_what_they_compute():
    for eps in (1e-5, 1e-2):
        b = block()
        plain = copy.deepcopy(b)
        run(accelerate(b))
        for m in (b, plain):
            norm = nn.InstanceNorm2d(m.bn1.num_features, eps=eps, affine=True, track_running_stats=True).eval()
            norm.load_state_dict(m.bn1.state_dict())
            norm.running_var.fill_(1e-3)
            m.bn1 = norm
        assert_close(run(b), run(plain), 5e-6)
        assert explain(b)[0].fused


def test_restore_leaves_nothing_behind():
    b = block()
    norms(Fixed)(b)
    switched(b)
    before = [set(vars(m)) for m in b.modules()]
    run(accelerate(b))
    assert [set(vars(m)) for m in restore(b).modules()] == before


def test_explain_after_surgery_without_a_call():
    for change in SURGERY.values():
        b = block()
        run(accelerate(b))
        change(b)
        b.bn3 = None
        assert len(explain(b)) == 1
