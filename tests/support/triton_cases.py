"""Random chains and blocks, run by the Triton backend into memory full of NaN, and compared with float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from res2net_fused import Bottle2neck
from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.triton import step_plan
from res2net_fused.backends.triton.tiles import Tile
from res2net_fused.chain import reference
from res2net_fused.chain.checks import check_arguments
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.chain.tolerances import forward_bound


@dataclass
class Case:
    """weights and biases of a chain, and an x that may be replaced before `run`."""

    config: ChainConfig
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor] | None

    @property
    def problem(self) -> ChainProblem:
        return check_arguments(self.x, self.weights, self.biases, self.config)

    def run(self, packed: list[Tensor] | None = None) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            poison_new_memory(patch)
            return triton_backend.chain.forward(self.problem, self.x, self.weights, self.biases, packed)

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        biases = None if self.biases is None else [bias.to(dtype) for bias in self.biases]
        weights = [weight.to(dtype) for weight in self.weights]
        return reference.hierarchical_conv2d(self.x.to(dtype), weights, biases, self.config)

    def check(self, packed: list[Tensor] | None = None) -> Tensor:
        before = [tensor.clone() for tensor in (self.x, *self.weights, *(self.biases or ()))]
        out, exact = self.run(packed), self.reference()
        name = str(self.x.dtype).removeprefix("torch.")
        bound = forward_bound(name, error(self.reference(self.x.dtype), exact))
        assert out.shape == exact.shape and out.dtype == self.x.dtype
        assert error(out, exact) <= bound
        for old, new in zip(before, (self.x, *self.weights, *(self.biases or ())), strict=True):
            assert torch.equal(old, new), "an argument was written to"
        return out


def make_case(
    config: ChainConfig | None = None,
    *,
    width: int = 5,
    scale: int = 3,
    batch: int = 2,
    size: tuple[int, int] = (4, 5),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    config = config or ChainConfig()
    generator = torch.Generator().manual_seed(seed)
    steps = scale - (config.passthrough != "none")
    fan_in = 9 * width // config.groups
    shape = (width, width // config.groups, 3, 3)
    weights = [(torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5).to(dtype) for _ in range(steps)]
    biases = [torch.randn(width, generator=generator) / 2 for _ in range(steps)] if bias else None
    x = torch.randn(batch, scale * width, *size, generator=generator).to(dtype)
    return Case(config, x.contiguous(memory_format=torch.channels_last), weights, biases)


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def poison_new_memory(patch: pytest.MonkeyPatch) -> None:
    """What torch.empty returns is full of NaN, so that an element nobody writes, or one read too early, shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, _real=real, **kwargs):
            tensor = _real(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        patch.setattr(torch, name, poisoned)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction, however small the problem."""
    fix_tile(monkeypatch, Tile(16, 16, 16, 1, 2))


def fix_tile(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    monkeypatch.setattr(step_plan, "lookup", lambda shape: None)
    monkeypatch.setattr(step_plan, "default_tile", lambda *_: tile)


# name: arguments of the block (widths that need padding and such that do not), whether it has a downsample
BLOCKS = {
    "w6s4": (dict(inplanes=48, planes=12, baseWidth=32, scale=4), False),
    "w8s3": (dict(inplanes=32, planes=8, baseWidth=64, scale=3), False),
    "w5s2": (dict(inplanes=20, planes=5, baseWidth=64, scale=2), False),
    "w7s1": (dict(inplanes=28, planes=7, baseWidth=64, scale=1), False),
    "stage_stride2": (dict(inplanes=20, planes=12, baseWidth=32, scale=4, stype="stage", stride=2), True),
    "stage_stride1": (dict(inplanes=20, planes=12, baseWidth=32, scale=3, stype="stage"), True),
    "grouped": (dict(inplanes=32, planes=8, baseWidth=32, scale=3, cardinality=2), False),
    "dilated": (dict(inplanes=48, planes=12, baseWidth=32, scale=3, dilation=2), False),
    "first": (dict(inplanes=48, planes=12, baseWidth=32, scale=3, passthrough="first"), False),
    "first_added": (dict(inplanes=48, planes=12, baseWidth=32, scale=3, passthrough="first_added"), False),
    "none": (dict(inplanes=48, planes=12, baseWidth=32, scale=3, passthrough="none"), False),
}


def make_block(name: str, dtype: torch.dtype) -> Bottle2neck:
    arguments, downsamples = BLOCKS[name]
    arguments = dict(arguments)
    if downsamples:
        planes, stride = arguments["planes"] * 4, arguments.get("stride", 1)
        arguments["downsample"] = nn.Sequential(nn.Conv2d(arguments["inplanes"], planes, 1, stride, bias=False))
    block = Bottle2neck(**arguments, backend="triton").eval()
    for key, value in block.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_().mul_(1 / value[0].numel() ** 0.5 if value.dim() > 1 else 0.5)
    return block.to(dtype)
