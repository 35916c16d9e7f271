"""What the GPU tests run, as data, so that a test without a GPU can tell which instances and tiles they launch on which card.

tests/test_gpu_coverage.py holds these lists against everything that the plans of the published networks choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from emulator.harness import Case as Chain
from emulator.harness import replace
from test_emulated_chain import HALVES, SINGLES, TILES, WIDTHS
from test_emulated_chain import SETTINGS as STRIP_SETTINGS
from test_emulated_cluster import SHARED, SHARED_SETTINGS
from test_emulated_wgmma import CUTS
from test_emulated_wgmma import SETTINGS as WGMMA_SETTINGS

from res2net_fused.backends import native_cuda
from res2net_fused.bench.workloads import TORCH_DTYPES, VARIANTS, Case, Config, cases
from res2net_fused.chain import ChainProblem
from res2net_fused.native import DeviceLimits

# Chains of the `cuda` backend -----------------------------------------------------------------------------------------

ODD = [Chain(26, 4, 3, 57, 33), Chain(52, 4, 2, 29, 31), Chain(104, 4, 5, 15, 13), Chain(208, 4, 9, 7, 7)]
ODD += [Chain(14, 8, 2, 61, 129)]
# Wide groups in batches that fill a Hopper GPU: the wgmma kernel there.
FULL = [Chain(52, 4, 64, 28, 28), Chain(104, 4, 256, 14, 14), Chain(48, 2, 32, 56, 56), Chain(56, 8, 130, 14, 13)]
FULL += [Chain(96, 3, 130, 15, 9), Chain(208, 2, 257, 7, 7)]
SIZES = [(w << i, s, 56 >> i) for w, s in ((26, 4), (14, 8), (48, 2)) for i in range(4)]
PUBLISHED = [Chain(w, s, 3, size, size) for w, s, size in SIZES]
# Batches of one and two are what clusters share; the odd number of images leaves the last CTA with less than its part.
SMALL = [replace(case, images=images) for case in ODD + PUBLISHED for images in (1, 2)]
PLANNED = [case for case in WIDTHS + STRIP_SETTINGS + ODD + PUBLISHED + FULL + SMALL if not case.pad and not case.tile]
IN_TF32 = [case for case in SINGLES if not case.pad] + [replace(c, dtype=torch.float32) for c in ODD + PUBLISHED]
# As they are timed: the very launches that `info --kernels` predicts.
TIMED = [
    Chain(w, s, batch, size, size, dtype)
    for dtype in (*HALVES, torch.float32)
    for batch in (1, 32, 256)
    for w, s, size in SIZES
]
# The launches that the emulator runs, cut by hand.
CUT = [case for case in TILES + STRIP_SETTINGS + CUTS + WGMMA_SETTINGS + SHARED + SHARED_SETTINGS if case.tile and not case.pad]


def problem_of(case: Chain) -> ChainProblem:
    device = torch.device("cuda")
    return ChainProblem(case.config, device, case.dtype, case.images, case.height, case.columns, case.width, case.steps, True)


def launch_of(case: Chain, limits: DeviceLimits) -> native_cuda.Plan:
    """How the call is launched on a device with these limits. ValueError, with the reason, where it cannot be."""
    if not case.tile:
        return native_cuda.plan_chain(problem_of(case), limits)
    if case.wgmma and not limits.wgmma:
        raise ValueError("the device has no wgmma")
    if case.clusters and problem_of(case).steps > 1 and case.config.hierarchical and limits.capability_major < 9:
        raise ValueError("the device has no thread-block clusters")
    # What is not cut by hand is the strip kernel's plan for a device that has nothing else.
    plan = native_cuda.plan_chain(problem_of(case), limits._replace(capability_major=8, capability_minor=0, wgmma=0))
    cut = plan._replace(**{"row_parts": 1, "channel_parts": 1, "warps_k": 1} | case.tile)
    if not case.clusters and not case.wgmma:
        cut = cut._replace(instance=strip_instance(case))
    return cut


def strip_instance(case: Chain) -> int:
    """The strip kernel's instance of this width, as csrc/plan/chain_plan.cpp chooses it."""
    depths = -(-case.width // native_cuda.depth_channels(case.dtype))
    columns = native_cuda.packed_columns(case.width, case.dtype)
    kinds = native_cuda._INSTANCE_DEPTHS_COLUMNS
    fixed = [i for i, (d, c) in enumerate(kinds) if d == depths and c == columns and case.dtype != torch.float32]
    return fixed[0] if fixed else max((c, i) for i, (d, c) in enumerate(kinds) if d == 0 and columns % c == 0)[1]


# Calls of the Triton kernels: cases of the benchmark, at its sizes ----------------------------------------------------

_BOTH = Config(26, 4), Config(14, 8)
_CONFIGS = (*_BOTH, Config(48, 2))
INFERENCE: list[Case] = [
    *cases(("chain", "block"), _CONFIGS, (1, 32, 256), "bfloat16", "cuda"),
    *cases(("chain", "block"), _BOTH[:1], (32,), "bfloat16", "cuda", VARIANTS[1:]),
    *cases(("chain", "block"), _BOTH[:1], (32,), "float16", "cuda"),
    *cases(("chain",), _BOTH[:1], (1, 32), "tf32", "cuda"),
    *cases(("chain",), _BOTH[:1], (1, 32), "float32", "cuda"),
]
TRAINING: list[Case] = [
    *cases(("train_chain",), _BOTH, (32, 128, 256), "bfloat16", "cuda"),
    *cases(("train_block",), _BOTH[:1], (32,), "bfloat16", "cuda"),
    *cases(("train_chain",), _BOTH[:1], (32,), "float32", "cuda"),
]


def kernel_calls(todo: Iterable[Case], capability: tuple[int, int]) -> Iterator[object]:
    """Every distinct launch of these cases on a card, as `KernelCall`s on tensors without memory."""
    import test_triton_aot as aot

    seen = set()
    for case in todo:
        width = case.config.width << (case.stage - 1)
        shape = aot.Shape(str(case.config), width, case.config.scale, case.input_size, stage=case.variant == "stage")
        dtype, tf32 = TORCH_DTYPES[case.dtype], case.dtype == "tf32"
        if case.workload == "chain":
            found = aot.calls(shape, dtype, tf32, capability, case.batch)
        elif case.workload == "block":
            found = aot.calls_of_block(shape, dtype, capability, case.batch)
        else:
            found = aot.calls_of_training(shape, dtype, tf32, capability, case.batch)
        for call in found:
            key = aot._key(call), *(v.dtype for v in call.arguments.values() if isinstance(v, torch.Tensor))
            if key not in seen:
                seen.add(key)
                yield call
