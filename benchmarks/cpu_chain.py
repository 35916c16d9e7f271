"""The chain on the CPU against PyTorch: twelve shapes of Res2Net-50, packed weights, the public operator.

    python benchmarks/cpu_chain.py [--batch 1 8] [--backward] [--threads N] [--seconds S] [--bar RATIO]

Every shape times all contenders in turn, repeat after repeat, and compares medians. The peer is the fastest of PyTorch's
modes: eager, eager channels-last, and channels-last with channels-last weights. With --bar the script exits with 1 where
the geometric mean of a batch size is below it. With --backward the gradients of x, weights and biases are computed as well,
as with frozen BatchNorms; ours then has plain weights, since they change from step to step.

The machine must be otherwise idle: one busy neighbour makes every barrier between two threads wait for it.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from res2net_fused import hierarchical_conv2d, pack_weights
from res2net_fused._tables import format_table
from res2net_fused.bench.timing import Contender, measure
from res2net_fused.chain import reference
from res2net_fused.chain.config import ChainConfig

# (w, s) of the three published widths at stage 1; w doubles from stage to stage
WIDTHS = ((26, 4), (14, 8), (48, 2))
SHAPES = [(56 >> stage, width << stage, scale) for stage in range(4) for width, scale in WIDTHS]
OURS = "cpu"


def contenders(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], backward: bool
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Tensor]]:
    """By name: what is called, and what it is called with."""
    config = ChainConfig()
    last = torch.channels_last
    last_weights = [weight.contiguous(memory_format=last) for weight in weights]
    packed = weights if backward else pack_weights(weights, biases, backend=OURS)
    calls = {
        "eager": lambda x: reference.hierarchical_conv2d(x, weights, biases, config),
        "channels-last": lambda x: reference.hierarchical_conv2d(x, weights, biases, config),
        "... weights too": lambda x: reference.hierarchical_conv2d(x, last_weights, biases, config),
        OURS: lambda x: hierarchical_conv2d(x, packed, biases if backward else None, backend=OURS),
    }
    if backward:
        calls = {
            name: functools.partial(with_gradients, call, last_weights if "too" in name else weights, biases)
            for name, call in calls.items()
        }
    inputs = {name: x if name == "eager" else x.contiguous(memory_format=last) for name in calls}
    return calls, inputs


def with_gradients(call: Callable[[Tensor], Tensor], weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    """The output, and by the way the gradients of everything."""
    tensors = [x, *weights, *biases]
    with torch.inference_mode(False), torch.enable_grad():
        for tensor in tensors:
            tensor.requires_grad_()
        out = call(x)
        torch.autograd.grad(out, tensors, out.detach())
    return out.detach()


def compare(size: int, width: int, scale: int, batch: int, seconds: float, backward: bool) -> tuple[dict[str, float], float]:
    """Median milliseconds of every contender, and the relative error of ours against float64."""
    x = torch.randn(batch, scale * width, size, size)
    weights = [torch.randn(width, width, 3, 3) * (2 / (9 * width)) ** 0.5 for _ in range(scale - 1)]
    biases = [0.1 * torch.randn(width) for _ in range(scale - 1)]
    calls, inputs = contenders(x, weights, biases, backward)
    doubles = [[t.double() for t in tensors] for tensors in (weights, biases)]
    expected = reference.hierarchical_conv2d(x.double(), *doubles, ChainConfig())
    error = float((calls[OURS](inputs[OURS]) - expected).norm() / expected.norm())
    if not error <= 5e-6:
        raise RuntimeError(f"{size}x{size} ({width}, {scale}) batch {batch}: relative error {error:.2g}; nothing is timed")
    timings = measure(
        {name: Contender(call, [inputs[name]]) for name, call in calls.items()},
        "cpu",
        seconds=seconds,
        min_repeats=7,
        max_repeats=400,
        warm_up=3,
    )
    return {name: timing.median_ms for name, timing in timings.items()}, error


def run(batch: int, seconds: float, backward: bool) -> float:
    """Prints one table; returns the geometric mean of the ratios."""
    rows, ratios = [], []
    head = ("HxW (w,s)", "eager", "channels-last", "... weights too", OURS + " ms", "ratio", "error")
    for size, width, scale in SHAPES:
        ms, error = compare(size, width, scale, batch, seconds, backward)
        peer = min(value for name, value in ms.items() if name != OURS)
        ratios.append(peer / ms[OURS])
        times = [f"{value:.3f}" for value in ms.values()]
        rows.append((f"{size} ({width},{scale})", *times, f"{ratios[-1]:.2f}", f"{error:.1e}"))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"{'forward and backward, ' if backward else ''}batch {batch}, {torch.get_num_threads()} threads, medians in ms")
    print(format_table(head, rows, left=1))
    print(f"geometric mean {mean:.2f}, lowest {min(ratios):.2f}\n", flush=True)
    return mean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--backward", action="store_true", help="with all gradients")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each shape")
    parser.add_argument("--bar", type=float, help="exit with 1 where a geometric mean is below it")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    means = [run(batch, arguments.seconds, arguments.backward) for batch in arguments.batch]
    return int(arguments.bar is not None and min(means) < arguments.bar)


if __name__ == "__main__":
    sys.exit(main())
