"""Whether a launch may begin while the one before it in its stream ends: programmatic dependent launch, of GPUs from 9.0 on.

    conv1   ...............|end|                  A kernel that is launched so waits for the one before it, ahead of all that
    chain       |start  wait|..............|end|  that one writes or may still read, and lets the next one begin only behind its
    conv3                       |start  wait|...  wait: whoever has begun knows that all before its predecessor have ended.

What overlaps is the start of a grid, and in the chain's launch of a block the copy of its first weights. The waits are
`predecessor_wait` of csrc/cuda/chain/hardware.h and `await_predecessor` of triton/kernels/common.py.
"""

from __future__ import annotations

import functools
import os

import torch

VARIABLE = "RES2NET_FUSED_OVERLAP"
_VALUES = ("on", "off")
_CAPABILITY = (9, 0)
_DRIVER = 12030  # of CUDA 12.3, the first to take such launches into a graph too; csrc/cuda/chain/launch.cuh asks for the same


@functools.cache
def allowed(compute_capability: tuple[int, int]) -> bool:
    """Whether launches overlap on a GPU of this capability; the environment is read once. ValueError where it says neither."""
    chosen = os.environ.get(VARIABLE) or _VALUES[0]
    if chosen not in _VALUES:
        raise ValueError(f"{VARIABLE} is {chosen!r}; allowed are {', '.join(_VALUES)}")
    return chosen == "on" and compute_capability >= _CAPABILITY and (_driver_version() or _DRIVER) >= _DRIVER


def _driver_version() -> int | None:
    """Such as 12030; None where PyTorch has no CUDA, and so nothing but plans."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if version is None else int(version())
