"""The stem of a network that has been accelerated, as one native call: its convolutions, norms, ReLUs and the max pooling.

A network's own forward calls them one by one, so it is the network whose class is swapped. Its forward runs on a stand-in that
shares all with the network but the stem's modules: what is in their places computes everything at its first call and then
hands it on. The modules themselves stay as they are, and whoever calls them without the network's forward gets theirs.
Which they are is found by `stem_sequence.py`, again whenever anything has changed that it may depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..backends import policy
from ..backends.cpu import stem as kernels
from ..backends.cpu.stem import StemWeights
from ..backends.selection import requested
from ..chain.memory_format import hands_on, memory_format
from ..modules.block_state import STATE, FusedCall, FusedModule, FusedState
from ..modules.confirmation import eps_of
from ..modules.eligibility import fused_activation, why_not_called, why_not_left_out
from ..modules.folding import fold, why_not_bypassed, why_not_folded
from ..modules.fused_forward import FusedForward
from ..modules.snapshot import Snapshot, needs_asking, take_snapshot
from ..modules.weight_cache import Frozen, cacheable
from .channels_last import hand_on
from .class_swap import fused_class, originals, own_class
from .stem_sequence import kinds_of, stand_in_of, stem_sequence

STEM_REFUSAL = "_res2net_fused_stem_refusal"  # on a network: why its stem was left alone, for `explain`
_PATIENCE = 8  # after so many looks in vain, calls go by before the next one
COMPILED = "a compiled or exported graph holds the network's own operators"
CHANGED = "its modules are called otherwise than when it was recognised: the next call looks again"


@dataclass
class StemState(FusedState):
    """What a network knows about its stem.

    config: the names of its modules, in the order in which they are called. last_problem: the shape of what was last convolved.
    """

    config: tuple[str, ...]
    last_weights: StemWeights | None = field(default=None, init=False, repr=False)  # of the last fused call
    in_vain: int = field(default=0, init=False)  # so many times in turn it was looked at for one call only

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pause = 0

    def forget(self, was_used: bool) -> None:
        super().forget(was_used)
        self.in_vain = 0 if was_used else self.in_vain + 1
        if self.in_vain < _PATIENCE:
            self.pause = 0

    def drop(self, frozen: bool = True) -> None:
        super().drop(frozen)
        self.last_weights = None


@dataclass(frozen=True, eq=False)
class StemParts:
    """A stem's modules at this moment, and all their tensors."""

    convs: list[nn.Conv2d]
    norms: list[Any]
    acts: list[nn.Module]
    pool: nn.MaxPool2d | None
    around: list[nn.Module]  # the Sequentials that hold some of them
    tensors: list[Tensor]

    @classmethod
    def of(cls, network: nn.Module, names: tuple[str, ...]) -> StemParts:
        """Those of the children with these names."""
        found: dict[str, list[Any]] = {"conv": [], "norm": [], "act": [], "pool": [None], "around": []}
        pending: list[Any] = [network._modules[name] for name in reversed(names)]
        while pending:
            module = pending.pop()
            if type(module) is nn.Sequential:
                found["around"].append(module)
                pending += reversed(list(module))
            else:
                found[kinds_of(module)[0]].append(module)
        modules = [*found["conv"], *found["norm"]]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        return cls(found["conv"], found["norm"], found["act"], found["pool"][-1], found["around"], tensors)

    def why_not(self) -> str | None:
        """None if the modules compute what the kernels do, and may be left out, else the reason."""
        pool = self.pool
        if pool is not None and not _is_usual(pool):
            return f"{pool} is not fused: only MaxPool2d(3, stride=2, padding=1) is"
        for conv in self.convs:
            reason = _why_not_convolved(conv)
            if reason is not None:
                return reason
        for part in self.modules():
            reason = why_not_bypassed(part, hand_on)
            if reason is not None:
                return reason.replace("inside the block", "of the stem")
        other = next((act for act in self.acts if fused_activation(act) != "relu"), None)
        if other is not None:
            return f"activation {type(other).__name__} is not fused"
        reason = next(filter(None, map(why_not_folded, self.norms)), None)
        if reason is None and not cacheable(self.tensors):
            reason = "its tensors are of kinds, or made in modes, of which changes cannot be noticed"
        return reason

    def modules(self) -> list[nn.Module]:
        return [*self.convs, *self.norms, *self.acts, *self.around, *([] if self.pool is None else [self.pool])]

    def settings(self) -> tuple[object, ...]:
        """What folded weights depend on beside the tensors."""
        geometry = tuple((conv.kernel_size, conv.stride, conv.padding) for conv in self.convs)
        return geometry, tuple(map(eps_of, self.norms)), self.pool is not None

    def folded(self) -> StemWeights:
        """Folded and packed: ordinary tensors outside autograd, also where it is called in inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            pairs = [fold(conv, norm, torch.float32) for conv, norm in zip(self.convs, self.norms, strict=True)]
            weights, biases = [weight.detach() for weight, _ in pairs], [bias.detach() for _, bias in pairs]
            strides, paddings = [conv.stride for conv in self.convs], [conv.padding for conv in self.convs]
            pools = self.pool is not None
            return kernels.pack(StemWeights(weights, biases, strides, paddings, pools))  # type: ignore[arg-type]


def _is_usual(pool: nn.MaxPool2d) -> bool:
    settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    usual = all(value in (wanted, (wanted, wanted)) for value, wanted in zip(settings, (3, 2, 1, 1), strict=True))
    return type(pool) is nn.MaxPool2d and usual and not pool.ceil_mode and not pool.return_indices


def _why_not_convolved(conv: nn.Conv2d) -> str | None:
    if type(conv) is not nn.Conv2d or "weight" not in conv._parameters:
        return f"a convolution is a {type(conv).__name__}, or parametrized, not a plain Conv2d"
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    plain = all(type(pair) is tuple and len(pair) == 2 and all(type(n) is int for n in pair) for pair in pairs)
    if not plain or conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return f"{conv} is not fused: groups, dilation and paddings but zeros are not"
    if conv.kernel_size[0] > kernels.MOST_TAPS:
        return f"{conv} has more than {kernels.MOST_TAPS} rows of a kernel"
    if conv.weight.dtype == torch.float64 or not conv.weight.is_floating_point():
        return f"its weights are {conv.weight.dtype}"
    return None if conv.weight.device.type == "cpu" else f"its weights are on {conv.weight.device}"


class KnownStem:
    """What has been found out about a network's stem, for as long as nothing changes that it depends on."""

    def __init__(self, snapshot: Snapshot, bodies: list[tuple[Any, dict[str, Any]]], network: nn.Module, names: Any) -> None:
        self.snapshot, self.bodies = snapshot, bodies
        self.used = False  # by a later call than the one that looked
        found, self.reason = stem_sequence(network)
        if not self.reason and found != names:
            self.reason = CHANGED
        self.names = found or names
        self.parts: StemParts | None = None
        if not self.reason:
            self.parts = StemParts.of(network, found)
            self.reason = self.parts.why_not() or ""

    def alike(self, network: nn.Module) -> bool:
        """Whether all is as it was."""
        try:
            return self.snapshot.alike(network) and all(vars(cls) == body for cls, body in self.bodies)
        except Exception:  # values that cannot be compared
            return False


def _look(network: nn.Module, state: StemState) -> KnownStem | None:
    """Look at everything anew; None where changes could not be noticed."""
    known = None
    for _ in range(2):  # again where other modules are called than before, of which no snapshot was taken
        names = state.config
        bodies = [(cls, dict(vars(cls))) for cls in own_class(network).__mro__ if cls not in (object, nn.Module)]
        others = [child for name, child in network._modules.items() if child is not None and name not in names]
        snapshot = take_snapshot(network, others)  # before anything is asked: another thread may change it meanwhile
        if snapshot is None or not all(isinstance(network._modules.get(name), nn.Module) for name in names):
            return None
        known = KnownStem(snapshot, bodies, network, names)
        state.config = known.names
        if known.reason != CHANGED:
            break
    return known


def _why_not_now(x: Any, args: tuple[object, ...], kwargs: dict[str, object], state: StemState) -> str | None:
    """None if a call with x may go by what is known about the network, else the reason."""
    reason = why_not_called(4, None, x, args, kwargs)[1] or why_not_left_out(())
    if reason is not None:
        return reason
    if type(x) is not Tensor or needs_asking():
        return "x is no plain tensor, or something traces, records or changes what is called"
    if torch._C._is_any_autocast_enabled():
        return "autocast chooses the dtype of each of its modules"
    name, source = requested(state.backend)
    if name not in ("auto", "cpu"):
        return f"{source} is asked for"
    return kernels.why_not(x.device, x.dtype) or (policy.why_left_to_pytorch(x.device, x.dtype) if name == "auto" else None)


class FusedStem(FusedCall):
    """Mixin before the class of a network; its instances carry a StemState."""

    def _res2net_fused_forward(self, state: Any, x: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        if is_compiling():
            return COMPILED
        generated: Any = type(self)
        if generated not in originals:
            return f"{generated.__name__} was derived from the network's class since it was recognised"
        reason = _why_not_now(x, args, kwargs, state)
        if reason is not None or self.training:
            return reason or "the network is in training mode"
        known: KnownStem | None = state.known
        if known is not None and not known.alike(self):
            state.forget(known.used)
            known = None
        if known is None:
            if not state.is_due():
                state.asked(True)
                return "something of the network was changed at every call of late: it is looked at again some calls later"
            state.known = known = _look(self, state)
        else:
            known.used = True
        if known is None:
            return "changes of the network's settings could not be noticed"
        parts = known.parts
        if known.reason or parts is None:
            state.kept = None  # a norm in training mode changes its statistics without a trace
            return known.reason
        if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in parts.tensors)):
            return "gradients are wanted"
        passage = _Passage(state, known, parts)
        steps = {name: _Step(passage, i, self._modules[name]) for i, name in enumerate(known.names)}
        stand_in = stand_in_of(self, steps)
        stand_in.__dict__.pop(STATE, None)
        try:
            out = originals[generated].forward(stand_in, x)  # type: ignore[attr-defined]
        except _Broken:
            return CHANGED
        if passage.done != len(known.names):
            return CHANGED
        if passage.reason is not None:
            state.last_refusal = passage.reason
        return out


class _Broken(Exception):
    """A network's forward has called the stem's modules otherwise than it does."""


class _Passage:
    """One call's way through the stem."""

    def __init__(self, state: StemState, known: KnownStem, parts: StemParts) -> None:
        self.state, self.known, self.parts = state, known, parts
        self.done = 0  # modules that have been called
        self.value: Any = None  # what all but the last of them hand on
        self.reason: str | None = None  # why the modules themselves run

    def step(self, i: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if i != self.done or len(args) != 1 or kwargs or (i > 0 and args[0] is not self.value):
            raise _Broken
        self.done += 1
        if i == 0:
            self.reason = self._why_not(args[0])
        if self.reason is not None:
            self.value = module(args[0])
        elif i == 0:
            self.value = self._fused(args[0])
        return self.value

    def _why_not(self, x: Any) -> str | None:
        """None if the kernels run this x, which may be another one than the network's, else the reason."""
        reason = _why_not_now(x, (), {}, self.state)
        if reason is not None:
            return reason
        tensors = self.parts.tensors
        if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors)):
            return "gradients are wanted"
        conv = self.parts.convs[0]
        if any(other.weight.dtype != x.dtype for other in self.parts.convs):
            return f"x is {x.dtype} but the weights are {conv.weight.dtype}"
        weights = self._weights()
        shapes = weights.sizes(x)
        if x.shape[1] != conv.in_channels or any(n < 1 for shape in shapes for n in shape[1:]):
            return f"x is {tuple(x.shape)}, which its convolutions do not take"
        return kernels.why_not_confirmed(x, weights)

    def _weights(self) -> StemWeights:
        frozen = self.state.frozen
        if frozen is not None:
            found: StemWeights = frozen.weights(torch.float32, self.parts.tensors[0].device)
            return found
        kept: StemWeights = self.state.keep(self.parts.tensors, self.parts.settings(), self.parts.folded)
        return kept

    def _fused(self, x: Tensor) -> Tensor:
        weights = self._weights()
        self.state.last_problem, self.state.last_weights = tuple(x.shape), weights
        # As the modules hand it on: in channels-last where x or a weight is, or where `accelerate` converts x.
        last = memory_format(x) == torch.channels_last or any(
            hands_on(conv.weight) or hand_on in conv._forward_pre_hooks.values() for conv in self.parts.convs
        )
        return kernels.stem_forward(x, weights, last)


class _Step:
    """What is called in the place of one of the stem's modules."""

    __slots__ = ("_i", "_module", "_passage")

    def __init__(self, passage: _Passage, i: int, module: Any) -> None:
        self._passage, self._i, self._module = passage, i, module

    __class__ = property(lambda self: type(self._module))  # for isinstance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._passage.step(self._i, self._module, args, kwargs)


# What `accelerate`, `freeze` and `explain` do with it ----------------------------------------------------------------------


def take_over_stems(model: nn.Module, backend: str) -> None:
    """Makes the stems of the model's networks run fused; notes why not where there seems to be one."""
    inside: set[nn.Module] = set()  # of networks whose stem was taken over
    for module in list(model.modules()):
        module.__dict__.pop(STEM_REFUSAL, None)
        if module not in inside and _take_over(module, backend):
            inside.update(module.modules())


def _take_over(network: nn.Module, backend: str) -> bool:
    original, taken = own_class(network), isinstance(network, FusedStem)
    names, reason = stem_sequence(network) if _may_have_stem(network) else ((), "")
    state: StemState | None = vars(network).get(STATE) if taken else None
    if names and state is not None:
        state.config, state.backend = names, backend
        state.drop()
        return True
    if names:
        network.__dict__[STATE] = StemState(names, backend, ())
        network.__class__ = fused_class(original, FusedStem)
        return True
    if taken and type(network) is not original:
        network.__class__ = original
        del network.__dict__[STATE]
    if reason:
        network.__dict__[STEM_REFUSAL] = reason
    return False


def _may_have_stem(network: nn.Module) -> bool:
    """Whether blocks that run fused stand behind a convolution among the network's own children."""
    if isinstance(network, (FusedModule, torch.jit.ScriptModule, torch.fx.GraphModule)) or type(network) is nn.Sequential:
        return False
    children = list(network.children())
    first = next((i for i, child in enumerate(children) if kinds_of(child)[:1] == ["conv"]), len(children))
    return any(isinstance(module, FusedForward) for child in children[first + 1 :] for module in child.modules())


def fused_stems(model: nn.Module) -> Iterator[tuple[str, FusedStem]]:
    """Every network of the model whose stem runs fused, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, FusedStem) and STATE in module.__dict__:
            yield name, module


def freeze_stem(network: nn.Module) -> None:
    """Folds and packs a network's stem now and keeps that, if it can run fused."""
    state: StemState = network.__dict__[STATE]
    known = _look(network, state)
    if known is None or known.parts is None or known.reason:
        return  # its own modules run; `explain` tells
    parts, device = known.parts, known.parts.tensors[0].device
    if kernels.why_not(device, parts.convs[0].weight.dtype) is not None:
        return
    state.freeze(lambda: Frozen(parts.folded(), device, lambda weights: weights, torch.float32))


def reads_old_stem(network: nn.Module) -> bool:
    """Whether a call would read kept weights that are no longer the parameters': folds them anew to tell."""
    state: StemState = network.__dict__[STATE]
    known: KnownStem | None = state.known
    if known is None or known.parts is None or state.frozen is not None:
        return False
    return state.outdated(known.parts.tensors, known.parts.settings(), known.parts.folded)
