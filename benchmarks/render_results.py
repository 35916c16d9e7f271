"""Writes the results that the pages show from the committed files, between the pages' markers, and draws the plots.

docs/results.md gets the table of whole networks and a section for each record, README.md the rows of one network;
benchmarks/results/networks.png and a plot beside each record are drawn.

    python benchmarks/render_results.py           # after adding or changing a file of benchmarks/results/<device>/
    python benchmarks/render_results.py --check   # exit status 1 where a page says something else than those files
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import network_summary  # noqa: E402

from res2net_fused.bench import results  # noqa: E402
from res2net_fused.bench.providers import PYTORCH  # noqa: E402
from res2net_fused.testing.cases import STAGES, WidthScale  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OURS = ("ours_plain", "ours", "ours_compile", "ours_graph", "triton", "cuda", "cpu")
_TITLES = {
    "chain": "Chains, BatchNorms folded on all sides",
    "block": "Normal blocks",
    "network": "Whole networks as one record times them",
    "train_chain": "Chains in training, forward and backward",
    "train_block": "Normal blocks in training, forward and backward",
    "train_step": "Training steps (forward, backward, SGD)",
}
_NOTHING = "No run is committed yet: `make bench` prints a table for your machine, `make record` measures a GPU."
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would change")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the checkout (default: this one)")
    options = parser.parse_args(arguments)
    root = options.root
    try:
        records = find_records(root)
        runs = network_summary.find_runs(root, records)
        pages = {root / "docs" / "results.md": render(runs, records, root), root / "README.md": summary(runs)}
        before = {page: page.read_text() for page in pages}
        after = {page: replace_block(page, before[page], text) for page, text in pages.items()}
    except ValueError as error:
        print(f"render_results: {error}", file=sys.stderr)
        return 2
    plots = {path.with_suffix(".png"): {"environment": data["environment"], "rows": plotted_rows(data["rows"])}
             for path, data in records if plotted_rows(data["rows"])}  # fmt: skip
    picture = root / "benchmarks" / "results" / "networks.png"
    drawn = [run for run in runs if run.path.name == "networks.txt"]
    if options.check:
        missing = [path for path in (*plots, *([picture] if drawn else [])) if not path.is_file()]
        stale = [page for page in pages if before[page] != after[page]]
        for path in missing:
            print(f"there is no plot {path}")
        for page in stale:
            print(f"{page} does not show the committed files: run python benchmarks/render_results.py")
        return int(bool(stale or missing))
    for path, data in plots.items():
        from res2net_fused.bench.plot import plot

        plot(data, path)
    if drawn:
        network_summary.draw(drawn, picture)
    for page, text in after.items():
        page.write_text(text)
        print(f"{page}: {len(records)} records")
    return 0


def find_records(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every committed record, by path; ValueError naming the file where one is none."""
    return [(path, results.read(path)) for path in sorted((root / "benchmarks" / "results").glob("*/*.json"))]


def replace_block(page: Path, content: str, text: str) -> str:
    """The page's content with `text` between its markers."""
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"{page.name} needs the lines {BEGIN} and {END}, once each and in this order")
    head, rest = content.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def summary(runs: Sequence[network_summary.NetworkRun]) -> str:
    """Markdown for the README: the network that users ask about first."""
    return markdown_table(*network_summary.table_lines(runs, network_summary.README_MODEL)) if runs else _NOTHING


def render(runs: Sequence[network_summary.NetworkRun], records: Sequence[tuple[Path, dict[str, Any]]], root: Path) -> str:
    """Markdown for docs/results.md: all networks, then a section for each record."""
    if not records:
        return _NOTHING
    parts = ["## Whole networks", markdown_table(*network_summary.table_lines(runs))] if runs else []
    folder = root / "docs"
    return "\n\n".join(
        [*parts, "## By record", *(_section(Path(os.path.relpath(path, folder)), data) for path, data in records)]
    )


def _section(path: Path, data: dict[str, Any]) -> str:
    environment, rows = data["environment"], preferred(data["rows"])
    versions = [f"torch {environment['torch']}"]
    versions += [f"{name} {environment[name.lower()]}" for name in ("Triton", "CUDA") if environment[name.lower()]]
    if not environment["cuda"]:
        versions.append(f"{environment['threads']} threads")
    parts = [
        f"### {environment['device']}, {path.stem}",
        f"{', '.join(versions)}, commit `{environment['commit']}`, [record]({path.as_posix()}): `{environment['command']}`. "
        "Medians in milliseconds, interleaved in one run; dtype and batch are in the tables. "
        + ("A star marks times of CUDA-graph replays. " if any(row.get("graph") for row in rows) else "")
        + "The speed-up is the fastest peer's time over the fastest of ours: below 1, ours is slower.",
    ]
    for workload, title in _TITLES.items():
        chosen = [row for row in rows if row["workload"] == workload]
        if not chosen:
            continue
        staged = chosen[0]["stage"] is not None
        note = ", the sum of stages 1 to 4, and the speed-up at each" if staged else ""
        parts.append(f"**{title}**{note}:\n\n" + (_stage_table(chosen) if staged else _network_table(chosen)))
    if plotted_rows(data["rows"]):
        parts.append(f"![Latency by scale on {environment['device']}]({path.with_suffix('.png').as_posix()})")
    return "\n\n".join(parts)


def preferred(rows: Sequence[Row]) -> list[Row]:
    """Normal blocks only, and of a provider that was timed both ways the replays."""
    chosen: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("workload", "config", "stage", "batch", "dtype", "provider"))
        if row.get("variant", "normal") == "normal" and (key not in chosen or row.get("graph")):
            chosen[key] = row
    return list(chosen.values())


def plotted_rows(rows: Sequence[Row]) -> list[Row]:
    """Chains and blocks at equal FLOPs, of the batch and dtype that most of them have."""
    rows = [row for row in preferred(rows) if row["stage"] is not None]
    configs = {row["config"]: WidthScale.parse(row["config"]) for row in rows}
    rows = [row for row in rows if WidthScale.from_scale(configs[row["config"]].scale) == configs[row["config"]]]
    if not rows:
        return []
    (batch, dtype), _ = Counter((row["batch"], row["dtype"]) for row in rows).most_common(1)[0]
    return [row for row in rows if (row["batch"], row["dtype"]) == (batch, dtype)]


def _providers(rows: Sequence[Row]) -> list[str]:
    return [name for name in results.PROVIDERS if any(row["provider"] == name for row in rows)]


def _label(provider: str, rows: Sequence[Row]) -> str:
    graphed = all(row.get("graph") for row in rows if row["provider"] == provider)
    return f"`{provider}`" + (r"\*" if graphed and provider != "ours_graph" else "")


def _ratio(times: dict[str, float]) -> float | None:
    """The fastest peer over the fastest of ours."""
    peers = [ms for name, ms in times.items() if name not in OURS]
    ours = [ms for name, ms in times.items() if name in OURS]
    return min(peers) / min(ours) if peers and ours else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _stage_table(rows: Sequence[Row]) -> str:
    """One line for each config, batch and dtype."""
    providers = _providers(rows)
    lines = []
    for config, batch, dtype in dict.fromkeys((row["config"], row["batch"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["config"], row["batch"], row["dtype"]) == (config, batch, dtype)]
        sums = []
        for name in providers:
            times = [row["median_ms"] for row in here if row["provider"] == name]
            sums.append(sum(times) if len(times) == len(STAGES) else None)
        ratios = [_ratio({row["provider"]: row["median_ms"] for row in here if row["stage"] == stage}) for stage in STAGES]
        shares = [max((row.get("roofline_share") or 0 for row in here if row["provider"] in OURS and row["stage"] == stage),
                      default=0) for stage in STAGES]  # fmt: skip
        share = " ".join(f"{100 * share:.0f}" for share in shares) if any(shares) else "-"
        speed = " ".join(_text(ratio, ".2f") for ratio in ratios)
        lines.append([config, str(batch), dtype, *(_text(ms, ".3g") for ms in sums), speed, share])
    head = ["config", "batch", "dtype", *(_label(name, rows) for name in providers), "speed-up S1 S2 S3 S4", "roofline %"]
    if all(line[-1] == "-" for line in lines):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return markdown_table(head, lines)


def _network_table(rows: Sequence[Row]) -> str:
    """One line for each network, batch and dtype; ResNet-50's time in PyTorch's fastest mode over ours, where it was timed.

    A row may carry that time; else it is that of the rows of ResNet-50.
    """
    providers = _providers(rows)
    peers = [row for row in rows if row["config"] == "resnet50" and row["provider"] in PYTORCH]
    lines = []
    for config, batch, dtype in dict.fromkeys((row["config"], row["batch"], row["dtype"]) for row in rows):
        here = {row["provider"]: row for row in rows if (row["config"], row["batch"], row["dtype"]) == (config, batch, dtype)}
        ratio = _ratio({name: row["median_ms"] for name, row in here.items()})
        best = min((row for name, row in here.items() if name in OURS), key=lambda row: row["median_ms"], default={})
        beside = min((row["median_ms"] for row in peers if (row["batch"], row["dtype"]) == (batch, dtype)), default=None)
        resnet = best.get("yardstick_ms") or beside
        baseline = resnet / best["median_ms"] if best and resnet else None
        times = [_text(here[name]["median_ms"] if name in here else None, ".3g") for name in providers]
        lines.append([config, str(batch), dtype, *times, _text(ratio, ".2f"), _text(baseline, ".2f")])
    head = ["network", "batch", "dtype", *(_label(name, rows) for name in providers), "speed-up", "over ResNet-50"]
    return markdown_table(head, lines)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(3, *(len(line[i]) for line in (head, *lines))) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *(line(cells) for cells in lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
