"""What the GPU tests run, as data, so that a test without a GPU can tell which instances and tiles they launch on which card.

tests/integration/test_gpu_coverage.py holds these lists against everything that the plans of the published networks choose.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
from emulated_cases import CUT_SETTINGS, CUTS, HALVES, SETTINGS, SHARED, SHARED_SETTINGS, SINGLES, TILES, WIDTHS
from emulator.harness import Case as Chain
from emulator.harness import replace, shared_bytes

from res2net_fused._native.library import DeviceLimits
from res2net_fused.backends.cuda import packing as cuda_packing
from res2net_fused.backends.cuda import plan as launch_plan
from res2net_fused.backends.cuda.kernel_report import PUBLISHED as PUBLISHED_CONFIGS
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.testing.cases import TORCH_DTYPES, TRAINED, VARIANTS, Case, WidthScale, cases
from res2net_fused.testing.parity import convolution_precision

# A stand-in card computes on the CPU, and of `launch="reference"` no kernel: PyTorch answers whole calls.
STAND_IN = os.environ.get("STAND_IN_CARD", "")
RUNS_KERNELS = not STAND_IN or "interpreter" in STAND_IN


def affordable(case):
    """The case, of either kind; on a stand-in card one image of it."""
    if not STAND_IN:
        return case
    return replace(case, **{"images" if isinstance(case, Chain) else "batch": 1})


# Chains of the `cuda` backend -----------------------------------------------------------------------------------------

ODD = [Chain(26, 4, 3, 57, 33), Chain(52, 4, 2, 29, 31), Chain(104, 4, 5, 15, 13), Chain(208, 4, 9, 7, 7)]
ODD += [Chain(14, 8, 2, 61, 129)]
# Wide groups in batches that fill a Hopper GPU: the wgmma kernel there.
FULL = [Chain(52, 4, 64, 28, 28), Chain(104, 4, 256, 14, 14), Chain(48, 2, 32, 56, 56), Chain(56, 8, 130, 14, 13)]
FULL += [Chain(96, 3, 130, 15, 9), Chain(208, 2, 257, 7, 7)]
SIZES = [(w << i, s, 56 >> i) for w, s in PUBLISHED_CONFIGS for i in range(4)]
PUBLISHED = [Chain(w, s, 3, size, size) for w, s, size in SIZES]
# Batches of one and two are what clusters share; the odd number of images leaves the last CTA with less than its part.
SMALL = [replace(case, images=images) for case in ODD + PUBLISHED for images in (1, 2)]
PLANNED = [case for case in WIDTHS + SETTINGS + ODD + PUBLISHED + FULL + SMALL if not case.pad and not case.tile]
PLANNED_TF32 = [case for case in SINGLES if not case.pad and not case.tile]
PLANNED_TF32 += [replace(case, dtype=torch.float32) for case in ODD + PUBLISHED]
# As they are timed: the very launches that `info --kernels` predicts.
TIMED = [
    Chain(w, s, batch, size, size, dtype)
    for dtype in (*HALVES, torch.float32)
    for batch in (1, 32, 256)
    for w, s, size in SIZES
]
# The same as a block launches them, which lays its groups out itself: by `fill` without a pad they are known.
IN_BLOCKS = [replace(case, fill=True) for case in TIMED]
# What the emulator cuts by hand, and what it runs in padded slots, of all three kernels.
_BY_HAND = TILES + SETTINGS + CUTS + CUT_SETTINGS + SHARED + SHARED_SETTINGS
CUT = [replace(case, dtype=dtype) for case in _BY_HAND if case.tile or case.pad for dtype in HALVES]
CUT += [case for case in SINGLES if case.tile or case.pad]


def problem_of(case: Chain) -> ChainProblem:
    device = torch.device("cuda")
    return ChainProblem(case.config, device, case.dtype, case.images, case.height, case.columns, case.width, case.steps, True)


def launch_of(case: Chain, limits: DeviceLimits) -> launch_plan.Plan:
    """How the call is launched on a device with these limits. ValueError, with the reason, where it cannot be."""
    if not case.tile:
        problem = problem_of(case)
        in_block = case.fill and not case.pad
        return launch_plan.plan_chain(replace(problem, around=(1, 1)) if in_block else problem, limits)
    if case.wgmma and not limits.wgmma:
        raise ValueError("the device has no wgmma")
    sends = case.clusters and case.steps > 1 and case.config.hierarchical
    if sends and (limits.capability_major < 9 or limits.code < 90):
        raise ValueError("the device has no thread-block clusters")
    # What is not cut by hand is the plan for such a device without clusters and wgmma.
    plan = launch_plan.plan_chain(problem_of(case), limits._replace(capability_major=8, capability_minor=0, wgmma=0))
    if "instance" not in case.tile:
        plan = plan._replace(instance=strip_instance(case))
    plan = plan._replace(**{"row_parts": 1, "channel_parts": 1, "warps_k": 1} | case.tile)
    if (needed := shared_bytes(case, plan)) > limits.shared_per_block_optin:
        raise ValueError(f"the cut takes {needed} bytes of shared memory; a block may have {limits.shared_per_block_optin}")
    return plan


def strip_instance(case: Chain) -> int:
    """The strip kernel's instance of this width, as csrc/cuda/plan/launch_plan.cpp chooses it."""
    depths = -(-case.width // cuda_packing.depth_channels(case.dtype))
    columns = cuda_packing.packed_columns(case.width, case.dtype)
    kinds = cuda_packing._INSTANCE_DEPTHS_COLUMNS
    fixed = [i for i, (d, c) in enumerate(kinds) if d == depths and c == columns and case.dtype != torch.float32]
    return fixed[0] if fixed else max((c, i) for i, (d, c) in enumerate(kinds) if d == 0 and columns % c == 0)[1]


# Calls of the Triton kernels: cases of the benchmark, at its sizes ----------------------------------------------------

_26W4S = (WidthScale(26, 4),)
_BOTH = (*_26W4S, WidthScale(14, 8))
_ALL = tuple(WidthScale(*config) for config in PUBLISHED_CONFIGS)


def _single(workload: str, batches: tuple[int, ...]) -> list[Case]:
    """In float32 and TF32: what has a tile of its own."""
    every = [c for dtype in ("tf32", "float32") for c in cases((workload,), _ALL, batches, dtype, "cuda")]
    return [case for case in every if case.config in _26W4S or case.stage == 1]


INFERENCE: list[Case] = [
    *cases(("chain", "block"), _BOTH, (1, 32), "bfloat16", "cuda"),
    *cases(("block",), _BOTH, (1, 32), "bfloat16", "cuda", VARIANTS[1:]),
    *cases(("block",), _26W4S, (32,), "float16", "cuda"),
    *cases(("chain",), _ALL[2:], (1, 32), "bfloat16", "cuda"),
    *cases(("chain",), _ALL, (256,), "bfloat16", "cuda"),
    *_single("chain", (1, 32)),
]
TRAINING: list[Case] = [
    *cases(("train_chain",), _ALL, (32, 128), "bfloat16", "cuda"),
    *cases(("train_chain",), _ALL[1:2], (256,), "bfloat16", "cuda"),
    *cases(("train_block",), _26W4S, (32,), "bfloat16", "cuda"),
    *_single("train_chain", (32,)),
]
# The backward with BatchNorms folded, as of `hierarchical_conv2d`.
FOLDED = "gradients"
GRADIENTS: list[Case] = [
    *cases((FOLDED,), _26W4S, (32, 128), "bfloat16", "cuda"),
    *cases((FOLDED,), _26W4S, (32,), "float32", "cuda"),
]


# Res2Net-50 26w4s called as it is: dtypes and batches.
EAGER = [(dtype, batch) for dtype in ("bfloat16", "float16", "float32") for batch in (1, 8, 32)]


def network_blocks(dtype: str, batch: int) -> list[Case]:
    """The blocks of that network."""
    return cases(("block",), _26W4S, (batch,), dtype, "cuda", VARIANTS)


def kernel_calls(todo: Iterable[Case], capability: tuple[int, int]) -> Iterator[object]:
    """The launches of these cases on a card, as `KernelCall`s on tensors without memory."""
    import triton_calls

    for case in todo:
        width = case.config.width << (case.stage - 1)
        shape = triton_calls.Shape(str(case.config), width, case.config.scale, case.input_size, stage=case.variant == "stage")
        dtype, tf32 = TORCH_DTYPES[case.dtype], case.dtype == "tf32"
        with convolution_precision(case.dtype, "cuda"):  # which a block's plan asks for
            if case.workload == "chain":
                yield from triton_calls.calls(shape, dtype, tf32, capability, case.batch)
            elif case.workload == "block":
                yield from triton_calls.calls_of_block(shape, dtype, capability, case.batch)
                yield from triton_calls.calls_of_samples()
            else:
                statistics = (case.workload in TRAINED,)
                yield from triton_calls.calls_of_training(shape, dtype, tf32, capability, case.batch, statistics)


def distinct(calls: Iterable[object]) -> list[object]:
    """The first of the calls that are one kernel to Triton."""
    import triton_calls

    found: dict[object, object] = {}
    for call in calls:
        dtypes = [value.dtype for value in call.arguments.values() if isinstance(value, torch.Tensor)]
        found.setdefault((triton_calls.triton_key(call), *dtypes), call)
    return list(found.values())


@contextlib.contextmanager
def recorded() -> Iterator[list[object]]:
    """A list that grows with every launch of a Triton kernel, none of which is made."""
    from res2net_fused.backends.triton import prepared
    from res2net_fused.backends.triton.launch import KernelCall

    prepared._kind.cache_clear()  # prepared launches are made without it
    calls: list[object] = []
    own, KernelCall.launch = KernelCall.launch, lambda call: calls.append(call)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        KernelCall.launch = own  # type: ignore[method-assign]
