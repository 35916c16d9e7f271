"""The 1-D chain of ECAPA-TDNN on one CPU core against PyTorch's own operators, in the forms of SpeechBrain and ESPnet.

    python benchmarks/cpu_chain1d.py [--repeats 25]

s = 8, kernels of 3. The peer is what those libraries run: padding, convolution, ReLU, BatchNorm, one concatenation. Ours are
both arrangements of the `cpu` chain1d, with packed weights; the one that it would take is marked. Processor time of this thread
is counted, so that neighbours disturb less. Medians, interleaved; parity with float64 comes before any figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from res2net_fused._tables import format_table
from res2net_fused.backends import policy
from res2net_fused.backends.cpu import chain1d
from res2net_fused.chain import reference
from res2net_fused.chain.block_weights import Chain1dWeights
from res2net_fused.chain.config import Chain1dConfig
from res2net_fused.ops.hierarchical_conv1d import call_1d

FORMS = {
    "SpeechBrain": Chain1dConfig(dilation=2, passthrough="first", padding_mode="reflect"),
    "ESPnet": Chain1dConfig(dilation=2, passthrough="last", padding_mode="zeros"),
}
ROWS = ((1, 100), (1, 200), (1, 300), (1, 600), (1, 2000), (8, 200), (16, 300))  # batch, length
SHAPES = [(width, *rows) for width in (64, 128) for rows in ROWS]
SCALE = 8


def contenders(x: Tensor, width: int, config: Chain1dConfig) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """By name: what is called; and the float64 result."""
    steps = SCALE - 1
    weights = [torch.randn(width, width, 3) * (2 / (3 * width)) ** 0.5 for _ in range(steps)]
    biases, gammas, betas, means = ([0.1 * torch.randn(width) for _ in range(steps)] for _ in range(4))
    variances = [0.5 + torch.rand(width) for _ in range(steps)]
    scale = [gamma * (variance + 1e-5).rsqrt() for gamma, variance in zip(gammas, variances, strict=True)]
    shift = [beta - mean * a for beta, mean, a in zip(betas, means, scale, strict=True)]
    chain = Chain1dWeights(weights, biases, scale, shift, chain1d.pack_1d(weights))

    def eager() -> Tensor:
        def convolution(k: int, u: Tensor) -> Tensor:
            z = F.conv1d(reference.padded_1d(u, weights[k], config), weights[k], biases[k], dilation=config.dilation)
            return F.batch_norm(z.relu(), means[k], variances[k], gammas[k], betas[k])

        return torch.cat(reference.hierarchical_chain(x.split(width, 1), convolution, config.chain), 1)

    def eager_zeros() -> Tensor:
        def convolution(k: int, u: Tensor) -> Tensor:
            z = F.conv1d(u, weights[k], biases[k], padding=config.dilation, dilation=config.dilation)
            return F.batch_norm(z.relu(), means[k], variances[k], gammas[k], betas[k])

        return torch.cat(reference.hierarchical_chain(x.split(width, 1), convolution, config.chain), 1)

    def ours(rows: int) -> Tensor:
        own, policy.ROWS_FOR_PRODUCTS = policy.ROWS_FOR_PRODUCTS, rows
        try:
            return call_1d(x, chain, config, "cpu")
        finally:
            policy.ROWS_FOR_PRODUCTS = own

    doubles = [[tensor.double() for tensor in tensors] for tensors in (weights, biases, scale, shift)]
    return {
        "PyTorch": eager_zeros if config.padding_mode == "zeros" else eager,
        "products": lambda: ours(10**9),
        "convolutions": lambda: ours(0),
    }, reference.hierarchical_conv1d(x.double(), *doubles, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for form, config in FORMS.items():
        for width, batch, length in SHAPES:
            x = torch.randn(batch, SCALE * width, length)
            calls, expected = contenders(x, width, config)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for name, call in calls.items():
                error = float((call() - expected).norm() / expected.norm())
                if not error <= 5e-6:
                    raise RuntimeError(f"{form} {tuple(x.shape)} {name}: relative error {error:.2g}; nothing is timed")
            for _ in range(repeats):
                for name, call in calls.items():
                    begin = time.thread_time()
                    call()
                    times[name].append(1e3 * (time.thread_time() - begin))
            ms = {name: statistics.median(values) for name, values in times.items()}
            taken = "products" if batch * length <= policy.ROWS_FOR_PRODUCTS else "convolutions"
            figures = [f"{value:.3g}{' *' if name == taken else ''}" for name, value in ms.items()]
            rows.append((form, str(tuple(x.shape)), *figures, f"{ms['PyTorch'] / ms[taken]:.2f}"))
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, float32, milliseconds, * taken")
    print(format_table(("form", "x", "PyTorch", "products", "convolutions", "speed-up"), rows))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
