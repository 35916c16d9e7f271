"""The command `res2net-fused`: info, check, bench and tune."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from ._native import library, machine
from ._tables import format_table
from .backends.base import BACKENDS
from .testing.cases import DEFAULT_CONFIGS, TORCH_DTYPES, VARIANTS, WidthScale, cases

_DTYPES = tuple(name for name in TORCH_DTYPES if name != "float64")
_DEFAULT_BATCH = {"cpu": 8, "cuda": 32}
_SMALL_BATCH = 2
_VARIABLES = (
    "RES2NET_FUSED_BACKEND",
    "RES2NET_FUSED_CPU_ARITHMETIC",
    "RES2NET_FUSED_CPU_ISA",
    "RES2NET_FUSED_CHOICE",
    "RES2NET_FUSED_CHOICES",
    "RES2NET_FUSED_TILES",
    "RES2NET_FUSED_OVERLAP",
    "RES2NET_FUSED_BUILD",
    "RES2NET_FUSED_CUDA_ARCHS",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 where something failed, or 2 for a request that cannot be met.

    arguments: of the command line, without its name; None for sys.argv's. The reason for a 2 goes to stderr. Raises SystemExit,
    as argparse does, for arguments that it does not know (2), and for --help and --version (0).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    try:
        return options.run(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"res2net-fused {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="res2net-fused", description="Res2Net blocks that run fused.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,check,bench,tune}")

    info = _command(commands, "info", _info, "print versions, devices, backends and how the native code was built")
    _add_device(info)
    info.add_argument("--kernels", action="store_true", help="also the compiled CUDA kernels and their predicted times")

    check = _command(
        commands,
        "check",
        _check,
        "compare every backend with float64 at the shapes that bench times",
        "res2net-fused check\n  res2net-fused check --quick\n  res2net-fused check --dtype float16,bfloat16 --configs 26w4s",
    )
    _add_shapes(check)
    check.add_argument("--dtype", type=_dtypes, help=f"of {', '.join(_DTYPES)}, separated by commas (default: by device)")
    check.add_argument("--backend", choices=BACKENDS, help="check this one (default: every one that can run here)")
    check.add_argument("--quick", action="store_true", help="batch 2, and 26w4s and 14w8s only")
    check.add_argument("--no-network", action="store_true", help="leave out Res2Net-50 on two photographs")
    _add_limit(check, 420, "to compile and compare one backend at one shape, or a network")
    check.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the process that compares on a GPU: its journal

    bench = _command(
        commands,
        "bench",
        _bench,
        "check, then time scale s against latency beside eager PyTorch, torch.compile, ONNX Runtime and OpenVINO",
        "res2net-fused bench\n  res2net-fused bench --quick --no-network\n"
        "  res2net-fused bench --scales 1-8 --batch 1,8 --out results/scales\n"
        "  res2net-fused bench --configs 26w4s --model res2net50_26w4s,resnet50 --model-batch 1 --peers all",
    )
    _add_shapes(bench)
    bench.add_argument("--dtype", choices=_DTYPES, help="default: float32 on CPU, bfloat16 on CUDA")
    bench.add_argument("--backend", choices=BACKENDS, default="auto", help="of ours (default: auto)")
    bench.add_argument(
        "--peers",
        choices=("default", "all"),
        default="default",
        help="default: eager, eager in channels-last, for blocks torch.compile, and on a CPU ONNX Runtime and OpenVINO where "
        "they are installed (the extra 'peers'); all: also every way to compile, everywhere",
    )
    bench.add_argument(
        "--quick",
        action="store_true",
        help="batch 2, 26w4s and 14w8s, one network, fewer repeats, no compiling, exporting or training",
    )
    bench.add_argument(
        "--train",
        choices=("default", "all", "none"),
        help="forward and backward. default: chains of 26w4s and 14w8s and blocks of 26w4s; all: chains and blocks of every "
        "config and batch, and the networks' steps of SGD; none: with --quick, unless asked for",
    )
    bench.add_argument(
        "--busy",
        type=_positive,
        default=0,
        metavar="N",
        help="beside N processes that keep a processor busy each, as data loaders do: bench-<device>-busyN.json",
    )
    networks = bench.add_mutually_exclusive_group()
    networks.add_argument(
        "--model",
        type=_models,
        help="whole networks, on two photographs: any of res2net_fused.models.list_models(), separated by commas, or all; "
        "six at a time take turns (default: res2net50_26w4s,res2net50_14w8s,resnet50)",
    )
    networks.add_argument("--no-network", action="store_true", help="leave whole networks out")
    bench.add_argument("--model-batch", type=_batches, help="of the networks, such as 1,8 (default: --batch, else 1,8)")
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder of the JSON and PNG (default: results). The JSON grows case by case; a call with the options of one that "
        "was cut short or had failures goes on behind them, any other begins anew and keeps the old file as <name>.before",
    )
    bench.add_argument("--again", action="store_true", help="begin anew in any case, and try again what failed")
    _add_limit(bench, 420, "to compile and check one contender")
    bench.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # the process that measures on a GPU

    tune = _command(
        commands,
        "tune",
        _tune,
        "measure what runs a model's blocks fastest here, or on a GPU the tiles of the Triton kernels, and keep it",
        "res2net-fused tune --model res2net50_26w4s --batch 1,8\n"
        "  res2net-fused tune --model res2net50_14w8s --batch 32 --train --device cuda\n"
        "  res2net-fused tune --configs 26w4s --batch 1,32 --dtype bfloat16 --minutes 5",
    )
    tune.add_argument(
        "--model",
        type=_models,
        help="names of res2net_fused.models.list_models(), separated by commas: every choice for their blocks is measured, as "
        "by rf.tune (default on a CPU: res2net50_26w4s; on a GPU: none, tiles are measured)",
    )
    tune.add_argument("--size", type=_positive, default=224, help="with --model: rows and columns of the images (default: 224)")
    tune.add_argument("--train", action="store_true", help="with --model: forward and backward together")
    _add_shapes(tune)
    tune.add_argument("--dtype", type=_dtypes, help="separated by commas (default: float32 on a CPU, bfloat16 on a GPU)")
    tune.add_argument("--out", type=Path, help="table of tiles (default: RES2NET_FUSED_TILES, else the table of choices)")
    tune.add_argument("--minutes", type=_positive, default=20, help="after which no block is begun; a later call goes on (20)")
    tune.add_argument("--again", action="store_true", help="measure shapes anew that the table has, and what failed")
    _add_limit(tune, 120, "for one tile")
    tune.add_argument("--child", type=float, help=argparse.SUPPRESS)  # the process that measures: when it is to end
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n  {examples or f'res2net-fused {name}'}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, help="such as cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--threads", type=_positive, help="CPU threads of PyTorch (default: PyTorch's own choice)")


def _add_limit(parser: argparse.ArgumentParser, seconds: int, what: str) -> None:
    text = f"seconds on a GPU {what}, after which it counts as hanging (default: {seconds})"
    parser.add_argument("--limit", type=_positive, default=seconds, help=text)


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--configs", type=_configs, help="such as 26w4s,14w8s (default: 64w1s,48w2s,26w4s,14w8s)")
    which.add_argument("--scales", type=_scales, help="such as 1-8 or 2,4: each at the width that keeps FLOPs equal")
    parser.add_argument("--batch", type=_batches, help="one or several, such as 1,8 (default: 8 on CPU, 32 on CUDA)")
    _add_device(parser)


# Types of arguments: argparse prints the message of an ArgumentTypeError ----------------------------------------------


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _configs(text: str) -> tuple[WidthScale, ...]:
    try:
        return tuple(WidthScale.parse(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _models(text: str) -> tuple[str, ...]:
    from .bench.networks import spelt
    from .models.registry import list_models

    names = list_models() if text == "all" else [part.strip() for part in text.split(",")]
    try:
        return tuple(dict.fromkeys(map(spelt, names)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, all") from None


def _scales(text: str) -> tuple[WidthScale, ...]:
    scales: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        scales += range(_positive(first), _positive(last or first) + 1)
    if not scales:
        raise argparse.ArgumentTypeError(f"{text!r} holds no scale; such as 1-8 or 2,4 is needed")
    return tuple(WidthScale.from_scale(scale) for scale in scales)


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in _DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r} is no dtype to check; allowed are {', '.join(_DTYPES)}")
    return names


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type not in _DEFAULT_BATCH:
        raise argparse.ArgumentTypeError(f"device is {text!r}; allowed are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = machine.why_no_gpu_here()
        seen = f"this PyTorch sees {torch.cuda.device_count()} CUDA devices"
        raise argparse.ArgumentTypeError(f"device is {text!r}; {seen}{f': {why}' if why else ''}")
    return text


def _resolve(options: argparse.Namespace) -> None:
    """Fills in what depends on the machine."""
    options.device = machine.choose_device(options.device, f"res2net-fused {options.command}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.command == "info":
        return
    options.kind = torch.device(options.device).type
    quick = (WidthScale.from_scale(4), WidthScale.from_scale(8))
    options.configs = options.configs or options.scales or (quick if _is_quick(options) else DEFAULT_CONFIGS)
    options.batches = options.batch or ((_SMALL_BATCH,) if _is_quick(options) else (_DEFAULT_BATCH[options.kind],))


def _is_quick(options: argparse.Namespace) -> bool:
    return getattr(options, "quick", False)  # `tune` has no quick form


# Commands -------------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from .bench.results import environment
    from .testing.parity import unavailable_backends

    _resolve(options)
    facts = environment(options.device, "")
    del facts["command"]
    _section(f"res2net-fused {__version__}", facts)
    unavailable = unavailable_backends(options.device)
    _section(
        f"backends for {options.device}",
        {name: unavailable.get(name, "can run") for name in BACKENDS if name != "auto"},
    )
    built = library.build_information()
    parts = built.pop("parts")
    for name, part in parts.items():
        built[f"{name} part"] = f"built, {part['file']}" if part["built"] else f"not built: {part['reason']}"
    for status in (library.cpu_library(), library.cuda_library()):
        built[f"{status.name} library"] = "loaded" if status.loaded else f"not loaded: {status.reason}"
    _section("native extension", built)
    _section("environment variables", {name: os.environ.get(name, "(not set)") for name in _VARIABLES})
    if options.kernels:
        from .backends.cuda.kernel_report import kernel_table, prediction_table

        for title, table in (("predicted, not measured", prediction_table), ("CUDA kernels", kernel_table)):
            head, *rows = table()  # the latter raises where there is no library
            print(f"\n{title}\n{format_table(head, rows, left=3)}")
    return 0


def _section(title: str, facts: dict[str, object]) -> None:
    print(f"{title}:")
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"  {name.ljust(width)}  {'none' if text is None or text == '' else text}")
    print()


def _check(options: argparse.Namespace) -> int:
    from .bench.check import CheckOptions, compare_in_child, run_check

    _resolve(options)
    dtypes = options.dtype or {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32", "tf32")}[options.kind]
    todo = []
    for dtype in dtypes:
        # Half types are slow on CPUs without instructions for them.
        slow = options.kind == "cpu" and dtype != "float32" and options.batch is None
        batches = (_SMALL_BATCH,) if slow else options.batches
        todo += cases(("chain", "block"), options.configs, batches, dtype, options.device, VARIANTS)
    of_networks = () if options.no_network else dtypes
    chosen = CheckOptions(tuple(todo), of_networks, options.device, options.backend, options.limit)
    if options.child is None:
        return run_check(chosen, [sys.executable, "-m", "res2net_fused", *options.arguments, "--child"])
    return _ended(compare_in_child(chosen, options.child))


def _ended(lost: bool) -> int:
    """The end of a child process. lost: whether it can use its device no more."""
    from .bench.supervise import AGAIN

    if lost:
        sys.stdout.flush()
        os._exit(AGAIN)  # what unloads a lost CUDA context may hang
    return 0


_BENCH_EXTRA = {"tqdm": "tqdm", "matplotlib": "matplotlib"}  # by what is imported
_BENCH_EXTRA_FOR_NETWORKS = {"sklearn": "scikit-learn", "PIL": "pillow"}


def _need_bench_extra(networks: bool) -> None:
    """Raises ImportError, whose message is one sentence with the remedy, where something of the extra is missing."""
    wanted = _BENCH_EXTRA | (_BENCH_EXTRA_FOR_NETWORKS if networks else {})
    missing = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f"{', '.join(missing)} {verb} not installed: pip install 'res2net-fused[bench]'")


def _bench(options: argparse.Namespace) -> int:
    from .bench.networks import DEFAULT_MODELS
    from .bench.run import BenchOptions, command_line, measure, run_bench

    _need_bench_extra(networks=not options.no_network)
    _resolve(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:  # said before the measurements rather than after them
        raise RuntimeError(f"--out {options.out} cannot be written ({error}): name another folder") from None
    models = options.model or DEFAULT_MODELS[: 1 if options.quick else None]
    chosen = BenchOptions(
        configs=options.configs,
        batches=options.batches,
        dtype=options.dtype or ("bfloat16" if options.kind == "cuda" else "float32"),
        device=options.device,
        backend=options.backend,
        peers=options.peers,
        quick=options.quick,
        models=() if options.no_network else models,
        train=options.train or ("none" if options.quick else "default"),
        model_batches=options.model_batch or options.batch or ((_SMALL_BATCH,) if options.quick else (1, 8)),
        busy=options.busy,
    )
    if not options.child:
        child = [sys.executable, "-m", "res2net_fused", *options.arguments, "--child"]
        command = command_line(options.arguments)
        return run_bench(chosen, options.out, command, again=options.again, limit_s=options.limit, child=child)
    return _ended(measure(chosen, options.out, command_line(options.arguments[:-1]), options.limit))


def _tune(options: argparse.Namespace) -> int:
    from .bench.run import command_line
    from .bench.tune import measure_tiles, run_tune, tuned_blocks

    _resolve(options)
    options.dtype = options.dtype or (("float32",) if options.kind == "cpu" else ("bfloat16",))
    if options.model or options.kind == "cpu":
        return _tune_models(options)
    blocks = tuned_blocks(options.configs, options.batches, options.dtype, options.device)
    if options.child is None:
        child = [sys.executable, "-m", "res2net_fused", *options.arguments]
        command = command_line(options.arguments)
        return run_tune(blocks, options.device, options.out, command, child, options.minutes, options.again)
    command = command_line(options.arguments[:-4])  # without what `run_tune` adds for a child
    return _ended(measure_tiles(blocks, options.device, options.out, command, options.limit, options.child))


def _tune_models(options: argparse.Namespace) -> int:
    """Measures every choice for the blocks of models by name, in each dtype, as `tune` does for anybody's model."""
    from .backends.choices_file import user_path
    from .bench.networks import DEFAULT_MODELS

    calls = list(itertools.product(options.model or DEFAULT_MODELS[:1], options.dtype, options.batches))
    supervised = options.kind == "cuda" and os.name == "posix"
    if options.child is not None:
        return _tune_model_in_child(options, *calls[0])
    failures = [_tune_model_supervised(options, *call) if supervised else _tune_model(options, *call) for call in calls]
    print(f"kept in {user_path()}")
    return int(any(failures))


def _tune_model_supervised(options: argparse.Namespace, name: str, dtype: str, batch: int) -> bool:
    """Measures in child processes; returns whether something failed."""
    from .bench.supervise import supervise
    from .bench.tune import GRACE
    from .tuning.marked import record_beside_table

    record = record_beside_table(options.device)
    if options.again:
        record.retry()
    record.save()
    record.close()
    end = time.time() + 60 * options.minutes
    chosen = ["--model", name, "--dtype", dtype, "--batch", str(batch), "--child", str(end)]
    command = [sys.executable, "-m", "res2net_fused", *options.arguments, *chosen]
    return supervise(command, record.path, deadline=end + GRACE) != 0


def _tune_model_in_child(options: argparse.Namespace, name: str, dtype: str, batch: int) -> int:
    from .bench.supervise import FAILED
    from .bench.turns import ContextLost

    try:
        return FAILED if _tune_model(options, name, dtype, batch) else 0
    except ContextLost as error:
        print(f"the CUDA context is lost: {error}", flush=True)
        return _ended(True)


def _tune_model(options: argparse.Namespace, name: str, dtype: str, batch: int) -> bool:
    """Measures in this process; returns whether something could not be measured."""
    from .bench.networks import random_network
    from .patching.accelerate import accelerate
    from .tuning.tune import tune_within

    minutes = options.minutes if options.child is None else max(0.01, (options.child - time.time()) / 60)
    model = accelerate(random_network(name).to(options.device, TORCH_DTYPES[dtype]))
    x = torch.randn(batch, 3, options.size, options.size, device=options.device, dtype=TORCH_DTYPES[dtype])
    print(f"{name}, batch {batch}, {options.size}x{options.size}, {dtype}{', training' * options.train}", flush=True)
    report = tune_within(options.limit, model.train(options.train), x, training=options.train, minutes=minutes, progress=True)
    print(f"{report}\n", flush=True)
    return any(call.notes and not call.ms for call in report.calls)
