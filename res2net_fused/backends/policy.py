"""Every measured threshold of "auto": where the package leaves a call to PyTorch or prefers one way to another."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.compiler import is_compiling

from ..chain.problem import Chain1dProblem, ChainProblem


def clamped_chain_pays(problem: ChainProblem) -> bool:
    """Whether a block that is not one operator should be fused, which is one with another activation than ReLU.

    On one AVX-512 core, blocks of speaker networks, fp32: 1.1 to 1.55 times as fast in channels-last, but for a strided one of
    few channels at batch 1 (0.8); 0.73 to 1.5 times as fast in NCHW, whose groups are converted for the chain.
    Those have clamps at 20. No other activation is measured; what the chain saves does not depend on it.
    """
    return problem.channels_last or problem.device.type != "cpu"


def channels_last_pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels for such weights read channels-last, so that NCHW is converted at every call."""
    return device.type == "cuda" or (device.type == "cpu" and dtype == torch.float32)


# What `explain` says of a block that meets NCHW; the factor is that of whole networks on two AVX-512 cores.
NCHW = (
    "x is NCHW and converted at every call, which makes a network 1.6 to 1.8 times as slow: "
    "model.to(memory_format=torch.channels_last) avoids it"
)

# The same of one that is left to its own forward in training: `benchmarks/cpu.py plain --blocks --train`, two AVX-512 cores.
NCHW_IN_TRAINING = (
    "x is NCHW, which it keeps; blocks of up to 256 planes train 1.0 to 1.4 times as fast in channels-last: "
    "x.contiguous(memory_format=torch.channels_last)"
)


@functools.cache
def why_left_to_pytorch(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this package's CPU kernels are predicted to be faster, else the reason.

    They compute half types in float32, which nobody has measured on a processor that has instructions for the half type.
    """
    has = (
        device.type == "cpu"
        and {
            torch.bfloat16: lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            torch.float16: lambda: torch.cpu._is_amx_fp16_supported() or "avx512_fp16" in _flags(),
        }.get(dtype, lambda: False)()
    )
    name = str(dtype).removeprefix("torch.")
    if not has:
        return None
    return f"PyTorch's operators use this processor's {name} instructions, ours compute in float32: rf.tune measures"


def _flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def training_pays(problem: ChainProblem) -> bool:
    """Whether a training step is measured to be faster by the operator than by the class's own forward.

    On two AVX-512 cores, a block's forward and backward at batch 8: 1.04 to 1.12 times as fast as the faster of both memory
    formats from 28x28 pixels on, 0.86 to 1.05 below, where NCHW's 1x1 convolutions are fast; at batch 1 0.86 to 1.06 there.
    Nothing is measured on GPUs, and compilers fuse the class's own forward.
    """
    if is_compiling() or problem.device.type != "cpu":
        return False
    pixels = problem.output_height * problem.output_width
    large = problem.width >= 14 and pixels >= 28 * 28 and problem.batch * pixels >= 8 * 28 * 28
    return large and problem.dtype == torch.float32 and problem.channels_last


# Up to so many rows of all images together, a product for each tap is faster than a convolution by oneDNN, whose weights are
# reordered at every call.
ROWS_FOR_PRODUCTS = 512

# Where the operator pays: up to so many values of a group, by padding mode, and again from so many reflected rows on.
PAYING_VALUES = {"reflect": 400 * 64, "zeros": 300 * 64}

PAYING_REFLECTED_ROWS = 800


def chain_pays_1d(problem: Chain1dProblem, passes: str) -> bool:
    """Whether the operator is measured to be faster than PyTorch's own operators; with gradients nothing is.

    `benchmarks/cpu.py chains1d` on one AVX-512 core, s = 8: 1.1 to 1.85 times as fast where there are few rows; for many
    reflected rows 1.0 to 1.15; elsewhere 0.9 to 1.0. Nothing is measured on GPUs, nor against compilers.
    """
    if is_compiling() or problem.device.type != "cpu" or problem.dtype != torch.float32 or passes != "inference":
        return False
    rows = problem.batch * problem.length
    if rows * problem.width <= PAYING_VALUES[problem.config.padding_mode]:
        return True
    return problem.config.padding_mode == "reflect" and rows >= PAYING_REFLECTED_ROWS


# Backends whose kernels no committed record has measured on a GPU, and what `explain` says of them; empty once one has.
EXPERIMENTAL = dict.fromkeys(("cuda", "triton"), "experimental: never measured on a GPU")

# Winograd's weights cost more to pack than they save in one call with fewer output pixels than this. One convolution and its
# gradients are measured 0.5 times as fast as ATen's with 49 pixels, 0.9 to 1.4 times with 98, 1.0 to 2 times from 392 on.
PIXELS_WORTH_PACKING = 96
