"""Measures chains, blocks and whole networks into one JSON record, in calls of a few minutes that add to one another.

    python benchmarks/record                       # on a GPU machine: builds, checks, measures what 9 minutes allow
    python benchmarks/record                       # again: goes on where the last call stopped
    python benchmarks/record --part network --minutes 5
    python benchmarks/record --list --device cuda  # what would be measured, in which order

Needs torch, triton and numpy, and runs from a plain checkout. Whatever is timed is compared with float64 as it is timed; what
misses, fails, hangs or takes its process with it is a recorded failure, everything else is measured, and the exit status is 1.
benchmarks/README.md says what is timed and how.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shlex
import sys
import time
from pathlib import Path

STARTED = time.time()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch._inductor.config  # noqa: E402

from record import jax_case, roofline, schedule  # noqa: E402
from record.runner import RecordRunner  # noqa: E402
from record.schedule import Budget  # noqa: E402
from record.targets import target_table, targets  # noqa: E402
from res2net_fused._native import library, machine  # noqa: E402
from res2net_fused._timing import use_device  # noqa: E402
from res2net_fused.backends import choices  # noqa: E402
from res2net_fused.backends.base import BACKENDS  # noqa: E402
from res2net_fused.backends.triton.compile_progress import compile_progress  # noqa: E402
from res2net_fused.bench import results  # noqa: E402
from res2net_fused.bench.candidates import RunConditions  # noqa: E402
from res2net_fused.bench.record_file import Record, Row, failure_name  # noqa: E402
from res2net_fused.bench.supervise import AGAIN, REFUSED, supervise  # noqa: E402
from res2net_fused.bench.timed_case import BASELINE, TimedCase, network_name  # noqa: E402
from res2net_fused.bench.turns import Absent, ContextLost, Outcome  # noqa: E402
from res2net_fused.bench.work import l2_bytes  # noqa: E402
from res2net_fused.testing.cases import WidthScale  # noqa: E402

GRACE = 40  # seconds beyond --minutes, after which the case that runs is given up
RATES = "the rates of the roofline"  # as a failure is named


def main(arguments: list[str]) -> int:
    """Returns 0, 1 where the record holds a failure, or 2 for a request that cannot be met; of a child AGAIN, too."""
    with choices.as_published():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.device is None or not options.list:
            options.device = machine.choose_device(options.device, "record")
    except RuntimeError as error:
        print(f"record: {error}", file=sys.stderr)
        return REFUSED
    options.kind = torch.device(options.device).type
    cases = _wanted(options)
    if options.list:
        print("\n".join(f"{i:4d}  {case}" for i, case in enumerate(cases, 1)))
        return 0
    try:
        if options.kind == "cuda":
            _use(options.device)
        environment = _environment(options, arguments)
        path = options.out or _default_path(environment, options.quick)
        record = Record(path, environment, options.again and options.child is None)
    except ValueError as error:
        print(f"record: {error}", file=sys.stderr)
        return REFUSED
    if options.child is not None:
        return _measure(cases, record, options)
    if options.retry:
        record.retry()
    left = _left(cases, record, options)
    print(
        f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}; {len(left)} cases to go",
        flush=True,
    )
    record.save()
    record.close()
    status = 0
    if left:
        command = [sys.executable, str(Path(__file__).resolve().parent), *arguments, "--device", options.device]
        command += ["--commit", str(environment["commit"]), "--out", str(path), "--child", str(STARTED)]
        status = supervise(command, path, deadline=STARTED + 60 * options.minutes + GRACE)
        record = Record(path, environment)
        record.close()
    _report(record, _left(cases, record, options))
    return status or int(bool(record.failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=schedule.PARTS, help="may be given again (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no new case is started (default: 9)")
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU where there is one)")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/<device>/record.json)")
    parser.add_argument("--again", action="store_true", help="begin the record anew; the old one is kept as <name>.before")
    parser.add_argument("--retry", action="store_true", help="try again what failed or could not run in earlier calls")
    parser.add_argument(
        "--limit", type=float, default=420.0, help="seconds for one candidate's compiling and checking (default: 420)"
    )
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of ours (default: auto)")
    parser.add_argument("--configs", help="only these, such as 26w4s,14w8s")
    parser.add_argument("--batch", help="only these, such as 32,256")
    parser.add_argument("--dtype", help="only these, such as bfloat16")
    parser.add_argument("--no-build", action="store_true", help="use the native libraries that are there")
    parser.add_argument("--quick", action="store_true", help="a few tiny cases, to try the machinery; no figures to quote")
    parser.add_argument("--list", action="store_true", help="print what would be measured, and stop")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)  # the process that measures: when the call began
    return parser


def _wanted(options: argparse.Namespace) -> list[TimedCase]:
    cases = schedule.schedule(options.kind, options.part or schedule.PARTS, options.quick)
    for name, read in (("configs", lambda c: str(c.config)), ("batch", lambda c: str(c.batch)), ("dtype", lambda c: c.dtype)):
        text = getattr(options, name)
        if text:
            chosen = [str(WidthScale.parse(t)) if name == "configs" else t.strip() for t in text.split(",")]
            cases = [case for case in cases if read(case) in chosen]
    return cases


def _use(device: str) -> None:
    """Streams, graphs, events and memory figures are those of the current device. ValueError where there is no such one."""
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {device}; this PyTorch sees {torch.cuda.device_count()} CUDA devices")
    use_device(device)


def _environment(options: argparse.Namespace, arguments: list[str]) -> dict[str, object]:
    """Builds the native code too, which is part of the environment. ValueError where the commit has no name."""
    problems = []
    if not options.no_build and options.child is None:
        capability = torch.cuda.get_device_capability(options.device) if options.kind == "cuda" else None
        import setup  # the checkout's setup.py

        problems = setup.build_in_place(capability, options.commit)
    for problem in problems:
        print(f"build: {problem}", flush=True)
    libraries = {"cpu": library.cpu_library(), **({"cuda": library.cuda_library()} if options.kind == "cuda" else {})}
    for status in libraries.values() if options.child is None else ():
        print(f"{status.name} library: {'loaded' if status.loaded else status.reason}", flush=True)
    typed = arguments if options.child is None else arguments[:-8]  # without what `main` adds for a child
    environment = results.environment(options.device, shlex.join(["python", "benchmarks/record", *typed]))
    environment["commit"] = options.commit or environment["commit"]
    if environment["commit"] == "unknown" and not options.quick:
        raise ValueError("there is no .git here: name the commit with --commit")
    environment["native"] = {name: status.loaded for name, status in libraries.items()}
    environment["quick"], environment["choice"] = options.quick, choices.mode()
    return environment


def _default_path(environment: dict[str, object], quick: bool) -> Path:
    if quick:
        return ROOT / "results" / "record-quick.json"
    return ROOT / "benchmarks" / "results" / folder_name(str(environment["device"])) / "record.json"


def folder_name(device_name: str) -> str:
    """Where the records of a device lie under benchmarks/results: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _left(cases: list[TimedCase], record: Record, options: argparse.Namespace) -> list[TimedCase]:
    return [case for case in cases if record.missing(case.keys(options.device), case)]


def _measure(cases: list[TimedCase], record: Record, options: argparse.Namespace) -> int:
    """Times cases in order, in the child, as long as the time of the call allows."""
    budget = Budget(options.minutes, options.child, clock=time.time)
    try:
        record.begin_run()
        with compile_progress():
            _measure_all(_left(cases, record, options), record, budget, options)
    except ContextLost as error:
        print(f"[{budget.elapsed:4.0f} s] the CUDA context is lost: {error}", flush=True)
        return AGAIN
    finally:
        record.save()
        record.close()
    return 0


def _measure_all(cases: list[TimedCase], record: Record, budget: Budget, options: argparse.Namespace) -> None:
    l2 = l2_bytes(options.device)
    conditions = RunConditions(options.device, options.backend, options.quick, l2, record.run, options.limit)
    runner = RecordRunner(conditions, record)
    with runner.noted([RATES], Outcome()):
        if not record.settled(RATES):
            rates = roofline.measure_rates(options.device, list(dict.fromkeys(case.dtype for case in cases)), options.quick)
            copied, products = round(rates.copy_gb_s), {dtype: round(rate, 2) for dtype, rate in rates.matrix_tflops.items()}
            record.describe_run(copy_gb_s=copied, matrix_tflops=products, jax=jax_case.why_not() or "installed")
            print(f"[{budget.elapsed:4.0f} s] copy {copied} GB/s, matrix TFLOP/s {products}", flush=True)
            runner.rates = rates
    torch._inductor.config.autotune_num_choices_displayed = 0  # else max-autotune prints a table for every convolution
    for case in cases:
        kind = "jax" if case.candidates[0][0] == "jax" else case.workload
        if not budget.fits(kind):
            continue
        started = budget.elapsed
        outcome = _time_jax(case, runner) if kind == "jax" else runner.time(case)
        record.add(outcome.rows, outcome.failures, outcome.absent)
        budget.note(kind, budget.elapsed - started)
        print(f"[{budget.elapsed:4.0f} s] {case}: {_line(outcome)}", flush=True)
        gc.collect()
        if options.kind == "cuda":
            torch.cuda.empty_cache()


def _time_jax(case: TimedCase, runner: RecordRunner) -> Outcome:
    outcome = Outcome()
    with runner.noted([failure_name(case, *candidate) for candidate in case.candidates], outcome):
        reason = jax_case.why_not()
        if reason is not None:
            raise Absent(reason)
        outcome.rows.append(jax_case.time_case(case, runner, runner.conditions.limit_s))
    return outcome


def _line(outcome: Outcome) -> str:
    """Medians in milliseconds, those from CUDA graphs marked with a star."""

    def label(row: Row) -> str:
        baseline = "resnet50 " if row["config"] == network_name(BASELINE) else ""
        return f"{baseline}{row['provider']}{'*' if row['graph'] else ''} {row['median_ms']:.4g}"

    texts = [label(row) for row in outcome.rows]
    texts += [f"{name.split(', ')[-1]} FAILED ({reason})" for name, reason in outcome.failures.items()]
    texts += [f"no {name.split(', ')[-1]} ({reason})" for name, reason in outcome.absent.items()]
    return ", ".join(texts)


def _report(record: Record, left: list[TimedCase]) -> None:
    if left:
        print(f"\nNot measured yet ({len(left)} cases); call again to go on:")
        print("\n".join(f"  {case}" for case in left))
    print(f"\nTargets: bf16, both sides in CUDA graphs, medians of one run.\n{target_table(targets(record.rows))}")
    if record.failures:
        print(f"\nFailed ({len(record.failures)}; --retry tries them again):")
        print("\n".join(f"  {name}: {reason}" for name, reason in record.failures.items()))
    print(f"\nWritten: {record.path} ({len(record.rows)} rows)")


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    if exit_status == AGAIN:
        sys.stdout.flush()
        os._exit(AGAIN)  # what unloads a lost CUDA context may hang
    sys.exit(exit_status)
