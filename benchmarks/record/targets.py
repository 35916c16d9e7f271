"""The targets that a record is judged by: ratios between rows of one run, each beside its bar."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from res2net_fused._tables import format_table
from res2net_fused.bench.timed_case import TARGET_CONFIGS, network_name
from res2net_fused.models.res2net import LAYERS_50
from res2net_fused.testing.cases import STAGES, WidthScale

DTYPE = "bfloat16"
COMPILED = ("compile", "compile_freezing", "compile_max_autotune")
OURS = "ours_graph"
TRAINERS = ("ours", "triton")
_NO_SLOWER = WidthScale(48, 2)


@dataclass(frozen=True)
class Target:
    """value: a ratio of at least `bar` passes; None where it was not measured, and `note` says what is missing."""

    name: str
    value: float | None
    bar: float
    note: str = ""

    @property
    def outcome(self) -> str:
        return "unmeasured" if self.value is None else "pass" if self.value >= self.bar else "FAIL"


class _Times:
    """Medians of the CUDA-graph rows by case, with the run they come from."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {
            (r["workload"], r["config"], r["stage"], r["variant"], r["batch"], r["provider"]): r
            for r in rows
            if r["dtype"] == DTYPE and r["graph"]
        }

    def ratio(self, case: tuple[object, ...], peers: Iterable[str]) -> tuple[float, float] | None:
        """(fastest peer's median, ours) in one run, or None."""
        ours = self._rows.get((*case, OURS))
        if ours is None:
            return None
        found = [self._rows[key] for peer in peers if (key := (*case, peer)) in self._rows]
        found = [row for row in found if row["run"] == ours["run"]]
        return (min(row["median_ms"] for row in found), ours["median_ms"]) if found else None

    def batches(self, workload: str) -> list[int]:
        return sorted({key[4] for key in self._rows if key[0] == workload})

    def network(self, config: WidthScale, batch: int) -> dict[str, Any] | None:
        return self._rows.get(("network", network_name(config), None, "normal", batch, OURS))


def targets(rows: Iterable[dict[str, Any]]) -> list[Target]:
    """The targets by the rows of a record, bf16; both sides in CUDA graphs, but for training."""
    rows = list(rows)
    times = _Times(rows)
    found = []
    for config in TARGET_CONFIGS:
        for stage in STAGES:
            for peer, bar in (("eager_channels_last", 5.0), ("compile_max_autotune", 2.0)):
                pair = times.ratio(("chain", str(config), stage, "normal", 32), [peer])
                name = f"chain {config} stage {stage}, batch 32, over {peer}"
                found.append(Target(name, pair and pair[0] / pair[1], bar))
    found += [_blocks_of_a_network(times, batch) for batch in (32, 256)]
    found += [_never_slower(times, workload) for workload in ("chain", "block")]
    for config in TARGET_CONFIGS:
        for batch in times.batches("network") or [32]:
            row = times.network(config, batch)
            value = None if row is None or not row.get("yardstick_ms") else row["yardstick_ms"] / row["median_ms"]
            found.append(Target(f"{network_name(config)}, batch {batch}, over compiled ResNet-50", value, 1.0))
    return found + _training_targets(rows)


def _training_targets(rows: Iterable[dict[str, Any]]) -> list[Target]:
    """Steps of SGD of the networks: eager's and torch.compile's time over the fastest of ours, and eager's peak memory."""
    steps: dict[tuple[object, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["workload"] == "train_step" and row["dtype"] == DTYPE:
            steps.setdefault((row["config"], row["batch"], row.get("run")), {})[row["provider"]] = row
    found = []
    for config, batch in itertools.product(TARGET_CONFIGS, (128, 256)):
        of_case = [by for (name, size, _), by in steps.items() if (name, size) == (network_name(config), batch)]
        by_provider = of_case[-1] if of_case else {}  # of one run
        ours = min((by_provider[name] for name in TRAINERS if name in by_provider), key=lambda r: r["median_ms"], default=None)
        for peer, field, bar in (
            ("eager_channels_last", "median_ms", 1.8), ("compile", "median_ms", 1.3), ("eager_channels_last", "peak_mb", 1.25),
        ):  # fmt: skip
            other = by_provider.get(peer)
            value = None if ours is None or other is None or not ours[field] else other[field] / ours[field]
            what = "step" if field == "median_ms" else "peak memory"
            found.append(Target(f"{network_name(config)} training {what}, batch {batch}, over {peer}", value, bar))
    return found


def _blocks_of_a_network(times: _Times, batch: int) -> Target:
    """All 16 blocks of Res2Net-50 26w4s, each stage's first block and its normal ones; the fastest torch.compile of each."""
    peer_ms = ours_ms = 0.0
    missing = []
    for stage, depth in zip(STAGES, LAYERS_50, strict=True):
        for variant, count in (("stage", 1), ("normal", depth - 1)):
            pair = times.ratio(("block", str(TARGET_CONFIGS[0]), stage, variant, batch), COMPILED)
            if pair is None:
                missing.append(f"{variant} block of stage {stage}")
                continue
            peer_ms, ours_ms = peer_ms + count * pair[0], ours_ms + count * pair[1]
    name = f"blocks of Res2Net-50 {TARGET_CONFIGS[0]} summed, batch {batch}, over torch.compile"
    if missing:
        return Target(name, None, 1.5, f"missing: {len(missing)} of {2 * len(STAGES)}, such as {missing[0]}")
    return Target(name, peer_ms / ours_ms, 1.5)


def _never_slower(times: _Times, workload: str) -> Target:
    """The worst ratio of all stages and measured batches."""
    pairs = {}
    for batch in times.batches(workload):
        for stage in STAGES:
            pair = times.ratio((workload, str(_NO_SLOWER), stage, "normal", batch), COMPILED)
            if pair is not None:
                pairs[f"stage {stage}, batch {batch}"] = pair[0] / pair[1]
    worst = min(pairs, key=pairs.__getitem__, default=None)
    note = "" if worst is None else f"worst of {len(pairs)}: {worst}"
    return Target(f"{workload} {_NO_SLOWER} over torch.compile", None if worst is None else pairs[worst], 1.0, note)


def target_table(found: Iterable[Target]) -> str:
    lines = [(f.name, "-" if f.value is None else f"{f.value:.2f}x", f"{f.bar:g}x", f.outcome, f.note) for f in found]
    return format_table(("target", "measured", "bar", "outcome", "remark"), lines, left=5)
