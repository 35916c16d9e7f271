"""Scale s against latency, from a result file: `python -m res2net_fused.bench.plot results.json plot.png`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import results
from .workloads import SIZES, STAGES, Config

_COLOURS = {  # in the order of the legend
    "eager": "#8c8c8c",
    "eager_channels_last": "#4c72b0",
    "compile": "#dd8452",
    "compile_freezing": "#937860",
    "compile_max_autotune": "#8172b3",
    "onnxruntime": "#8c6d31",
    "openvino": "#17617a",
    "jax": "#2f4b4f",
    "ours": "#c44e52",
    "ours_graph": "#55a868",
    "triton": "#64b5cd",
    "cuda": "#da8bc3",
    "cpu": "#ccb974",
}


def plot(data: dict[str, Any], path: Path) -> None:
    """Draws the chains and blocks of a result file: one column per stage, one row per workload, batch and dtype.

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
    groups = list(dict.fromkeys((row["workload"], row["batch"], row["dtype"]) for row in rows))
    providers = sorted({row["provider"] for row in rows}, key=list(_COLOURS).index)
    figure, axes = plt.subplots(
        len(groups), len(STAGES), figsize=(3.4 * len(STAGES), 2.9 * len(groups) + 1.2), squeeze=False, sharex=True
    )
    for line, (workload, batch, dtype) in zip(axes, groups, strict=True):
        for axis, stage in zip(line, STAGES, strict=True):
            here = [r for r in rows if (r["workload"], r["batch"], r["dtype"], r["stage"]) == (workload, batch, dtype, stage)]
            for provider in providers:
                _draw(axis, provider, [row for row in here if row["provider"] == provider])
            size = SIZES[stage - 1]
            axis.set_title(f"{workload}, stage {stage} ({size}x{size})", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set_xticks(sorted({Config.parse(row["config"]).scale for row in rows}))
        line[0].set_ylabel(f"milliseconds\nbatch {batch}, {dtype}")
    for axis in axes[-1]:
        axis.set_xlabel("scale s, width at equal FLOPs")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles.update((label, handle) for handle, label in zip(*axis.get_legend_handles_labels(), strict=True))
    environment = data["environment"]
    figure.suptitle(f"Res2Net latency by scale: {environment['device']}, torch {environment['torch']}", fontsize=11)
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=len(handles), frameon=False)
    legend_height = 0.45 / figure.get_figheight()
    figure.tight_layout(rect=(0, legend_height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Any, provider: str, rows: list[dict[str, Any]]) -> None:
    """One line of medians with a band from the 20th to the 80th percentile."""
    rows = sorted(rows, key=lambda row: Config.parse(row["config"]).scale)
    if not rows:
        return
    scales = [Config.parse(row["config"]).scale for row in rows]
    colour = _COLOURS[provider]
    label = provider.replace("_", " ")
    axis.plot(scales, [row["median_ms"] for row in rows], marker="o", markersize=4, color=colour, label=label)
    low, high = ([row[name] for row in rows] for name in ("p20_ms", "p80_ms"))
    axis.fill_between(scales, low, high, color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m res2net_fused.bench.plot RESULTS.json PLOT.png")
    plot(results.read(Path(sys.argv[1])), Path(sys.argv[2]))
