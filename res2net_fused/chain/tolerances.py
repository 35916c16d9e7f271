"""How far a result may be from float64: the one table of bounds, with the measured worst case beside each.

Errors are relative in the Frobenius norm, ||out - ref|| / ||ref||, with ref the float64 result for the same rounded inputs and
weights. Gradients have the same bounds, against a float64 backward that uses the tested path's own ReLU masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Found = TypeVar("Found")


@dataclass(frozen=True)
class Bound:
    """The largest error allowed, and the largest one that `res2net-fused check` met (None where not measured yet)."""

    limit: float
    measured: float | None
    where: str


FORWARD = {
    "float64": Bound(1e-13, 2.2e-15, "reference on CPU, block 14w8s, stage 4"),
    "float32": Bound(5e-6, 3.1e-6, "cpu, chain 64w1s, stage 4"),
    "tf32": Bound(1e-3, None, "CUDA only"),
    "float16": Bound(2e-3, 7.1e-4, "reference on CPU, block 14w8s, stage 2"),
    "bfloat16": Bound(1.5e-2, 6.3e-3, "reference on CPU, block 14w8s, stage 2"),
}
# A half type may also not be worse than this many times PyTorch's own eager path in the same type on the same input.
HALF_TYPES = ("float16", "bfloat16")
HALF_OVER_EAGER = 2.0
# At its first use in a process a GPU kernel may be so many times as far off as the bound: rounding in another order, on random
# values that nobody has looked at, stays below; a wrong index or a lost barrier is off by hundreds.
FIRST_USE = 4.0
# Whole networks accumulate the errors of all their layers, so only eager's own error is a yardstick.
NETWORK_OVER_EAGER = 4.0
# In training Winograd's rounding adds up: one convolution's error is 4.5 to 6 times that of ATen's, which the 1x1 convolutions,
# norms and shortcuts around it thin out. Eager means the same memory format: in channels-last it is up to 7 times as far off.
TRAINED_OVER_EAGER = Bound(5.0, 4.1, "cpu with AVX-512, training forward of a speaker network, 8 blocks with s = 8, NCHW")

# Error of gradients up to which ReLUs whose input rounding takes across zero may explain it; 0.006 was seen.
OTHER_RELUS = 0.05
_SETS_OF_IMAGES = 6  # one image has flipped ReLUs in a third to a half of all draws


def on_other_images(compared: Callable[[int, bool], Found | None]) -> Found:
    """What `compared` finds on the first images by which it can tell.

    compared: called with the number of a set of random images, and whether it is the last. It returns None to be called with
    others: where gradients alone miss their bound by at most OTHER_RELUS, as they do where rounding decides a ReLU otherwise.
    What is wrong misses it on all images.
    """
    for number in range(_SETS_OF_IMAGES):
        found = compared(number, number == _SETS_OF_IMAGES - 1)
        if found is not None:
            return found
    raise AssertionError("None is no answer for the last images")


def first_use_bound(dtype: object, tf32: bool) -> float:
    """The bound on a kernel that nobody has looked at yet. dtype: of its tensors. tf32: whether it may round to that."""
    return FIRST_USE * FORWARD["tf32" if tf32 else str(dtype).removeprefix("torch.")].limit


def forward_bound(dtype: str, eager_error: float) -> float:
    """The bound on one chain or block; `dtype` is a key of FORWARD, `eager_error` eager's own error on the same input."""
    limit = FORWARD[dtype].limit
    return min(limit, HALF_OVER_EAGER * eager_error) if dtype in HALF_TYPES else limit


def network_bound(eager_error: float) -> float:
    """The bound on the features and logits of a whole network."""
    return NETWORK_OVER_EAGER * eager_error
