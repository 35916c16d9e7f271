"""What may change in a block between two calls: each a function that changes a block and returns what takes that back."""

import types

import torch
from helpers import randomize
from official_style import Bottle2neck as Official
from torch import nn
from torch.nn.utils import parametrizations

from res2net_fused import accelerate

SETTINGS = types.SimpleNamespace(factor=1.0)


class Scaled(nn.Conv2d):
    """Reads settings of all kinds: of the instance, of the class, of an object outside."""

    on_class = [1.0]
    gain = 1.0

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.factors = [1.0, {"inner": 1.0}]
        self.object = types.SimpleNamespace(factor=1.0)

    def scale(self):
        return self.gain * self.on_class[0] * self.factors[0] * self.factors[1]["inner"]

    def forward(self, x):
        factor = self.scale() * self.object.factor * SETTINGS.factor
        return self._conv_forward(x, self.weight * factor, self.bias)


class Clamped(nn.ReLU):
    """ReLU under a class of its own, all of which are equal."""

    def __eq__(self, other):
        return isinstance(other, Clamped)

    __hash__ = nn.ReLU.__hash__


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Plugged(Official):
    """Reads a setting, and calls a module that does nothing yet."""

    gain = 1.0
    gains = [1.0]

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.plugin = nn.Identity()
        self.counts = [1.0]

    def forward(self, x):
        return self.plugin(super().forward(x)) * self.gain * self.gains[0] * self.counts[0]


def published():
    shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    block = randomize(Official(16, 4, stride=2, stype="stage", baseWidth=64, downsample=shortcut)).eval()
    block.relu = Clamped(inplace=True)
    return accelerate(block)


def own_classes():
    block = randomize(Plugged(16, 4, baseWidth=64)).eval()
    for i, conv in enumerate(block.convs):
        block.convs[i] = Scaled(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
        block.convs[i].weight = conv.weight
        block.convs[i].padding, block.convs[i].dilation = [1, 1], [1, 1]
    return accelerate(block)


# What may change: (the change of a block, which returns what takes it back), whether that is a write to its weights ------


def hook(kind, where, result):
    def change(block):
        return getattr(block.get_submodule(where), f"register_{kind}_hook")(result).remove

    return change


def attribute(where, name, value):
    def change(block):
        module = block.get_submodule(where)
        had = any(name in where for where in (vars(module), module._parameters, module._buffers, module._modules))
        old = getattr(module, name, None)
        setattr(module, name, value(old) if callable(value) and not isinstance(value, nn.Module) else value)
        return lambda: setattr(module, name, old) if had else delattr(module, name)

    return change


def in_place(where, name, write, back):
    """Something inside a value of an attribute."""

    def change(block):
        value = getattr(block.get_submodule(where), name)
        write(value)
        return lambda: back(value)

    return change


def tensor(where, name, write):
    def change(block):
        found = getattr(block.get_submodule(where), name)
        before = found.detach().clone()

        def back():
            with torch.no_grad():
                found.copy_(before)

        with torch.no_grad():
            write(found)
        return back

    return change


def of_class(cls, name, value):
    def change(block):
        had, old = name in vars(cls), vars(cls).get(name)
        setattr(cls, name, value)
        return lambda: setattr(cls, name, old) if had else delattr(cls, name)

    return change


def in_training(where):
    def change(block):
        norm = block.get_submodule(where).train()
        before = [buffer.clone() for buffer in norm.buffers()]

        def back():
            norm.eval()
            for buffer, value in zip(norm.buffers(), before, strict=True):
                buffer.copy_(value)

        return back

    return change


def own_forward(where, name="forward"):
    def change(block):
        module = block.get_submodule(where)
        own = getattr(module, name)
        setattr(module, name, lambda *args: own(*args) * 2)
        return lambda: delattr(module, name)

    return change


def other_code(block):
    own = Scaled.scale.__code__
    Scaled.scale.__code__ = (lambda self: self.gain + self.on_class[0] + 1).__code__
    return lambda: setattr(Scaled.scale, "__code__", own)


def parametrized(block):
    conv = block.convs[0]
    weight, cls = conv.weight, type(conv)
    parametrizations.weight_norm(conv)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)

    def back():
        conv.__class__ = cls
        del conv._modules["parametrizations"]
        conv.weight = weight

    return back


def replaced_norm(name, make=lambda old: nn.GroupNorm(1, old.num_features)):
    def change(block):
        old = block.get_submodule(name)
        block.set_submodule(name, make(old))
        return lambda: block.set_submodule(name, old)

    return change


def together(*changes):
    def change(block):
        back = [each(block) for each in changes]
        return lambda: [undo() for undo in back]

    return change


def dilated(block):
    def to(size):
        for values in (block.convs[1].padding, block.convs[1].dilation):
            values[:] = [size, size]

    to(2)
    return lambda: to(1)


def another_class(block):
    block.convs[1].__class__ = Doubled
    return lambda: setattr(block.convs[1], "__class__", nn.Conv2d)


def equal_module(block):
    own, block.relu = block.relu, Clamped(inplace=True)
    block.relu.register_forward_hook(DOUBLE)
    return lambda: setattr(block, "relu", own)


def another_dictionary(block):
    """The same module with another dictionary of its attributes, which is changed then."""
    norm = block.bns[0]
    own = vars(norm)
    norm.__dict__ = dict(own, eps=2.0)
    return lambda: setattr(norm, "__dict__", own)


DOUBLE = lambda module, args, out: out * 2  # noqa: E731
DOUBLE_X = lambda module, args: (args[0] * 2,)  # noqa: E731
NOTHING = lambda *args: None  # noqa: E731
HOOKS = {"forward": DOUBLE, "forward_pre": DOUBLE_X, "full_backward": NOTHING, "full_backward_pre": NOTHING}
INNER = ["conv1", "bn1", "convs.0", "convs.2", "bns.1", "conv3", "bn3", "relu", "pool", "downsample.1", "downsample.2"]
NORMS = ["bn1", "bns.0", "bns.2", "bn3", "downsample.2"]

CHANGES = {
    **{f"{kind}_hook:{where}": hook(kind, where, result) for kind, result in HOOKS.items() for where in INNER},
    "forward_hook:downsample": hook("forward", "downsample", DOUBLE),
    **{f"training:{where}": in_training(where) for where in NORMS},
    **{f"norm:{where}": replaced_norm(where) for where in NORMS},
    "no norm": replaced_norm("bns.1", lambda old: nn.Identity()),
    **{f"own forward:{where}": own_forward(where) for where in INNER},
    "tiling": own_forward("convs.1", "_conv_forward"),
    "no statistics": together(*(attribute("bns.1", name, None) for name in ("running_mean", "running_var"))),
    "another convolution": attribute("", "conv1", nn.Conv2d(16, 16, 1, bias=False).requires_grad_(False)),
    "removed": attribute("", "downsample", nn.AvgPool2d(2, 2, ceil_mode=True)),
    "activation": attribute("", "relu", nn.GELU()),
    "activation's class": of_class(Clamped, "forward", lambda self, x: x.sigmoid()),
    "dilation": together(attribute("convs.2", "dilation", (2, 2)), attribute("convs.2", "padding", (2, 2))),
    "padding": attribute("convs.2", "padding_mode", "circular"),
    "stride": together(
        attribute("downsample.0", "stride", 1),
        attribute("downsample.0", "kernel_size", 1),
        attribute("downsample.1", "stride", (2, 2)),
    ),
    "pool": attribute("pool", "count_include_pad", False),
    "pool of the shortcut": attribute("downsample.0", "divisor_override", 3),
    "parametrized": parametrized,
    "dictionary": another_dictionary,
    "class": another_class,
    "equal module": equal_module,
    "eps": attribute("bns.0", "eps", 1.0),
    "eps of the projection": attribute("downsample.2", "eps", 1.0),
}
FOLDED = ("another convolution", "dictionary", "eps", "eps of the projection")

OWN_CHANGES = {
    "list": in_place("convs.0", "factors", lambda v: v.__setitem__(0, 2.0), lambda v: v.__setitem__(0, 1.0)),
    "dictionary in a list": in_place("convs.1", "factors", lambda v: v[1].update(inner=2.0), lambda v: v[1].update(inner=1.0)),
    "object": in_place("convs.1", "object", lambda v: setattr(v, "factor", 2.0), lambda v: setattr(v, "factor", 1.0)),
    "another object": attribute("convs.1", "object", types.SimpleNamespace(factor=3.0)),
    "shadowed": attribute("convs.2", "gain", 2.0),
    "of a class": of_class(Scaled, "gain", 2.0),
    "inside of a class": lambda b: Scaled.on_class.__setitem__(0, 2.0) or (lambda: Scaled.on_class.__setitem__(0, 1.0)),
    "global": lambda b: setattr(SETTINGS, "factor", 2.0) or (lambda: setattr(SETTINGS, "factor", 1.0)),
    "forward": of_class(Scaled, "forward", lambda self, x: 2 * self._conv_forward(x, self.weight, self.bias)),
    "forward of an own class": of_class(nn.ReLU, "forward", lambda self, x: x.sigmoid()),
    "method": of_class(Scaled, "scale", lambda self: 3.0),
    "code": other_code,
    "dilation in place": dilated,
    "gain": attribute("", "gain", 2.0),
    "gain of the class": of_class(Plugged, "gain", 2.0),
    "list of the class": lambda b: Plugged.gains.__setitem__(0, 2.0) or (lambda: Plugged.gains.__setitem__(0, 1.0)),
    "list of the block": in_place("", "counts", lambda v: v.__setitem__(0, 2.0), lambda v: v.__setitem__(0, 1.0)),
    "plugin": attribute("", "plugin", nn.Sigmoid()),
    "plugin's hook": hook("forward", "plugin", DOUBLE),
    "plugin's insides": attribute("plugin", "forward", lambda old: torch.sigmoid),
    "block's forward": of_class(Plugged, "forward", lambda self, x: Official.forward(self, x) * 2),
}


WEIGHTS = {
    "in place": tensor("convs.0", "weight", lambda t: t.mul_(2)),
    "one element": tensor("convs.0", "weight", lambda t: t[0, 0, 1].add_(5)),
    ".data": tensor("conv3", "weight", lambda t: t.data.mul_(2)),
    "statistics": tensor("bn1", "running_var", lambda t: t.mul_(4)),
    "numpy": tensor("bns.0", "bias", lambda t: t.detach().numpy().__iadd__(1)),
    "projection": tensor("downsample.1", "weight", lambda t: t.mul_(2)),
    "parameter": attribute("bns.2", "weight", lambda old: nn.Parameter(old.detach() * 3, requires_grad=False)),
    "buffer": attribute("bn3", "running_mean", lambda old: old + 1),
    "bias": attribute("convs.1", "bias", nn.Parameter(torch.ones(4), requires_grad=False)),
}
