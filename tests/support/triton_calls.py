"""The launches of Triton kernels for the published shapes, on tensors without memory, and the source that each compiles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from triton.compiler import ASTSource

from res2net_fused.backends.triton.availability import precision_of
from res2net_fused.backends.triton.backward import BatchNorms, ChainGradients
from res2net_fused.backends.triton.block import block_calls, slot_pitch
from res2net_fused.backends.triton.kernels.common import GroupView, pack_weights
from res2net_fused.backends.triton.kernels.compare_samples import ROWS, sample_calls
from res2net_fused.backends.triton.kernels.conv1d_fwd import chain_calls_1d
from res2net_fused.backends.triton.kernels.conv3x3_bn_fwd import train_calls
from res2net_fused.backends.triton.kernels.conv3x3_fwd import chain_calls
from res2net_fused.backends.triton.launch import KernelCall
from res2net_fused.backends.triton.step_plan import dot_precision, padded_channels, plan_steps, plan_training
from res2net_fused.chain.config import (
    Chain1dConfig,
    ChainConfig,
)
from res2net_fused.chain.problem import Chain1dProblem, ChainProblem
from res2net_fused.modules import watched_weights

SPEECHBRAIN = Chain1dConfig(dilation=2, passthrough="first", padding_mode="reflect")
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
SHARED_LIMIT = {
    (8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (12, 0): 99 * 1024,
}  # fmt: skip
CAPABILITIES = tuple(SHARED_LIMIT)
PRECISIONS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True))
BATCHES = (32, 1, 256)


@dataclass(frozen=True)
class Shape:
    """One stage of a published network; `stage` for its first block. size is that of x."""

    network: str
    width: int
    scale: int
    size: int
    groups: int = 1
    stage: bool = False
    pitch: int | None = None

    def __str__(self) -> str:
        return f"{self.network}-{self.size}" + "-stage" * self.stage + f"-pitch{self.pitch}" * bool(self.pitch)

    @property
    def config(self) -> ChainConfig:
        if not self.stage:
            return ChainConfig(groups=self.groups)
        stride = 1 if self.size == 56 and self.width == _width(self.network, 0) else 2
        return ChainConfig(stride=stride, groups=self.groups, hierarchical=False, pool="avg3")


NETWORKS = {"26w4s": (26, 4, 1), "14w8s": (14, 8, 1), "48w2s": (48, 2, 1), "26w8s": (26, 8, 1), "4x8": (4, 4, 8)}


def _width(network: str, stage: int) -> int:
    base, _, groups = NETWORKS[network]
    return base * groups * 2**stage


def _shapes() -> list[Shape]:
    shapes = []
    for network, (_, scale, groups) in NETWORKS.items():
        for stage in range(4):
            width, size = _width(network, stage), 56 >> stage
            shapes.append(Shape(network, width, scale, size, groups))
            shapes.append(Shape(network, width, scale, min(56, 2 * size), groups, stage=True))
            if width % 8:  # the layout in which every slot is padded to a multiple of 8
                shapes.append(Shape(network, width, scale, size, groups, pitch=padded_channels(width)))
    return shapes


SHAPES = _shapes()


def calls(shape: Shape, dtype: torch.dtype, tf32: bool, capability: tuple[int, int], batch: int) -> list[KernelCall]:
    """The distinct launches of one chain, on tensors without memory."""
    config = shape.config
    steps = shape.scale - 1
    problem = ChainProblem(
        config, torch.device("cuda"), dtype, batch, shape.size, shape.size, shape.width, steps, channels_last=True
    )
    pitch = shape.pitch or shape.width
    plan = plan_steps(problem, capability, tf32=tf32, pitch=pitch)

    def slots(height: int, width: int) -> GroupView:
        data = torch.empty(batch, shape.scale * pitch, height, width, dtype=dtype, device="meta")
        return GroupView(data.to(memory_format=torch.channels_last), pitch, pitch)

    x, out = slots(shape.size, shape.size), slots(problem.output_height, problem.output_width)
    weight = torch.empty(shape.width, shape.width // shape.groups, 3, 3, dtype=dtype, device="meta")
    weights = pack_weights([weight] * steps, shape.groups, padded_channels(shape.width // shape.groups))[None]
    bias = torch.empty(steps, shape.width, device="meta")
    distinct = {}
    for call in chain_calls(problem, plan, x, out, weights, bias):
        distinct.setdefault(triton_key(call), call)
    return list(distinct.values())


def calls_of_samples() -> list[KernelCall]:
    """What is launched beside a block in eval mode, to notice writes to its weights."""
    table = torch.empty(1, 3, ROWS, dtype=torch.int64, device="meta")
    noticed = torch.empty(watched_weights._SLOTS, dtype=torch.int64, device="meta")
    return [call for keeps in (True, False) for call in sample_calls(table, noticed, keeps)]


def calls_of_block(shape: Shape, dtype: torch.dtype, capability: tuple[int, int], batch: int) -> list[KernelCall]:
    """The distinct launches of one whole block, on tensors without memory."""
    config, steps = shape.config, shape.scale - 1
    problem = ChainProblem(
        config, torch.device("cuda"), dtype, batch, shape.size, shape.size, shape.width, steps, channels_last=True
    )
    planes = 64 * shape.width // _width(shape.network, 0)
    channels = shape.scale * slot_pitch(shape.width, shape.groups, dtype.itemsize)

    def pixels(channels: int, height: int) -> torch.Tensor:
        data = torch.empty(batch, channels, height, height, dtype=dtype, device="meta")
        return data.to(memory_format=torch.channels_last)

    weight = torch.empty(shape.width, shape.width // shape.groups, 3, 3, dtype=dtype, device="meta")
    x, out = pixels(planes * 4, shape.size), pixels(planes * 4, problem.output_height)
    packed = [
        torch.empty(1, channels, planes * 4, dtype=dtype, device="meta"),
        torch.empty(channels, device="meta"),
        pack_weights([weight] * steps, shape.groups, padded_channels(shape.width // shape.groups))[None],
        torch.empty(steps, shape.width, device="meta"),
        torch.empty(1, planes * 4, channels, dtype=dtype, device="meta"),
        torch.empty(planes * 4, device="meta"),
    ]
    distinct = {}
    for call in block_calls(problem, capability, x, out, packed, True, out, precision_of(problem)):
        distinct.setdefault(triton_key(call), call)
    return list(distinct.values())


def calls_of_training(
    shape: Shape, dtype: torch.dtype, tf32: bool, capability: tuple[int, int], batch: int = 128,
    statistics_of_batch: tuple[bool, ...] = (True, False),
) -> list[KernelCall]:  # fmt: skip
    """The distinct launches of one chain's training on tensors without memory: forward and backward with batch statistics, and
    the backward with BatchNorm folded.
    """
    steps, device = shape.scale - 1, torch.device("cuda")
    problem = ChainProblem(shape.config, device, dtype, batch, shape.size, shape.size, shape.width, steps, channels_last=True)

    def pixels(channels: int, height: int) -> torch.Tensor:
        data = torch.empty(batch, channels, height, height, dtype=dtype, device="meta")
        return data.to(memory_format=torch.channels_last)

    channels = shape.scale * shape.width
    x, out = pixels(channels, shape.size), pixels(channels, problem.output_height)
    slots = GroupView(x, shape.width, shape.width), GroupView(out, shape.width, shape.width)
    weights = [torch.empty(shape.width, shape.width // shape.groups, 3, 3, dtype=dtype, device="meta")] * steps
    packed = pack_weights(weights, shape.groups, padded_channels(shape.width // shape.groups))
    vectors, statistics = [torch.empty(shape.width, device="meta")] * steps, torch.empty(4, steps, shape.width, device="meta")
    z = [pixels(shape.width, problem.output_height)] * steps
    plan = plan_training(problem, capability, tf32=tf32)
    norms = BatchNorms(z, statistics[0], statistics[1], vectors, None)
    batch_statistics = ChainGradients(problem, plan, out, x, out, weights, norms, (True, True, True))
    folded = ChainGradients(problem, plan, out, x, out, weights, None, (True, True, False))
    every = train_calls(problem, plan, *slots, z, statistics, packed, vectors, vectors, [1e-5] * steps)
    distinct = {}
    trained = itertools.chain(every, batch_statistics.calls()) if True in statistics_of_batch else ()
    for call in itertools.chain(trained, folded.calls() if False in statistics_of_batch else ()):
        distinct.setdefault(triton_key(call), call)
    return list(distinct.values())


def calls_of_rows(
    width: int, dtype: torch.dtype, tf32: bool, config: Chain1dConfig = SPEECHBRAIN, keep: bool = False, length: int = 300
) -> list[KernelCall]:
    """The distinct launches of an ECAPA-TDNN chain of s = 8, on tensors without memory."""
    problem = Chain1dProblem(config, torch.device("cuda"), dtype, 32, length, width, 7, 3)
    x = torch.empty(32, 8 * width, length, dtype=dtype, device="meta")
    weights = torch.empty(7, 3, width, padded_channels(width), dtype=dtype, device="meta")
    vectors = torch.empty(7, width, device="meta")
    kept = [x[:, :width].contiguous()] * 7 if keep else []
    distinct = {}
    for call in chain_calls_1d(problem, x, x, weights, vectors, (vectors, vectors), kept, dot_precision(dtype, tf32)):
        distinct.setdefault(triton_key(call), call)
    return list(distinct.values())


def triton_key(call: KernelCall) -> tuple:
    """What Triton's own cache distinguishes: no integer is specialised, and no tensor differs but in dtype, alignment."""
    constants = [call.arguments[p.name] for p in call.kernel.params if p.is_constexpr]
    aligned = [p.name for p in call.kernel.params if _aligned(call, p)]
    return (call.kernel.__name__, *constants, *aligned, *map(str, sorted(call.options.items())))


def _aligned(call: KernelCall, parameter) -> bool:
    """Whether a launch promises that a pointer is divisible by 16, as PyTorch's allocations are, but not all their slices."""
    value = call.arguments[parameter.name]
    if not isinstance(value, torch.Tensor) or parameter.do_not_specialize_on_alignment:
        return False
    return value.storage_offset() * value.element_size() % 16 == 0


def source(call: KernelCall) -> ASTSource:
    """Compiles the call as a launch does, down to the key in Triton's cache: integers are opaque, promises stand by place."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name], attributes[(i,)] = "constexpr", value, []
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]] if _aligned(call, parameter) else []
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
    return ASTSource(call.kernel, signature, constants, attributes)
