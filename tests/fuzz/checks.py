"""What every case asserts: nearness to float64, memory that stays as it is, and the paths over which a call is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from cpu_kernel_cases import INSTRUCTION_SETS, each_kernel
from helpers import BOUNDS, NAMED_BACKENDS
from layouts import stored_bytes
from torch import Tensor

from res2net_fused.parity import poisoned_allocations

# Where terms cancel, rounding the inputs alone changes the result by more than a bound: by so many times that an error may be.
CONDITION = 20.0
Exact = Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]]


def disturbed(seed: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Makes float64 of a tensor, every value off by up to one rounding of `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        off = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return t.detach().double() * (1 + torch.finfo(dtype).eps * off)

    return noise


def check_against(found: Sequence[Tensor], exact: Exact, dtype: torch.dtype, where: object) -> None:
    """Every tensor of `found` near its twin of `exact(to_float64)`, in the Frobenius norm."""
    expected = exact(lambda t: t.detach().double())
    spread: list[float] | None = None
    for i, (out, ref) in enumerate(zip(found, expected, strict=True)):
        assert out.shape == ref.shape, f"{where}: result {i} is {tuple(out.shape)} instead of {tuple(ref.shape)}"
        error = (out.detach().double() - ref.detach()).norm().item()
        info = torch.finfo(out.dtype)
        subnormal = info.smallest_normal * info.eps * out.numel() ** 0.5  # the distance of the smallest values
        if error <= BOUNDS[dtype] * ref.norm().item() + subnormal:
            continue
        if spread is None:
            runs = [exact(disturbed(seed, dtype)) for seed in range(3)]
            spread = [max((run[k] - expected[k]).norm().item() for run in runs) for k in range(len(expected))]
        assert error <= CONDITION * spread[i] + subnormal, (
            f"{where}: result {i} is off by {error:.3g} at a norm of {ref.norm().item():.3g}; inputs off by one rounding "
            f"change it by {spread[i]:.3g}"
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
