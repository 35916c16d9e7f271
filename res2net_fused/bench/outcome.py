"""What a result file says, for people: the table of medians, ratios of networks, errors, and why something is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._tables import format_table
from ..backends.selection import FIRST_CHOICE
from .networks import network_ratios, ratio_table
from .providers import OURS, PROVIDERS, label
from .record_file import Row

_NETWORK_HEAD = ("network", "", "fused", "backend", "difference", "error of ours", "error of eager")


def print_outcome(data: Mapping[str, Any], unavailable: Mapping[str, str]) -> None:
    """unavailable: of providers that were not among the contenders, the reason."""
    environment, rows = data["environment"], data["rows"]
    busy = environment.get("settings", {}).get("busy", 0)
    beside = f", beside {busy} busy process{'es' if busy > 1 else ''}" if busy else ""
    print(
        f"\nMedian milliseconds of interleaved runs on {environment['device']}, {environment['threads']} threads{beside}, "
        f"torch {environment['torch']}, commit {environment['commit']}."
    )
    print("Chains are compared with BatchNorms folded on all sides; a peer's block or network runs as PyTorch runs it, or,")
    print("as compile_freezing and other runtimes, folded too. *: replayed from a CUDA graph, as ours_graph is.")
    print("train_*: forward and backward with BatchNorm in training mode, of a network a step of SGD.\n")
    print(outcome_table(rows) if rows else "Nothing was timed.")
    for line in remarks(environment, rows, unavailable):
        print(line)
    if any(row["provider"] in OURS and "error" in row for row in rows):
        print("\nLargest error of each kind as it was timed (relative to float64):")
        print(error_table(rows))
    ratios = network_ratios(rows)
    if ratios:
        print("\nNetworks, times of the others over each form of ours (above 1x, ours is faster):")
        print(ratio_table(ratios))
    tables: dict[str, Sequence[Sequence[str]]] = {}
    for run in environment.get("runs", []):
        tables |= run.get("networks", {})
    if tables:
        print("\nNetworks on two photographs: how many blocks run fused, largest absolute difference from the un-accelerated")
        print("network, and errors relative to float64:")
        print(format_table(_NETWORK_HEAD, [line for table in tables.values() for line in table], left=4))
    print()


def outcome_table(rows: Sequence[Row]) -> str:
    """One line for each workload, batch, config and stage: every provider's median, the best peer's over our best where both
    were timed, and the backend that ours ran on."""
    order = {name: i for i, name in enumerate(PROVIDERS)}
    found = {(order[row["provider"]], bool(row.get("graph"))): label(row) for row in rows}
    columns = [found[key] for key in sorted(found)]
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        stage = "all" if row["stage"] is None else row["stage"]
        cases.setdefault((row["workload"], row["config"], stage, row["batch"], row["dtype"]), []).append(row)
    backends = any(row.get("backend") for row in rows)
    lines = []
    for key, of_case in cases.items():
        times = {label(row): row["median_ms"] for row in of_case}
        ours = [row for row in of_case if row["provider"] in OURS]
        peers = [row for row in of_case if row["provider"] not in OURS]
        ratio, best = "-", "-"
        if ours and peers:
            fastest = min(peers, key=lambda row: row["median_ms"])
            ratio = f"{fastest['median_ms'] / min(row['median_ms'] for row in ours):.2f}x"
            best = label(fastest)
        ran = ", ".join(dict.fromkeys(row["backend"] for row in ours if row.get("backend"))) or "-"
        measured = [f"{times[name]:.3g}" if name in times else "-" for name in columns]
        lines.append([*map(str, key), *measured, ratio, best, *([ran] if backends else [])])
    head = ["workload", "config", "stage", "batch", "dtype", *columns, "speed-up", "over the best peer"]
    return format_table([*head, *(["backend"] if backends else [])], lines, left=2)


def remarks(environment: Mapping[str, Any], rows: Iterable[Row], unavailable: Mapping[str, str]) -> list[str]:
    """Each reason once: for a backend that is not the first choice, and for what was not timed."""
    lines = [f"not timed, {name}: {reason}" for name, reason in unavailable.items()]
    of_backends: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("reason") and row["reason"] != FIRST_CHOICE:
            where = row["config"] + ("" if row["stage"] is None else f" stage {row['stage']}")
            of_backends.setdefault((row["backend"], row["reason"]), []).append(f"{row['workload']} {where}")
    for (backend, reason), where in of_backends.items():
        lines.append(f"backend {backend} ({_some(list(dict.fromkeys(where)))}): {reason}")
    for word, reasons in (("not timed", environment.get("absent", {})), ("failed", environment.get("failures", {}))):
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"{word}, {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return lines


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def error_table(rows: Iterable[Row]) -> str:
    """The row nearest to its bound, for each workload, provider of ours, backend and dtype."""
    worst: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["provider"] in OURS and "error" in row:
            key = row["workload"], label(row), row.get("backend", "-"), row["dtype"]
            if key not in worst or _nearness(row) > _nearness(worst[key]):
                worst[key] = row
    lines = [
        (*key, f"{row['error']:.1e}", f"{row['allowed_error']:.1e}", row["config"], row["stage"] or "all")
        for key, row in worst.items()
    ]
    head = ("workload", "", "backend", "dtype", "error", "allowed", "config", "stage")
    return format_table(head, [tuple(map(str, line)) for line in lines], left=4)


def _nearness(row: Row) -> float:
    return row["error"] / row["allowed_error"]
