"""What several test files need: errors and bounds, random chains and modules, the backends of this machine, timm."""

from __future__ import annotations

import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from res2net_fused._native import cuda_toolkit
from res2net_fused.backends.base import BACKENDS
from res2net_fused.backends.selection import get_backend
from res2net_fused.chain import reference
from res2net_fused.chain.activations import CLAMPS, activate, shows_slope, split_activation
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.memory_format import memory_format
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.chain.tolerances import FORWARD

# Of one operator or block; 5e-6 for fp32, 2e-3 for fp16 and 1.5e-2 for bf16 are what the package promises.
BOUNDS = {getattr(torch, name): bound.limit for name, bound in FORWARD.items() if name != "tf32"}
HALVES = (torch.float16, torch.bfloat16)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
NAMED_BACKENDS = [name for name in BACKENDS if name != "auto"]


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; NaN anywhere gives NaN, which is below no bound."""
    assert out.shape == reference.shape, f"{tuple(out.shape)} instead of {tuple(reference.shape)}"
    out, reference = out.detach().double(), reference.detach().double()
    return ((out - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def assert_close(out: Tensor, reference: Tensor, bound: float | None = None) -> None:
    bound = BOUNDS[out.dtype] if bound is None else bound
    error = relative_error(out, reference)
    assert error <= bound, f"relative error {error:.3g}; at most {bound:.3g} is allowed"


def tool(found, name: str, remedy: str):
    """What was found, or a skip where it is None."""
    if found is None:
        message = f"{name} is not installed: {remedy}"
        if os.environ.get("CI"):
            pytest.fail(message)  # continuous integration installs it: a skip there would hide the gate
        pytest.skip(message)
    return found


def find_nvcc() -> str:
    """The nvcc that a build takes, or a skip."""
    try:
        return str(cuda_toolkit.find_nvcc(torch.version.cuda).path)
    except cuda_toolkit.NoNvcc as error:
        return tool(None, "nvcc", str(error))


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """PyTorch's threads within; there may be more of them than cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_together(*work: Callable[[], object]) -> list[object]:
    """Each in a thread of its own, all begun at one moment; what they returned, or the first error of any."""
    results, errors, start = [None] * len(work), [], threading.Barrier(len(work))

    def run(i: int) -> None:
        try:
            start.wait(60)
            results[i] = work[i]()
        except BaseException as error:  # a thread's own failure would be lost
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


def sparse_zeros(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of which only those pages take memory that are written, so that there may be more of them than memory."""
    size = elements * dtype.itemsize
    # mmap.MAP_NORESERVE has a name from Python 3.13 on.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # which would be taken for every element
    return torch.frombuffer(memory, dtype=dtype)


def spread_out(x: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """x (N, C, H, W) with channels side by side and these strides of images, rows and pixels, in a sparse storage."""
    sizes = x.shape[0], x.shape[2], x.shape[3]
    last = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    image, row, pixel = strides
    return sparse_zeros(last + x.shape[1], x.dtype).as_strided(x.shape, (image, 1, row, pixel)).copy_(x)


# Chains ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """Settings and sizes of one call of `hierarchical_conv2d`."""

    settings: dict[str, object] = field(default_factory=dict)
    steps: int = 3
    width: int = 4
    amplitude: float = 1.0  # of x

    @property
    def config(self) -> ChainConfig:
        return ChainConfig(**self.settings)

    @property
    def channels(self) -> int:
        return self.config.scale(self.steps) * self.width

    def tensors(self, shape=(2, 7, 9), dtype=torch.float64, device="cpu", seed=1, bias=True):
        """Random x (N, s*w, H, W), weights and biases; of one seed the same in every dtype, up to rounding."""
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        groups = self.settings.get("groups", 1)
        fan_in = self.width // groups * 9
        x = self.amplitude * random(shape[0], self.channels, *shape[1:])
        weights = [random(self.width, self.width // groups, 3, 3) * (2 / fan_in) ** 0.5 for _ in range(self.steps)]
        biases = [0.3 * random(self.width) for _ in range(self.steps)] if bias else None
        return (
            x.to(device, dtype),
            [w.to(device, dtype) for w in weights],
            None if biases is None else [b.to(device, dtype) for b in biases],
        )


STAGE = {"hierarchical": False, "pool": "avg3"}
CHAINS = {
    "last": Chain(),
    "none": Chain({"passthrough": "none"}),
    "first": Chain({"passthrough": "first"}),
    "first_added": Chain({"passthrough": "first_added"}),
    "s1": Chain({"passthrough": "none"}, steps=1),
    "s2": Chain(steps=1),
    "s2_first": Chain({"passthrough": "first"}, steps=1),
    "s2_first_added": Chain({"passthrough": "first_added"}, steps=1),
    "s8": Chain(steps=7, width=3),
    "width1": Chain(width=1),
    "width13": Chain(width=13),
    "pooled": Chain({"pool": "avg3"}),
    "pooled_nopad": Chain({"pool": "avg3_nopad"}),
    "first_added_pooled": Chain({"passthrough": "first_added", "pool": "avg3"}),
    "max_pooled": Chain({"pool": "max3"}),
    "stage_stride2_max": Chain({"hierarchical": False, "stride": 2, "pool": "max3"}),
    "dilated": Chain({"dilation": 2}),
    "dilated3_groups": Chain({"dilation": 3, "groups": 2}),
    "groups": Chain({"groups": 2}),
    "depthwise": Chain({"groups": 4}),
    "linear": Chain({"activation": "none"}),
    "hardtanh": Chain({"activation": "hardtanh20"}, amplitude=15),
    "relu6": Chain({"activation": "relu6"}, amplitude=5),
    "leaky": Chain({"activation": "leaky_relu:0.2"}),
    "stage": Chain(STAGE),
    "stage_identity": Chain({"hierarchical": False}),
    "stage_stride2": Chain(STAGE | {"stride": 2}),
    "stage_stride2_nopad": Chain({"hierarchical": False, "stride": 2, "pool": "avg3_nopad"}),
    "stage_stride3_dilated": Chain(STAGE | {"stride": 3, "dilation": 2}),
    "stage_first_stride2": Chain(STAGE | {"stride": 2, "passthrough": "first"}),
    "stage_none_stride2_groups": Chain({"hierarchical": False, "stride": 2, "passthrough": "none", "groups": 2}),
    "s1_stride2": Chain({"passthrough": "none", "stride": 2, "hierarchical": False}, steps=1),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())


def behind_own_mask(z, y, activation):
    """z in float64 behind its activation; of one with kinks, on the side of each that y, the tested path's output, shows."""
    kind, slope = split_activation(activation)
    if not shows_slope(activation):
        return activate(z, activation)
    if kind == "none":
        return z
    if kind == "leaky_relu":
        return torch.where(y > 0, z, z * slope)
    bound = CLAMPS[kind][1]
    saturated = y >= bound
    return torch.where(saturated, min(bound, 20.0), z * ((y > 0) & ~saturated))


def masked_gradients(chain, x, weights, biases, out, grad):
    """Float64 gradients, the activations replaced by the masks that the tested path's own output shows."""
    x, *rest = [t.detach().double().requires_grad_() for t in (x, *weights, *biases)]
    weights64, biases64 = rest[: chain.steps], rest[chain.steps :]
    config = chain.config
    outputs = out.detach().split(chain.width, 1)

    def convolution(k, u):
        y = outputs[k + config.first_convolved]
        z = torch.nn.functional.conv2d(
            u, weights64[k], biases64[k], config.stride, config.dilation, config.dilation, config.groups
        )
        return behind_own_mask(z, y, config.activation)

    y = torch.cat(reference.hierarchical_chain(x.split(chain.width, 1), convolution, config), 1)
    return torch.autograd.grad(y, [x, *rest], grad.double())


def why_not(backend: str, chain: Chain, x: Tensor) -> str | None:
    """Why `backend` cannot run this call here, or None."""
    last = memory_format(x) == torch.channels_last
    batch, _, height, width = x.shape
    problem = ChainProblem(chain.config, x.device, x.dtype, batch, height, width, chain.width, chain.steps, last)
    return get_backend(backend).why_not(problem)


def runnable_backends(device: str, dtype: torch.dtype = torch.float32, chain: Chain | None = None) -> list[str]:
    """The backends that run this chain on this device; without one an ordinary chain."""
    chain = CHAINS["last"] if chain is None else chain
    x = chain.tensors(dtype=dtype, device=device)[0]
    return [name for name in NAMED_BACKENDS if why_not(name, chain, x) is None]


# Modules --------------------------------------------------------------------------------------------------------------


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter and statistic, so that no weight that starts at zero or one hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1:
                value *= (2 / tensor[0].numel()) ** 0.5
            elif name.endswith(("running_var", "weight")):
                value = 0.5 + value.abs()
            else:
                value *= 0.3
            tensor.copy_(value)
    return module


class SqueezeExcite(nn.Module):
    """Channel attention: x * sigmoid(conv(mean(x)))."""

    def __init__(self, channels: int, **factory) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


@functools.cache
def import_timm():
    """The module `timm`; None where it is missing or not fit for this torch (`make setup` sees to that)."""
    try:
        import timm
    except (ImportError, RuntimeError):  # torchvision raises the other one beside a torch of another build
        return None
    return timm


def timm_or_skip():
    timm = import_timm()
    if timm is None:
        pytest.skip("timm is not installed (pip install --no-deps timm torchvision)")
    return timm
