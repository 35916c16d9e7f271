"""Measures chains, blocks and whole networks into one JSON record, in calls of a few minutes that add to one another.

    python benchmarks/record.py                       # on a GPU machine: builds, checks, measures what 9 minutes allow
    python benchmarks/record.py                       # again: goes on where the last call stopped
    python benchmarks/record.py --part network --minutes 5
    python benchmarks/record.py --list --device cuda  # what would be measured, in which order

Needs torch, triton and numpy, and runs from a plain checkout. Every result is compared with float64 before it is timed; the
first miss ends the call with exit status 1. benchmarks/README.md says what is timed and how.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import signal
import sys
import time
from pathlib import Path

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import native_build  # noqa: E402
import torch  # noqa: E402
import torch._inductor.config  # noqa: E402

from res2net_fused import machine, native  # noqa: E402
from res2net_fused.bench import contests, jax_cases, results, roofline, schedule  # noqa: E402
from res2net_fused.bench.figures import figure_table, figures  # noqa: E402
from res2net_fused.bench.record_file import Record, Row, failure_name, folder_name  # noqa: E402
from res2net_fused.bench.schedule import Budget, Unit  # noqa: E402
from res2net_fused.bench.workloads import Config  # noqa: E402
from res2net_fused.chain import BACKENDS  # noqa: E402

GRACE = 40  # seconds beyond --minutes, after which the unit that runs is given up


class OutOfTime(BaseException):
    """Raised by the alarm; no `except Exception` on the way may swallow it."""


def main(arguments: list[str]) -> int:
    """Returns 0, 1 for a red parity gate, or 2 for a request that cannot be met."""
    options = _parser().parse_args(arguments)
    try:
        if options.device is None or not options.list:
            options.device = machine.choose_device(options.device, "record")
    except RuntimeError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    options.kind = torch.device(options.device).type
    units = _wanted(options)
    if options.list:
        print("\n".join(f"{i:4d}  {unit}" for i, unit in enumerate(units, 1)))
        return 0
    try:
        environment = _environment(options, arguments)
        path = options.out or _default_path(environment, options.quick)
        record = Record(path, environment, options.again)
    except ValueError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    budget = Budget(options.minutes, STARTED)
    units = [unit for unit in units if record.missing(unit.keys(options.device), unit)]
    print(f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}; {len(units)} units to go")
    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, budget.left + GRACE))
    red = None
    left = list(units)
    try:
        _measure_all(left, record, budget, options)
    except contests.RedGate as error:
        red = error
    except OutOfTime:
        print(f"[{budget.elapsed:4.0f} s] out of time; the case that ran is given up", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        record.save()
    if red is not None:
        print(f"\n{red}\nNothing that had not passed was timed. Rows of earlier gates are in {path}")
        return 1
    _report(record, left)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=schedule.PARTS, help="may be given again (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no new case is started (default: 9)")
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU where there is one)")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/<device>/record.json)")
    parser.add_argument("--again", action="store_true", help="replace the record that is there instead of adding to it")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of ours (default: auto)")
    parser.add_argument("--configs", help="only these, such as 26w4s,14w8s")
    parser.add_argument("--batch", help="only these, such as 32,256")
    parser.add_argument("--dtype", help="only these, such as bfloat16")
    parser.add_argument("--no-build", action="store_true", help="use the native libraries that are there")
    parser.add_argument("--quick", action="store_true", help="a few tiny cases, to try the machinery; no figures to quote")
    parser.add_argument("--list", action="store_true", help="print what would be measured, and stop")
    return parser


def _wanted(options: argparse.Namespace) -> list[Unit]:
    units = schedule.schedule(options.kind, options.part or schedule.PARTS, options.quick)
    for name, read in (("configs", lambda u: str(u.config)), ("batch", lambda u: str(u.batch)), ("dtype", lambda u: u.dtype)):
        text = getattr(options, name)
        if text:
            chosen = [str(Config.parse(t)) if name == "configs" else t.strip() for t in text.split(",")]
            units = [unit for unit in units if read(unit) in chosen]
    return units


def _environment(options: argparse.Namespace, arguments: list[str]) -> dict[str, object]:
    """Builds the native code too, which is part of the environment. ValueError where the commit has no name."""
    problems = []
    if not options.no_build:
        capability = torch.cuda.get_device_capability(options.device) if options.kind == "cuda" else None
        problems = native_build.build(capability, options.commit)
    for problem in problems:
        print(f"build: {problem}", flush=True)
    libraries = {"cpu": native.cpu_library(), **({"cuda": native.cuda_library()} if options.kind == "cuda" else {})}
    for status in libraries.values():
        print(f"{status.name} library: {'loaded' if status.loaded else status.reason}", flush=True)
    environment = results.environment(options.device, shlex.join(["python", "benchmarks/record.py", *arguments]))
    environment["commit"] = options.commit or environment["commit"]
    if environment["commit"] == "unknown" and not options.quick:
        raise ValueError("there is no .git here: name the commit with --commit")
    environment["native"] = {name: status.loaded for name, status in libraries.items()}
    environment["quick"] = options.quick
    return environment


def _default_path(environment: dict[str, object], quick: bool) -> Path:
    if quick:
        return ROOT / "results" / "record-quick.json"
    return ROOT / "benchmarks" / "results" / folder_name(str(environment["device"])) / "record.json"


def _give_up(*_: object) -> None:
    raise OutOfTime


def _measure_all(left: list[Unit], record: Record, budget: Budget, options: argparse.Namespace) -> None:
    """Times units in order, taking each from `left` when its rows are in the record."""
    if not left:
        return
    dtypes = list(dict.fromkeys(unit.dtype for unit in left))
    rates = roofline.measure_rates(options.device, dtypes, options.quick)
    known = {"copy_gb_s": round(rates.copy_gb_s), "matrix_tflops": {k: round(v, 2) for k, v in rates.matrix_tflops.items()}}
    record.describe_run(**known, jax=jax_cases.why_not() or "installed")
    print(f"[{budget.elapsed:4.0f} s] copy {known['copy_gb_s']} GB/s, matrix TFLOP/s {known['matrix_tflops']}", flush=True)
    conditions = contests.Conditions(
        options.device, options.backend, options.quick, rates, roofline.l2_bytes(options.device), record.run
    )
    torch._inductor.config.autotune_num_choices_displayed = 0  # else max-autotune prints a table for every convolution
    timer, passed = contests.Contests(conditions), set()
    for unit in list(left):
        kind = "jax" if unit.contestants[0][0] == "jax" else unit.workload
        if not budget.fits(kind):
            continue
        if unit.phase not in passed:
            together = [other for other in left if other.phase == unit.phase]
            report = contests.gate(together, conditions)
            passed.add(unit.phase)
            if report:
                print(f"[{budget.elapsed:4.0f} s] parity: {len(report)} comparisons, 0 misses", flush=True)
            if not budget.fits(kind):
                continue
        started = budget.elapsed
        if kind == "jax":
            outcome = _time_jax(unit, conditions, budget)
        else:
            try:
                outcome = timer.time(unit)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                outcome = contests.Outcome(failures={failure_name(unit, *who): reason for who in unit.contestants})
        record.add(outcome.rows, outcome.failures)
        budget.note(kind, budget.elapsed - started)
        left.remove(unit)
        print(f"[{budget.elapsed:4.0f} s] {unit}: {_line(outcome)}", flush=True)
        gc.collect()
        if options.kind == "cuda":
            torch.cuda.empty_cache()


def _time_jax(unit: Unit, conditions: contests.Conditions, budget: Budget) -> contests.Outcome:
    outcome = contests.Outcome()
    reason = jax_cases.why_not()
    if reason is None:
        try:
            outcome.rows.append(jax_cases.time_unit(unit, conditions, budget.left))
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        outcome.failures[failure_name(unit, "jax", False)] = reason
    return outcome


def _line(outcome: contests.Outcome) -> str:
    """Medians in milliseconds, those from CUDA graphs marked with a star."""

    def label(row: Row) -> str:
        yardstick = "resnet50 " if row["config"] == schedule.network_name(schedule.YARDSTICK) else ""
        return f"{yardstick}{row['provider']}{'*' if row['graph'] else ''} {row['median_ms']:.4g}"

    texts = [label(row) for row in outcome.rows]
    texts += [f"{name.split(', ')[-1]} FAILED ({reason})" for name, reason in outcome.failures.items()]
    return ", ".join(texts)


def _report(record: Record, left: list[Unit]) -> None:
    if left:
        print(f"\nNot measured yet ({len(left)} units); call again to go on:")
        print("\n".join(f"  {unit}" for unit in left))
    print(f"\nFigures: bf16, both sides in CUDA graphs, medians of one run.\n{figure_table(figures(record.rows))}")
    print(f"\nWritten: {record.path} ({len(record.rows)} rows)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
