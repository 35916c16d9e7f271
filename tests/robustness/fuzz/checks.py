"""What every case asserts: nearness to float64, memory that stays as it is, and the paths over which a call is run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from cpu_kernel_cases import INSTRUCTION_SETS, each_kernel
from helpers import BOUNDS, NAMED_BACKENDS
from memory_layouts import stored_bytes
from torch import Tensor

from res2net_fused.testing.parity import poisoned_allocations

# Where terms cancel, rounding the inputs alone changes the result by more than a bound: by so many times that an error may be.
CONDITION = 20.0


def disturbed(seed: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Makes float64 of a tensor, every value off by up to one rounding of `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        off = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return t.detach().double() * (1 + torch.finfo(dtype).eps * off)

    return noise


class Truth:
    """What `function` makes of its tensors in float64; it takes them by the converter that it is given."""

    def __init__(self, function: Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]], dtype: torch.dtype) -> None:
        self.function, self.dtype = function, dtype

    @functools.cached_property
    def results(self) -> Sequence[Tensor]:
        return [t.detach() for t in self.function(lambda t: t.detach().double())]

    @functools.cached_property
    def spread(self) -> list[float]:
        """By how much rounding the tensors to `dtype` changes each result."""
        runs = [self.function(disturbed(seed, self.dtype)) for seed in range(3)]
        return [max((run[i].detach() - exact).norm().item() for run in runs) for i, exact in enumerate(self.results)]


def check_against(found: Sequence[Tensor], truth: Truth, where: object) -> None:
    """Every tensor of `found` near its twin, in the Frobenius norm."""
    for i, (out, exact) in enumerate(zip(found, truth.results, strict=True)):
        assert out.shape == exact.shape, f"{where}: result {i} is {tuple(out.shape)} instead of {tuple(exact.shape)}"
        error, norm = (out.detach().double() - exact).norm().item(), exact.norm().item()
        info = torch.finfo(out.dtype)
        subnormal = info.smallest_normal * info.eps * out.numel() ** 0.5  # the distance of the smallest values
        if error <= max(BOUNDS[truth.dtype], info.eps) * norm + subnormal:
            continue
        assert error <= CONDITION * truth.spread[i] + subnormal, (
            f"{where}: result {i} is off by {error:.3g} at a norm of {norm:.3g}; inputs off by one rounding change it by "
            f"{truth.spread[i]:.3g}"
        )


def check_kinds(out: Tensor, expected: Tensor, where: object) -> None:
    """NaN, Inf and -Inf at the same places."""
    for name, kind in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        assert torch.equal(kind(out), kind(expected)), f"{where}: {name} is not where the reference has it"


@contextmanager
def hostile_memory(threads: int) -> Iterator[None]:
    """Memory that nobody has written holds NaN; scratch memory too, and it is no longer than the call asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with poisoned_allocations(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("RES2NET_FUSED_CPU_POISON", "1")
            yield
    finally:
        torch.set_num_threads(before)


def release_scratch() -> None:
    if INSTRUCTION_SETS:
        torch.ops.res2net_fused_native.cpu_scratch_bytes(True)


def each_path(backends: Sequence[str] = ("auto", *NAMED_BACKENDS)) -> Iterator[tuple[str, str]]:
    """(backend, a name) for every backend, and for `cpu` every instruction set and arithmetic."""
    for backend in backends:
        if backend != "cpu" or not INSTRUCTION_SETS:
            yield backend, backend
            continue
        for kernel in each_kernel():
            release_scratch()
            yield backend, f"cpu, {kernel}"


@contextmanager
def untouched(tensors: Sequence[Tensor], where: object) -> Iterator[None]:
    """Not a bit of these, or around them in their storage, changes."""
    before = [stored_bytes(t) for t in tensors]
    yield
    for i, (tensor, bits) in enumerate(zip(tensors, before, strict=True)):
        assert torch.equal(stored_bytes(tensor), bits), f"{where}: the caller's tensor {i} was written to"
