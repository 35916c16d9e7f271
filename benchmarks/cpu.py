"""Times ours beside PyTorch and its peers on a CPU, in one run: chains, 1-D chains, the plain call or whole networks.

    python benchmarks/cpu.py chains [--batch 1 8] [--backward] [--threads N] [--seconds S] [--bar RATIO]
    python benchmarks/cpu.py chains1d [--repeats 25]
    python benchmarks/cpu.py plain [--size 224x224 800x1333 | --blocks] [--batch 1 8] [--threads N] [--compile | --train]
    python benchmarks/cpu.py networks --batch 1 --repeats 20 --out results/network.json
    python benchmarks/cpu.py networks --bar-pytorch 1.1 --bar-peer 1 --bar-resnet 0.9

All contenders take turns, repeat after repeat, and medians are compared. What is timed was compared with float64 before.

The machine must be otherwise idle: one busy neighbour makes every barrier between two threads wait for it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from res2net_fused import accelerate, hierarchical_conv2d, pack_weights
from res2net_fused._tables import format_table
from res2net_fused._timing import Contender, measure
from res2net_fused.backends import choices, policy
from res2net_fused.backends.cpu import chain1d
from res2net_fused.bench import floor, networks, providers, results, runtimes
from res2net_fused.bench.network_runner import NetworkRunner, TurnConditions
from res2net_fused.bench.networks import NetworkRatios
from res2net_fused.bench.record_file import Record
from res2net_fused.chain import reference
from res2net_fused.chain.block_weights import Chain1dWeights
from res2net_fused.chain.config import Chain1dConfig, ChainConfig
from res2net_fused.chain.tolerances import network_bound
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.ops.hierarchical_conv1d import call_1d

CHAINS = """The 2-D chain against PyTorch: twelve shapes of Res2Net-50, packed weights, the public operator.

The peer is the fastest of PyTorch's modes: eager, eager channels-last, and channels-last with channels-last weights. With
--bar the exit status is 1 where the geometric mean of a batch size is below it. With --backward the gradients of x, weights and
biases are computed as well, as with frozen BatchNorms; ours then has plain weights, since they change from step to step.
"""
CHAINS_1D = """The 1-D chain of ECAPA-TDNN on one core against PyTorch's own operators, in the forms of SpeechBrain and ESPnet.

s = 8, kernels of 3. The peer is what those libraries run: padding, convolution, ReLU, BatchNorm, one concatenation. Ours are
both arrangements of the `cpu` chain1d, with packed weights; the one that it would take is marked.
"""
PLAIN = """The plain call, `accelerate(model)` and nothing else in NCHW, beside eager in NCHW and everything in channels-last.

--compile puts torch.compile around each of the three; --train times SGD steps in training mode. --blocks: single blocks in
place of a network, one for each stage and kind, which in --train pass the gradient on to their input as inside a network.
Ratios are of medians: eager over plain (above 1: the plain call gains), and plain over converted (above 1: converting would
gain more).
"""
NETWORKS = """Whole networks: Res2Net-50 26w4s and 14w8s against PyTorch, ONNX Runtime, OpenVINO and ResNet-50.

At each batch size all providers of all three networks take turns on photographs of 224x224. Each form of ours is compared
with PyTorch's fastest mode, with ONNX Runtime and OpenVINO (the extra `peers`), and with ResNet-50 in PyTorch's fastest mode;
bars are for the fastest form. A ratio above 1 means that ours is faster. Ours is also divided by two floors, least times by
rates that the run measures (res2net_fused/bench/floor.py): there 1 is the best.

--isa avx2 holds ours, PyTorch (ATen, oneDNN, MKL) and OpenVINO to AVX2. ONNX Runtime has no switch for it.

Exit status 1: a ratio is below its bar, or the parity gate is red. 2: a bar cannot be judged, since a peer was not timed, or
somebody failed or computes something else as it would be timed.
"""
BACKEND = "auto"
OURS = "cpu"
# (w, s) of the three published widths at stage 1; w doubles from stage to stage
WIDTHS = ((26, 4), (14, 8), (48, 2))
SHAPES = [(56 >> stage, width << stage, scale) for stage in range(4) for width, scale in WIDTHS]
FORMS = {
    "SpeechBrain": Chain1dConfig(dilation=2, passthrough="first", padding_mode="reflect"),
    "ESPnet": Chain1dConfig(dilation=2, passthrough="last", padding_mode="zeros"),
}
ROWS_1D = ((1, 100), (1, 200), (1, 300), (1, 600), (1, 2000), (8, 200), (16, 300))  # batch, length
SHAPES_1D = [(width, *rows) for width in (64, 128) for rows in ROWS_1D]
SCALE_1D = 8
# By instruction set: what holds ours, ATen, oneDNN (OpenVINO's own too) and MKL to it, read when their libraries are loaded.
HELD = {
    "avx2": {
        "RES2NET_FUSED_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
_JUDGED_BY = {"bar_pytorch": ("pytorch",), "bar_peer": tuple(runtimes.RUNTIMES), "bar_resnet": ("resnet50",)}
Calls = Mapping[str, Callable[[Tensor], Tensor]]  # by name of the contender


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.typed = shlex.join(["python", "benchmarks/cpu.py", *arguments])
    with choices.as_published():
        return options.run(options)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text.partition("\n")[0], description=text, formatter_class=plain)
        added.set_defaults(run=run)
        return added

    chains, chains_1d, calls, nets = (
        command("chains", CHAINS, run_chains), command("chains1d", CHAINS_1D, run_chains_1d),
        command("plain", PLAIN, run_plain), command("networks", NETWORKS, run_networks),
    )  # fmt: skip
    for one in (chains, calls, nets):
        one.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="default: 1 8")
        one.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    chains.add_argument("--backward", action="store_true", help="with all gradients")
    chains.add_argument("--seconds", type=float, default=2.0, help="of timing for each shape")
    chains.add_argument("--bar", type=float, help="exit with 1 where a geometric mean is below it")
    chains_1d.add_argument("--repeats", type=int, default=25, help="of each contender (default: 25)")
    chains_1d.set_defaults(threads=1)
    calls.add_argument("--size", nargs="+", type=_size, default=["224x224"], metavar="HxW", help="default: 224x224")
    calls.add_argument(
        "--blocks", action="store_true", help="single blocks of Res2Net-50 26w4s, in place of --model and --size"
    )
    calls.add_argument("--model", default="res2net50_26w4s", help="default: res2net50_26w4s")
    calls.add_argument("--repeats", type=int, default=10, help="of each form (default: 10)")
    mode = calls.add_mutually_exclusive_group()
    mode.add_argument("--compile", action="store_true", help="by torch.compile")
    mode.add_argument("--train", action="store_true", help="forward, backward and a step of SGD")
    nets.add_argument("--repeats", type=int, default=10, help="of every provider on every network (default: 10)")
    nets.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes to compile")
    nets.add_argument("--isa", choices=HELD, help="hold everybody to this instruction set who can be held to it")
    nets.add_argument("--out", type=Path, help="JSON file for the rows (default: none)")
    nets.add_argument("--bar-pytorch", type=float, metavar="RATIO", help="over PyTorch's fastest mode")
    nets.add_argument("--bar-peer", type=float, metavar="RATIO", help="over ONNX Runtime and over OpenVINO")
    nets.add_argument("--bar-resnet", type=float, metavar="RATIO", help="over ResNet-50 in PyTorch's fastest mode")
    return parser


def checked(what: str, out: Tensor, expected: Tensor) -> float:
    """The relative error; RuntimeError where it is beyond what fp32 allows."""
    error = float((out - expected).norm() / expected.norm())
    if not error <= 5e-6:
        raise RuntimeError(f"{what}: relative error {error:.2g}; nothing is timed")
    return error


def medians(calls: Calls, inputs: Mapping[str, Tensor], **turns: float) -> dict[str, float]:
    """Milliseconds of every contender on its input; turns: how long `measure` goes on."""
    contenders = {name: Contender(call, [inputs[name]]) for name, call in calls.items()}
    return {name: timing.median_ms for name, timing in measure(contenders, "cpu", warm_up=3, **turns).items()}


# Chains ---------------------------------------------------------------------------------------------------------------


def contenders(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], backward: bool
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Tensor]]:
    """What is called, and what it is called with, by name."""
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
    error = checked(f"{size}x{size} ({width}, {scale}) batch {batch}", calls[OURS](inputs[OURS]), expected)
    return medians(calls, inputs, seconds=seconds, min_repeats=7, max_repeats=400), error


def print_chains(batch: int, seconds: float, backward: bool) -> float:
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


def run_chains(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    means = [print_chains(batch, options.seconds, options.backward) for batch in options.batch]
    return int(options.bar is not None and min(means) < options.bar)


# 1-D chains -----------------------------------------------------------------------------------------------------------


def contenders_1d(x: Tensor, width: int, config: Chain1dConfig) -> tuple[Calls, Tensor]:
    """What is called, by name, and the float64 result."""
    steps = SCALE_1D - 1
    weights = [torch.randn(width, width, 3) * (2 / (3 * width)) ** 0.5 for _ in range(steps)]
    biases, gammas, betas, means = ([0.1 * torch.randn(width) for _ in range(steps)] for _ in range(4))
    variances = [0.5 + torch.rand(width) for _ in range(steps)]
    scale = [gamma * (variance + 1e-5).rsqrt() for gamma, variance in zip(gammas, variances, strict=True)]
    shift = [beta - mean * a for beta, mean, a in zip(betas, means, scale, strict=True)]
    packed = chain1d.pack_1d(weights)
    zeros = config.padding_mode == "zeros"

    def eager(x: Tensor) -> Tensor:
        def convolution(k: int, u: Tensor) -> Tensor:
            padded, padding = (u, config.dilation) if zeros else (reference.padded_1d(u, weights[k], config), 0)
            z = F.conv1d(padded, weights[k], biases[k], padding=padding, dilation=config.dilation)
            return F.batch_norm(z.relu(), means[k], variances[k], gammas[k], betas[k])

        return torch.cat(reference.hierarchical_chain(x.split(width, 1), convolution, config.chain), 1)

    def ours(rows: int, x: Tensor) -> Tensor:
        own, policy.ROWS_FOR_PRODUCTS = policy.ROWS_FOR_PRODUCTS, rows
        choices.forget_native()  # which costs some ten microseconds
        try:
            return call_1d(x, Chain1dWeights(weights, biases, scale, shift, packed), config, OURS)
        finally:
            policy.ROWS_FOR_PRODUCTS = own

    doubles = [[tensor.double() for tensor in tensors] for tensors in (weights, biases, scale, shift)]
    calls = {"PyTorch": eager, "products": functools.partial(ours, 10**9), "convolutions": functools.partial(ours, 0)}
    return calls, reference.hierarchical_conv1d(x.double(), *doubles, config)


@torch.inference_mode()
def run_chains_1d(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    rows = []
    for form, config in FORMS.items():
        for width, batch, length in SHAPES_1D:
            x = torch.randn(batch, SCALE_1D * width, length)
            calls, expected = contenders_1d(x, width, config)
            for name, call in calls.items():
                checked(f"{form} {tuple(x.shape)} {name}", call(x), expected)
            repeats = options.repeats
            ms = medians(calls, dict.fromkeys(calls, x), seconds=0, min_repeats=repeats, max_repeats=repeats)
            taken = "products" if batch * length <= policy.ROWS_FOR_PRODUCTS else "convolutions"
            times = [f"{value:.3g}{' *' if name == taken else ''}" for name, value in ms.items()]
            rows.append((form, str(tuple(x.shape)), *times, f"{ms['PyTorch'] / ms[taken]:.2f}"))
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, float32, milliseconds, * taken")
    print(format_table(("form", "x", "PyTorch", "products", "convolutions", "speed-up"), rows))
    return 0


# The plain call -------------------------------------------------------------------------------------------------------


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 224x224")
    return text


BLOCKS = {  # of Res2Net-50, behind the first one of a stage and that one: channels in, planes, stride, size of the images
    **{f"{planes} planes": (4 * planes, planes, 1, 56 * 64 // planes) for planes in (64, 128, 256, 512)},
    **{f"{planes} planes, first": (2 * planes, planes, 2, 112 * 64 // planes) for planes in (128, 256, 512)},
}


def plain_cases(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """(name, images in NCHW, network or block) of each that is timed."""
    for name, batch in itertools.product(BLOCKS if options.blocks else options.size, options.batch):
        if not options.blocks:
            images = torch.randn(batch, 3, *map(int, name.split("x")))
            yield name, images, networks.plain_network(options.model, "float32", "cpu").network
            continue
        channels, planes, stride, size = BLOCKS[name]
        shortcut = None
        if stride > 1:
            pointwise = nn.Conv2d(channels, 4 * planes, 1, stride, bias=False)
            shortcut = nn.Sequential(pointwise, nn.BatchNorm2d(4 * planes))
        block = ReferenceBottle2neck(channels, planes, stride, shortcut, stype="stage" if stride > 1 else "normal")
        yield name, torch.randn(batch, channels, size, size).relu_().requires_grad_(options.train), block.eval()


def plain_forms(network: nn.Module) -> dict[str, nn.Module]:
    """By name; the last one takes channels-last images, the others NCHW."""
    ours = [accelerate(copy.deepcopy(network)) for _ in range(2)]
    return {"eager": network, "plain": ours[0], "converted": ours[1].to(memory_format=torch.channels_last)}


def step_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A step of SGD on the images, by a loss that needs no labels; returns the loss."""
    network.train().requires_grad_()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    def step(images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad()
            images.grad = None
            loss = network(images).logsumexp(1).mean()
            loss.backward()
            optimizer.step()
        return loss.detach()

    return step


def run_plain(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    rows = []
    for name, images, network in plain_cases(options):
        converted = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_(images.requires_grad)
        inputs = {"eager": images, "plain": images, "converted": converted}
        forms = plain_forms(network)
        with torch.no_grad():
            calls: Calls = {form: torch.compile(own) for form, own in forms.items()} if options.compile else forms
            outs = {form: call(inputs[form]) for form, call in calls.items()}
            exact = copy.deepcopy(forms["eager"]).double()(images[:4].double())
        errors = {form: float((out[:4] - exact).norm() / exact.norm()) for form, out in outs.items()}
        worst = max(errors.values())
        if not worst <= max(1e-5, network_bound(errors["eager"])):
            print(f"{name}, batch {len(images)}: relative errors {errors}; nothing is timed", file=sys.stderr)
            return 1
        if options.train:
            calls = {form: step_of(own) for form, own in forms.items()}
        ms = medians(calls, inputs, seconds=0, min_repeats=options.repeats, max_repeats=options.repeats)
        ratios = [f"{ms['eager'] / ms['plain']:.2f}", f"{ms['plain'] / ms['converted']:.3f}"]
        rows.append((name, str(len(images)), *(f"{value:.1f}" for value in ms.values()), *ratios, f"{worst:.1e}"))
    mode = "SGD steps" if options.train else "torch.compile" if options.compile else "inference"
    what = "blocks of Res2Net-50 26w4s" if options.blocks else options.model
    print(f"{what}, {mode}: {results.environment('cpu', options.typed)['device']}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, fp32, medians of {options.repeats} in ms")  # fmt: skip
    print(
        format_table(
            (
                "images" if not options.blocks else "block",
                "batch",
                "eager",
                "plain",
                "converted",
                "eager / plain",
                "plain / converted",
                "error",
            ),
            rows,
        )
    )
    return 0


# Networks -------------------------------------------------------------------------------------------------------------


def run_networks(options: argparse.Namespace) -> int:
    held = HELD.get(options.isa, {})
    if not held.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | held)
    if held:
        print(f"held to {options.isa} by {held}; onnxruntime cannot be held")
    absent = providers.unavailable("cpu")
    for name, reason in absent.items():
        print(f"not timed, {name}: {reason}")
    if absent and options.bar_peer is not None:
        print(f"networks: --bar-peer needs {' and '.join(absent)}", file=sys.stderr)
        return 2
    names = [name for name in providers.select("cpu", "network", "all") if not (options.no_compile and "compile" in name)]
    environment = results.environment("cpu", options.typed) | {"peers": runtimes.versions()}
    try:
        cases = []
        for model in networks.DEFAULT_MODELS:
            print(f"{model} on two photographs against float64", flush=True)
            cases.append(networks.prepare_network(model, "float32", "cpu", BACKEND))
            if not cases[-1].parity.ok:
                print(f"The parity gate is red, so nothing is timed. Misses:\n{cases[-1].parity.misses}")
                return 1
        with tempfile.TemporaryDirectory() as folder:
            record = Record(options.out or Path(folder, "rows.json"), environment, again=True)
            record.begin_run()
            rounds = (options.repeats, options.repeats)
            runner = NetworkRunner(TurnConditions("cpu", BACKEND, False, None, 1, seconds=0, rounds=rounds), record)
            for batch in options.batch:
                parts = {case.name: floor.parts(case.network, (batch, *case.images.shape[1:])) for case in cases}
                sizes = floor.sizes_of(parts.values())
                rates = floor.measure_rates(sizes)
                outcome = runner.time_networks(cases, batch, providers.candidates(names, "cpu"))
                rates = rates.best(floor.measure_rates(sizes))
                for row in outcome.rows:
                    row |= floor.fields(parts[row["config"]], rates)
                print(f"batch {batch}: {rates}")
                record.add(outcome.rows, outcome.failures)
            record.close()
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"networks: {error}", file=sys.stderr)
        return 2
    if options.out:
        print(f"Written: {options.out}")
    for name, reason in record.failures.items():
        print(f"networks: failed, {name}: {reason}", file=sys.stderr)
    found = networks.network_ratios(record.rows)
    status = report(found, environment, {name: getattr(options, name) for name in _JUDGED_BY})
    return 2 if record.failures else status


def report(found: Sequence[NetworkRatios], environment: dict[str, object], bars: dict[str, float | None]) -> int:
    """Prints the ratios and what is below its bar; returns the exit status."""
    print(f"\n{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, medians in ms;")
    print(f"{environment['peers']}; ratios above 1: ours is faster; ms / floor: 1 is the best")
    print(networks.ratio_table(found))
    below = 0
    fastest = {(one.model, one.batch): one for one in sorted(found, key=lambda one: -one.ms)}.values()  # the last one stays
    for name, bar in bars.items():
        for one in fastest if bar is not None else ():
            for other in _JUDGED_BY[name]:
                value = one.ratio(other)
                if not (value is not None and value >= bar):
                    below += 1
                    measured = "not timed" if value is None else f"{value:.2f}x"
                    print(f"below its bar: {one.model}, batch {one.batch}, over {other}: {measured}, {bar:g}x is asked for")
    return int(below > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
