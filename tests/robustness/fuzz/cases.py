"""One random call, as plain numbers and words that a JSON file can hold, and all that must be true of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import pytest
import torch
from helpers import HALVES, NAMED_BACKENDS, Chain, SqueezeExcite, masked_gradients, randomize, why_not
from memory_layouts import in_layout
from torch import Tensor, nn

from fuzz.checks import Truth, check_against, check_kinds, each_path, hostile_memory, untouched
from res2net_fused import Bottle2neck, hierarchical_conv1d, hierarchical_conv2d, pack_weights
from res2net_fused.backends import choices, policy
from res2net_fused.chain import reference
from res2net_fused.chain.config import Chain1dConfig, ChainConfig
from res2net_fused.chain.memory_format import memory_format
from res2net_fused.modules.reference_blocks import bottle2neck

EVERY_BACKEND = ("auto", *NAMED_BACKENDS)
HOSTILE = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def unsound(dtype: torch.dtype, size: Sequence[int], config: ChainConfig) -> bool:
    """Whether PyTorch's own convolution may give garbage: where a tap never meets a pixel, oneDNN reads memory that nobody
    wrote, in half types. The native kernels do not call it, but `reference` and the gradients do.
    """
    last = [(config.output_size(n) - 1) * config.stride for n in size]
    return dtype in HALVES and min(*size, *(n + 1 for n in last)) <= config.dilation


def sprinkle(x: Tensor, value: str, seed: int) -> Tensor:
    """x with the named value at up to three places."""
    if value != "finite" and x.numel():
        at = torch.randint(x.numel(), (1 + seed % 3,), generator=torch.Generator().manual_seed(seed))
        x.view(-1)[at] = HOSTILE[value]
    return x


def gradient_in(layout: str, like: Tensor, seed: int) -> Tensor:
    """Sums over it do not cancel."""
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(like.shape, generator=generator, dtype=torch.float64).add(0.5).to(like.dtype)
    return in_layout(grad, layout)


@dataclass(frozen=True)
class ChainCase:
    """A call of `hierarchical_conv2d`, with plain and with packed weights, and its gradients."""

    settings: dict[str, object]
    steps: int
    width: int
    shape: tuple[int, int, int]  # N, H, W
    dtype: str
    layout: str = "nhwc"  # of x, as in layouts.LAYOUTS
    weight_layout: str = "nchw"
    biases: str = "same"  # "none", or "float32" beside any dtype
    values: str = "finite"  # or a key of HOSTILE, at some places of x
    gradient: str = "none"  # the layout of the incoming gradient
    threads: int = 1
    seed: int = 0

    def check(self, backends: Sequence[str] = EVERY_BACKEND) -> None:
        chain, dtype = Chain(self.settings, self.steps, self.width), getattr(torch, self.dtype)
        x, weights, biases = chain.tensors(self.shape, dtype, seed=self.seed, bias=self.biases != "none")
        x = in_layout(sprinkle(x, self.values, self.seed), self.layout)
        weights = [in_layout(w, self.weight_layout) for w in weights]
        if self.biases == "float32":
            biases = [b.float() * 1.0001 for b in biases]
        tensors = [x, *weights, *(biases or ())]

        def exact(noise: Callable[[Tensor], Tensor]) -> list[Tensor]:
            offsets = None if biases is None else [noise(b) for b in biases]
            return [reference.hierarchical_conv2d(noise(x), [noise(w) for w in weights], offsets, chain.config)]

        truth = Truth(exact, dtype)

        def check_output(out: Tensor, where: str) -> None:
            assert out.dtype == dtype and (x[:1].numel() <= 1 or memory_format(out) == memory_format(x)), where
            assert out.is_contiguous(memory_format=memory_format(x)), where
            assert out.numel() == 0 or out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), where
            if self.values == "finite":
                check_against([out], truth, where)
            elif dtype not in HALVES or not where.startswith("reference"):  # PyTorch's own makes NaN of -Inf in half types
                check_kinds(out, truth.results[0].to(dtype), where)

        with hostile_memory(self.threads):
            for backend, where in each_path(backends):
                garbage = unsound(dtype, self.shape[1:], chain.config)
                if garbage and backend == "reference":
                    continue
                if backend != "auto" and why_not(backend, chain, x) is not None:
                    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run"):
                        hierarchical_conv2d(x, weights, biases, backend=backend, **self.settings)
                    continue
                with untouched(tensors, where):
                    check_output(hierarchical_conv2d(x, weights, biases, backend=backend, **self.settings), where)
                    geometry = {name: self.settings.get(name, 1) for name in ("stride", "dilation", "groups")}
                    packed = pack_weights(weights, biases, backend=backend, **geometry)
                    check_output(hierarchical_conv2d(x, packed, backend=backend, **self.settings), f"{where}, packed")
                    if self.gradient != "none" and not garbage:
                        self._check_gradients(chain, x, weights, biases, backend, where)

    def _check_gradients(self, chain: Chain, x, weights, biases, backend: str, where: str) -> None:
        leaves = [t.detach().requires_grad_() for t in (x, *weights, *(biases or ()))]
        own_weights, own_biases = leaves[1 : 1 + self.steps], leaves[1 + self.steps :] or None
        out = hierarchical_conv2d(leaves[0], own_weights, own_biases, backend=backend, **self.settings)
        grad = gradient_in(self.gradient, out, self.seed)
        with untouched([grad, out], where):
            found = torch.autograd.grad(out, leaves, grad)
        assert [g.dtype for g in found] == [t.dtype for t in leaves], where
        assert found[0].is_contiguous(memory_format=memory_format(x)), where

        # PyTorch's backward takes memory for all of a stride.
        near = Chain(chain.config.clamped_to(max(self.shape[1:])).as_kwargs(), self.steps, self.width)

        def exact(noise: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
            offsets = [noise(b) for b in biases or torch.zeros(self.steps, self.width)]
            wanted = masked_gradients(near, noise(x), [noise(w) for w in weights], offsets, out, noise(grad))
            return wanted[: len(leaves)]

        check_against(found, Truth(exact, x.dtype), f"{where}, gradients")


@dataclass(frozen=True)
class RowsCase:
    """A call of `hierarchical_conv1d`, and in float64 its gradients."""

    settings: dict[str, object]
    steps: int
    width: int
    kernel: int
    shape: tuple[int, int]  # N, L
    dtype: str
    layout: str = "nchw"
    weight_layout: str = "nchw"
    extras: str = "all"  # or "none", or "biases" without the affine map
    values: str = "finite"
    gradient: str = "none"
    threads: int = 1
    seed: int = 0

    @property
    def near(self) -> Chain1dConfig:
        """PyTorch pads for all of a dilation."""
        return Chain1dConfig(**self.settings).clamped_to(self.shape[1])

    def tensors(self) -> list[object]:
        """x, weights, biases, affine_scale, affine_shift."""
        dtype, generator = getattr(torch, self.dtype), torch.Generator().manual_seed(self.seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        batch, length = self.shape
        scale = self.near.chain.scale(self.steps)
        x = in_layout(sprinkle(random(batch, scale * self.width, length).to(dtype), self.values, self.seed), self.layout)
        fan_in = self.width * self.kernel
        weights = [random(self.width, self.width, self.kernel) * (2 / fan_in) ** 0.5 for _ in range(self.steps)]
        lists: list[object] = [[in_layout(w.to(dtype), self.weight_layout) for w in weights]]
        for name, factor in (("biases", 0.3), ("affine", 1), ("affine", 0.5)):
            given = self.extras in ("all", name)
            lists.append([(factor * random(self.width)).to(dtype) for _ in range(self.steps)] if given else None)
        return [x, *lists]

    def check(self, backends: Sequence[str] = EVERY_BACKEND) -> None:
        x, *lists = self.tensors()
        flat = [x, *(t for values in lists for t in values or ())]

        def call(backend: str) -> Tensor:
            return hierarchical_conv1d(x, *lists, backend=backend, **self.settings)

        def exact(noise: Callable[[Tensor], Tensor]) -> list[Tensor]:
            wide = [None if values is None else [noise(t) for t in values] for values in lists]
            return [reference.hierarchical_conv1d(noise(x), *wide, self.near)]

        truth = Truth(exact, x.dtype)
        with hostile_memory(self.threads):
            for backend, where in self._paths(backends):
                if backend in ("triton", "cuda"):
                    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run"):
                        call(backend)
                    continue
                with untouched(flat, where):
                    out = call(backend)
                    assert out.dtype == x.dtype and out.is_contiguous(), where
                    if self.values == "finite":
                        check_against([out], truth, where)
                    else:
                        check_kinds(out, truth.results[0].to(x.dtype), where)
                    if self.gradient != "none":
                        self._check_gradients(flat, lists, backend, where)

    @staticmethod
    def _paths(backends: Sequence[str]) -> Iterator[tuple[str, str]]:
        """The backend `cpu` multiplies tap by tap, and convolves."""
        for backend in backends:
            for rows in (10**9, 0) if backend == "cpu" else (policy.ROWS_FOR_PRODUCTS,):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(policy, "ROWS_FOR_PRODUCTS", rows)
                    choices.forget_native()
                    yield backend, f"{backend}, products up to {rows} rows"

    def _check_gradients(self, flat: Sequence[Tensor], lists, backend: str, where: str) -> None:
        def gradients(function: Callable[..., Tensor], *more: object, **settings: object) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in flat]
            rest = iter(leaves[1:])
            own = [None if values is None else [next(rest) for _ in values] for values in lists]
            out = function(leaves[0], *own, *more, **settings)
            return torch.autograd.grad(out, leaves, gradient_in(self.gradient, out, self.seed))

        found = gradients(hierarchical_conv1d, backend=backend, **self.settings)
        expected = gradients(reference.hierarchical_conv1d, self.near)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-11 * (1 + b.norm()), f"{where}, gradients"


@dataclass(frozen=True)
class BlockCase:
    """A `Bottle2neck` in eval mode against itself in float64, and in float64 its gradients."""

    arguments: dict[str, object]  # of Bottle2neck, but for inplanes, downsample and attn_layer
    inplanes: int  # 0: as many as come out
    shape: tuple[int, int, int]
    dtype: str
    downsample: str = "none"  # "conv", or "pool" before it; none where x has the output's shape
    attention: bool = False
    layout: str = "nhwc"
    gradient: str = "none"
    threads: int = 1
    seed: int = 0

    def block(self) -> Bottle2neck:
        planes, stride = self.arguments["planes"] * 4, self.arguments.get("stride", 1)
        inplanes = self.inplanes if self.downsample != "none" else planes
        shortcut = None
        if self.downsample != "none":
            pools = self.downsample == "pool"
            conv = nn.Conv2d(inplanes, planes, 1, 1 if pools else stride, bias=False)
            pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if pools else []
            shortcut = nn.Sequential(*pool, conv, nn.BatchNorm2d(planes))
        attention = {"attn_layer": SqueezeExcite} if self.attention else {}
        block = Bottle2neck(inplanes, downsample=shortcut, **self.arguments, **attention)
        return randomize(block, self.seed).to(getattr(torch, self.dtype)).eval()

    def check(self, backends: Sequence[str] = EVERY_BACKEND) -> None:
        block, dtype = self.block(), getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        batch, height, width = self.shape
        x = torch.randn(batch, block.conv1.in_channels, height, width, generator=generator, dtype=torch.float64).to(dtype)
        x = in_layout(x, self.layout)
        state = [*block.parameters(), *block.buffers()]

        def in_float64(noise: Callable[[Tensor], Tensor]) -> nn.Module:
            twin = copy.deepcopy(block).double()
            with torch.no_grad():
                for ours, own in zip([*twin.parameters(), *twin.buffers()], state, strict=True):
                    if own.is_floating_point():
                        ours.copy_(noise(own))
            return twin

        def exact(noise: Callable[[Tensor], Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return [bottle2neck(in_float64(noise), noise(x), block.chain_config)]

        truth = Truth(exact, dtype)
        with hostile_memory(self.threads):
            chain = Chain(block.chain_config.as_kwargs(), len(block.convs), block.width)
            for backend, where in each_path(backends):
                if backend != "auto" and why_not(backend, chain, x) is not None:
                    continue
                if backend == "reference" and unsound(dtype, self.shape[1:], block.chain_config):
                    continue
                twin = copy.deepcopy(block)
                twin._res2net_fused.backend = backend
                with untouched([x, *twin.parameters(), *twin.buffers()], where):
                    with torch.inference_mode():
                        out = twin(x)
                    assert twin._res2net_fused.last_refusal is None, where
                    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format(x)), where
                    check_against([out], truth, where)
                    if self.gradient != "none":
                        self._check_gradients(twin, x, where)

    def _check_gradients(self, block: Bottle2neck, x: Tensor, where: str) -> None:
        def gradients(function: Callable[..., Tensor], *more: object) -> tuple[Tensor, ...]:
            leaf = x.detach().requires_grad_()
            out = function(leaf, *more)
            return torch.autograd.grad(out, [leaf, *block.parameters()], gradient_in(self.gradient, out, self.seed))

        found = gradients(block)
        expected = gradients(lambda leaf: bottle2neck(block, leaf, block.chain_config))
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-10 * (1 + b.norm()), f"{where}, gradients"


@dataclass(frozen=True)
class CallCase:
    """A call whose arguments may not fit: it returns what the reference returns, or says which argument is wrong."""

    operator: str  # "conv2d", "conv1d", "packed" or "block"
    given: dict[str, str] = field(default_factory=dict)  # argument: a key of `odd.ODD`

    def check(self, backends: Sequence[str] = ()) -> None:
        from fuzz import odd

        odd.check(self.operator, self.given)


KINDS = {"chain": ChainCase, "rows": RowsCase, "block": BlockCase, "call": CallCase}
Case = ChainCase | RowsCase | BlockCase | CallCase


def to_json(case: Case) -> dict[str, object]:
    kind = next(name for name, cls in KINDS.items() if type(case) is cls)
    return {"kind": kind, **asdict(case)}


def from_json(record: dict[str, object]) -> Case:
    fields = {name: tuple(value) if name == "shape" else value for name, value in record.items() if name not in ("kind", "why")}
    return KINDS[record["kind"]](**fields)
