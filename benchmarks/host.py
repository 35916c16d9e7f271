"""Times what one call costs the host: blocks so small that computing takes next to nothing, on one thread, beside PyTorch.

    python benchmarks/host.py
    python benchmarks/host.py --backend cpu --rounds 400
    python benchmarks/host.py --backend triton --size 1
    python benchmarks/host.py --backend triton --no-compile

Microseconds a call, of blocks with 64 channels. All take turns in one run, 10 calls at a time; what is timed was compared with
float64 before.

cpu      native: what the native library computes in, as PyTorch's profiler clocks its operators, called for the same input by
         themselves since it does not see into native bodies; host: the rest
triton   on the stand-in card of tests/support/card, hence only in a checkout: its driver launches nothing, so that all of it is
         the host's; checked with the same card's interpreter. Eager runs on the CPU, since the card would make it slower

The machine must be otherwise idle.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from res2net_fused import accelerate, freeze, hierarchical_conv2d, pack_weights
from res2net_fused._tables import format_table
from res2net_fused._timing import Contender, measure
from res2net_fused.backends import choices
from res2net_fused.backends.selection import get_backend
from res2net_fused.bench import results
from res2net_fused.chain import reference
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.chain.tolerances import FORWARD
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

BLOCKS = {"26w4s": (26, 4), "14w8s": (14, 8)}
CHANNELS = 64
CALLS = 10  # of one contender in a row
BACKENDS = ("cpu", "triton")
CARD = "H100"
NATIVE = "res2net_fused_native::"  # operators of the library
STAND_IN = Path(__file__).resolve().parents[1] / "tests" / "support"
ON_CARD = "STAND_IN_CARD"  # set in a process that has one


class Repeated(Contender):
    """Calls in a row, as those of a network's blocks follow each other."""

    calls = CALLS
    kernels: Repeated | None = None  # those that it calls, by operators that the profiler sees, which it need not

    def run(self) -> Any:
        with torch.inference_mode():
            for _ in range(self.calls):
                self.model(self.inputs[0])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: cpu triton")
    parser.add_argument("--size", type=int, default=4, metavar="PIXELS", help="rows and columns of the images (default: 4)")
    parser.add_argument("--rounds", type=int, default=200, help=f"of {CALLS} calls of each contender (default: 200)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes a minute to compile")
    options = parser.parse_args(arguments)
    with choices.as_published():
        return run(options, arguments)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if os.environ.get(ON_CARD):
        return on_card(options)
    torch.set_num_threads(1)
    device = results.environment("cpu", "")["device"]
    print(f"{device}, 1 thread, torch {torch.__version__}, images of {options.size}x{options.size}, medians of "
          f"{options.rounds} x {CALLS} calls in microseconds", flush=True)  # fmt: skip
    return max(run_cpu(options) if backend == "cpu" else start_card(arguments) for backend in options.backend)


# What is called -------------------------------------------------------------------------------------------------------


def contenders(block: str, backend: str, options: argparse.Namespace) -> tuple[dict[str, Repeated], dict[str, Tensor]]:
    """What is called, and what it gives in float64, by name."""
    generator = torch.Generator().manual_seed(0)
    width, scale = BLOCKS[block]
    device, dtype = ("cpu", torch.float32) if backend == "cpu" else ("cuda", torch.float16)

    def random(*shape: int) -> Tensor:
        """Values that the backend's type holds."""
        return torch.randn(shape, generator=generator).to(dtype).float()

    eager = ReferenceBottle2neck(CHANNELS, CHANNELS // 4, baseWidth=width, scale=scale).eval()
    for parameter in eager.parameters():
        parameter.data.copy_(random(*parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    x = random(1, CHANNELS, options.size, options.size)

    def ours() -> nn.Module:
        return accelerate(copy.deepcopy(eager).to(device, dtype), backend=backend)

    calls: dict[str, Callable[[Tensor], Tensor]] = {"eager": eager, "cached": ours(), "frozen": freeze(ours())}
    if backend == "cpu" and not options.no_compile:
        calls |= {"eager, compiled": torch.compile(eager), "frozen, compiled": torch.compile(freeze(ours()))}
    inputs = dict.fromkeys(calls, x)
    with torch.no_grad():
        expected = dict.fromkeys(calls, copy.deepcopy(eager).double()(x.double()))

    w = eager.convs[0].in_channels
    plain = [random(w, w, 3, 3) / (3 * w**0.5) for _ in eager.convs], [0.1 * random(w) for _ in eager.convs]
    weights, biases = ([t.to(device, dtype) for t in tensors] for tensors in plain)
    packed = pack_weights(weights, biases, backend=backend)
    calls["operator"] = lambda u: hierarchical_conv2d(u, weights, biases, backend=backend)
    calls["operator, packed"] = lambda u: hierarchical_conv2d(u, packed, backend=backend)
    u = random(1, scale * w, options.size, options.size)
    doubles = [[t.to(dtype).double() for t in tensors] for tensors in plain]
    exact = reference.hierarchical_conv2d(u.double(), *doubles, ChainConfig())
    for name in set(calls) - set(inputs):
        inputs[name], expected[name] = u, exact
    found: dict[str, Repeated] = {}
    for name, call in calls.items():
        own = inputs[name] if "eager" in name else inputs[name].to(device, dtype)
        found[name] = Repeated(call, [own.contiguous(memory_format=torch.channels_last)])
    if backend == "cpu":
        own = get_backend(backend)
        kept = cast(Any, calls["frozen"])._res2net_fused.frozen.weights(dtype, torch.device(device))
        block_problem, problem = (
            ChainProblem.from_tensor(found[name].inputs[0], w, len(weights), ChainConfig()) for name in ("frozen", "operator")
        )
        kernels: dict[str, Callable[[Tensor], Tensor]] = {
            "operator": lambda u: own.forward(problem, u, weights, biases, None),
            "operator, packed": lambda u: own.forward(problem, u, weights, biases, packed.packed),
        }
        for name in set(found) - set(kernels):
            kernels[name] = lambda x: own.block_forward(block_problem, x, x, kept, True)
        for name, call in kernels.items():
            found[name].kernels = None if "eager" in name else Repeated(call, found[name].inputs)
    return found, expected


def check(found: Mapping[str, Repeated], expected: Mapping[str, Tensor]) -> None:
    """RuntimeError, naming who differs from float64 by more than its type allows."""
    named = [(name, own) for name, contender in found.items() for own in (contender, contender.kernels) if own]
    for name, contender in named:
        (out,) = contender.outputs()
        error = float((out.cpu().double() - expected[name]).norm() / expected[name].norm())
        bound = FORWARD[str(out.dtype).removeprefix("torch.")].limit
        if not error <= bound:
            raise RuntimeError(f"{name}: relative error {error:.2g}, {bound:g} is allowed; nothing is timed")


def timed(found: Mapping[str, Contender], device: str, rounds: int) -> dict[str, float]:
    """Median microseconds of a call."""
    timings = measure(found, device, seconds=0, min_repeats=rounds, max_repeats=rounds, warm_up=5)
    return {name: 1e3 * timing.median_ms for name, timing in timings.items()}


# The CPU --------------------------------------------------------------------------------------------------------------


def run_cpu(options: argparse.Namespace) -> int:
    columns = []
    for block in BLOCKS:
        found, expected = contenders(block, "cpu", options)
        check(found, expected)
        us = timed(found, "cpu", options.rounds)
        native = {name: native_us(contender.kernels) if contender.kernels else 0.0 for name, contender in found.items()}
        columns.append({name: (us[name], native[name], us[name] - native[name] if native[name] else 0.0) for name in us})
    report("cpu, float32", ("us", "native", "host"), columns)
    return 0


def native_us(contender: Repeated) -> float:
    """Median microseconds of a call within operators of the library."""
    samples = []
    for _ in range(5):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            contender.run()
        inside = [event.cpu_time_total for event in profiler.events() if event.name.startswith(NATIVE)]
        samples.append(sum(inside) / contender.calls)
    return statistics.median(samples)


def report(title: str, kinds: Sequence[str], columns: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """One table: a row for each contender, and for each block what is in `columns`."""
    head = (title, *(f"{block} {kind}" for block in BLOCKS for kind in kinds))
    rows = [(name, *(f"{value:.1f}" if value else "-" for own in columns for value in own[name])) for name in columns[0]]
    print(f"\n{format_table(head, rows)}", flush=True)


# The stand-in card ----------------------------------------------------------------------------------------------------


def start_card(arguments: Sequence[str]) -> int:
    """Runs this script in processes that have the card: to check with the interpreter, then to time without any launch."""
    if not STAND_IN.is_dir():
        print(f"triton: the stand-in card is not in {STAND_IN}; run this from a checkout", file=sys.stderr)
        return 2
    sys.path.insert(0, str(STAND_IN))
    import card

    for launch in ("interpreter", "nothing"):
        environment = card.environment(card.Settings(CARD, launch=launch, cuda_library=False))
        status = subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode
        if status:
            return status
    return 0


def on_card(options: argparse.Namespace) -> int:
    import card
    from card.triton_driver import LAUNCHES

    torch.set_num_threads(1)
    columns, launches = [], []
    for block in BLOCKS:
        found, expected = contenders(block, "triton", options)
        if card.Settings.of(os.environ[ON_CARD]).launch == "interpreter":
            check(found, expected)
            continue
        columns.append({name: (us,) for name, us in timed(found, "cuda", options.rounds).items()})
        before = LAUNCHES.count
        found["frozen"].run()
        launches.append((LAUNCHES.count - before) // CALLS)
    if columns:
        report("triton, float16", ("us",), columns)
        print(
            f"launches of a frozen block: {', '.join(map(str, launches))}; {stand_in_us():.1f} us of the stand-in for a tensor"
        )
    return 0


def stand_in_us() -> float:
    """Median microseconds that the stand-in takes to allocate a tensor, of which a frozen block makes two."""
    allocate = Repeated(lambda x: torch.empty(64, device="cuda"), [torch.empty(0)])
    return timed({"allocate": allocate}, "cuda", 100)["allocate"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
