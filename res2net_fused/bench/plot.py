"""Scale s against latency, from a result file: `python -m res2net_fused.bench.plot results.json plot.png`."""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import Any

from ..testing.cases import SIZES, WidthScale
from . import results
from .providers import label

_PANEL = (3.4, 2.9)  # inches
_LEGEND_ENTRY = (2.1, 0.22)
_LETTERS = 9  # of the title to an inch
_COLOURS = {  # in the order of the legend
    "eager": "#8c8c8c",
    "eager_channels_last": "#4c72b0",
    "compile": "#dd8452",
    "compile_freezing": "#937860",
    "compile_max_autotune": "#8172b3",
    "onnxruntime": "#8c6d31",
    "openvino": "#17617a",
    "tensorrt": "#76b900",
    "jax": "#2f4b4f",
    "ours_plain": "#8c3b3f",
    "ours": "#c44e52",
    "ours_compile": "#b5651d",
    "ours_graph": "#55a868",
    "triton": "#64b5cd",
    "cuda": "#da8bc3",
    "cpu": "#ccb974",
}


def plot(data: dict[str, Any], path: Path) -> None:
    """Draws the chains and blocks of a result file: a column for each stage that it has, a row for each workload, variant,
    batch and dtype. A panel has a line for each provider, or a bar where it has one scale only, since lines of one point show
    nothing. Dashed or hatched: replayed from a CUDA graph.

    Raises ImportError where matplotlib is missing, ValueError where the file holds neither chains nor blocks.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'res2net-fused[bench]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in data["rows"] if row["stage"] is not None]
    if not rows:
        raise ValueError("the result file holds no chain and no block to plot")
    groups = list(dict.fromkeys(map(_group, rows)))
    stages = sorted({row["stage"] for row in rows})
    order = list(_COLOURS)
    lines = sorted({_line(row) for row in rows}, key=lambda line: (order.index(line[0]), line[1]))
    scales = sorted({WidthScale.parse(row["config"]).scale for row in rows})
    width = max(2, len(stages)) * _PANEL[0]
    columns = min(len(lines), int(width / _LEGEND_ENTRY[0]))
    legend_height = 0.25 + _LEGEND_ENTRY[1] * math.ceil(len(lines) / columns)
    environment = data["environment"]
    title = f"Res2Net latency by scale: {environment['device']}, torch {environment['torch']}"
    title = textwrap.fill(title, int(width * _LETTERS))
    height = _PANEL[1] * len(groups) + legend_height + 0.3 * (2 + title.count("\n"))
    figure, axes = plt.subplots(len(groups), len(stages), figsize=(width, height), squeeze=False)
    handles: dict[str, Any] = {}
    for panels, group in zip(axes, groups, strict=True):
        workload, variant, batch, dtype = group
        of_group = [row for row in rows if _group(row) == group]
        first = True
        for axis, stage in zip(panels, stages, strict=True):
            here = [row for row in of_group if row["stage"] == stage]
            axis.set_visible(bool(here))
            if not here:
                continue
            of_lines = [of_line for line in lines if (of_line := [row for row in here if _line(row) == line])]
            here_scales = sorted({WidthScale.parse(row["config"]).scale for row in here})
            if len(here_scales) == 1:
                _draw_bars(axis, [of_line[0] for of_line in of_lines])
                axis.set_xticks([(len(of_lines) - 1) / 2], [str(here_scales[0])])
            else:
                for of_line in of_lines:
                    _draw_line(axis, of_line)
                axis.set_xticks(scales)
                axis.set_xlim(scales[0] - 0.5, scales[-1] + 0.5)
            handles.update((text, handle) for handle, text in zip(*axis.get_legend_handles_labels(), strict=True))
            size = SIZES[stage - 1]
            what = workload if variant == "normal" else f"{workload} ({variant})"
            axis.set_title(f"{what}, stage {stage} ({size}x{size})", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.set_axisbelow(True)
            axis.grid(alpha=0.3)
            axis.set_xlabel("scale s, width at equal FLOPs")
            if first:
                axis.set_ylabel(f"milliseconds\nbatch {batch}, {dtype}")
            first = False
    figure.suptitle(title, fontsize=11)
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, legend_height / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["workload"], row.get("variant", "normal"), row["batch"], row["dtype"]


def _line(row: dict[str, Any]) -> tuple[str, bool]:
    return row["provider"], bool(row.get("graph"))


def _draw_line(axis: Any, rows: list[dict[str, Any]]) -> None:
    """One line of medians with a band from the 20th to the 80th percentile."""
    rows = sorted(rows, key=lambda row: WidthScale.parse(row["config"]).scale)
    scales = [WidthScale.parse(row["config"]).scale for row in rows]
    colour, text = _COLOURS[rows[0]["provider"]], label(rows[0]).replace("_", " ")
    style = "--" if rows[0].get("graph") else "-"
    axis.plot(
        scales, [row["median_ms"] for row in rows], style, marker="o", markersize=4, color=colour, label=text, clip_on=False
    )
    low, high = ([row[name] for row in rows] for name in ("p20_ms", "p80_ms"))
    axis.fill_between(scales, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    """A bar of the median for each row, with a whisker from the 20th to the 80th percentile."""
    for place, row in enumerate(rows):
        median = row["median_ms"]
        whisker = [[max(0.0, median - row["p20_ms"])], [max(0.0, row["p80_ms"] - median)]]
        hatch = "//" if row.get("graph") else None
        axis.bar(
            place, median, yerr=whisker, color=_COLOURS[row["provider"]], hatch=hatch, label=label(row).replace("_", " "),
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m res2net_fused.bench.plot RESULTS.json PLOT.png")
    plot(results.read(Path(sys.argv[1])), Path(sys.argv[2]))
