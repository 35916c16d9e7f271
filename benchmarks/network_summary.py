"""Whole networks from the committed files: the README's table, the full one of docs/results.md, and the picture of both.

Two kinds of run are committed. A record (`*.json`) times `accelerate` alone beside PyTorch eager and, where they are installed,
the runtimes. `networks.txt`, the output of `cpu.py networks`, times every form of ours beside every mode of PyTorch. A ratio is
always taken within one run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from res2net_fused.bench import networks
from res2net_fused.bench.floor import FLOORS
from res2net_fused.bench.networks import NetworkRatios

README_MODEL = "res2net50_26w4s"
FORMS = {
    "ours_plain": "`accelerate`, images and model in NCHW",
    "ours": "`accelerate`, channels-last",
    "ours_compile": "`accelerate`, `freeze`, `torch.compile`",
    "ours_graph": "`accelerate`, `freeze`, CUDA graph",
}
_COLUMNS = {"over PyTorch": "pytorch", "over ResNet-50": "resnet50"} | {f"over {name}": name for name in networks.RUNTIMES}
_FLOOR_COLUMNS = {f"ms / {text}": name for name, text in FLOORS.items()}
_NAMES = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT"}
_COLOURS = {"pytorch": "#8c8c8c", "onnxruntime": "#b79f5b", "openvino": "#4c8ea3", "ours": "#c44e52"}


@dataclass(frozen=True)
class NetworkRun:
    """What one committed file says of whole networks."""

    path: Path
    device: str
    threads: int
    ratios: list[NetworkRatios]


def from_record(path: Path, data: dict[str, Any]) -> NetworkRun:
    """The networks of a record; of rows of several runs, each run's own ratios."""
    runs = dict.fromkeys(row.get("run") for row in data["rows"])
    ratios = [found for run in runs for found in networks.network_ratios(row for row in data["rows"] if row.get("run") == run)]
    return NetworkRun(path, data["environment"]["device"], data["environment"]["threads"], ratios)


def from_text(path: Path) -> NetworkRun:
    """The output of `cpu.py networks`. Raises ValueError naming the file where a line is not as that program prints it."""
    text = path.read_text()
    machine = re.search(r"^(.+), (\d+) threads?, torch ", text, re.M)
    head = re.search(r"^network +batch +ours +ms .*$", text, re.M)
    if not machine or not head:
        raise ValueError(f"{path} is no output of `cpu.py networks`: it needs the lines of the machine and of the table's head")
    columns = re.split(r"  +", head[0].strip())[4:]
    ratios = []
    for line in text[head.end() :].splitlines():
        if not line.strip() or set(line) <= {"-", " "}:
            continue
        model, batch, provider, ms, *cells = re.split(r"  +", line.strip())
        others, floors = {}, {}
        for column, cell in zip(columns, cells, strict=True):
            found = re.fullmatch(r"[\d.]+x \(([\d.e+]+) ms(?: (\S+))?\)", cell)
            if not found and cell != "not timed" or column not in {**_COLUMNS, **_FLOOR_COLUMNS}:
                raise ValueError(f"{path}: {column!r} of {model} is {cell!r}, and a ratio with its milliseconds is expected")
            if found and column in _FLOOR_COLUMNS:
                floors[_FLOOR_COLUMNS[column]] = float(found[1])
            elif found:
                others[_COLUMNS[column]] = (float(found[1]), found[2] or _COLUMNS[column])
        ratios.append(NetworkRatios(model, int(batch), provider, float(ms), others, floors))
    return NetworkRun(path, machine[1], int(machine[2]), ratios)


def find_runs(root: Path, records: Sequence[tuple[Path, dict[str, Any]]]) -> list[NetworkRun]:
    """Every committed run that timed whole networks: records first, then texts, by path."""
    texts = [from_text(path) for path in sorted((root / "benchmarks" / "results").glob("*/networks.txt"))]
    return [run for run in (*(from_record(*record) for record in records), *texts) if run.ratios]


def short(device: str) -> str:
    """The device's name without its marks, such as "Intel Xeon, AVX-512" for "Intel(R) Xeon(R) Processor (AVX512)"."""
    name = re.sub(r" *\(R\)| Processor", "", device)
    return re.sub(r" *\(AVX(2|-?512)\)", lambda match: ", AVX2" if match[1] == "2" else ", AVX-512", name)


def milliseconds(value: float) -> str:
    """Three digits, such as 43.0 and 433."""
    return f"{value:#.3g}".rstrip(".")


def table_lines(runs: Sequence[NetworkRun], model: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and cells: by network, device and batch one line for each form of ours; of one `model`, its name left out.

    Of a form that several runs of a device timed, the line is that of the last one: of `networks.txt`, which has every peer.
    """
    peers = [name for name in networks.RUNTIMES if any(name in found.others for run in runs for found in run.ratios)]
    head = ["network"] * (model is None) + ["processor", "batch", "ours, called as", "ours", "over PyTorch"]
    head += [*(f"over {_NAMES[name]}" for name in peers), "over ResNet-50"]
    shown = FLOORS if model is None else {}  # the README has no room for them
    floors = [name for name in shown if any(name in found.floors for run in runs for found in run.ratios)]
    head += [f"ours / {FLOORS[name]}" for name in floors]
    order = [name for run in runs for name in dict.fromkeys(found.model for found in run.ratios)]
    devices = list(dict.fromkeys(run.device for run in runs))
    latest = {
        (run.device, found.model, found.batch, found.provider): (run, found)
        for run in runs for found in run.ratios if model in (None, found.model)
    }  # fmt: skip
    entries = sorted(
        latest.values(),
        key=lambda entry: (order.index(entry[1].model), devices.index(entry[0].device), entry[1].batch,
                           list(FORMS).index(entry[1].provider.rstrip("*"))),
    )  # fmt: skip
    lines = []
    for run, found in entries:
        ratios = [found.ratio(name) for name in ("pytorch", *peers, "resnet50")] + [found.over_floor(name) for name in floors]
        cells = [short(run.device), str(found.batch), FORMS[found.provider.rstrip("*")], f"{milliseconds(found.ms)} ms"]
        cells += ["not timed" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        lines.append([found.model] * (model is None) + cells)
    return head, lines


def draw(runs: Sequence[NetworkRun], path: Path) -> None:
    """A panel for each device and batch of the runs that timed our fastest form: bars by the scale s, ResNet-50 as s = 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = bars(runs)
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 3.1 * rows + 0.5), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, resnet, groups) in zip(axes.flat, panels, strict=False):
        axis.axhline(resnet, color="#444444", linestyle="--", linewidth=1, label="ResNet-50 in PyTorch")
        _bar(axis, 0, resnet, "pytorch")
        ticks, place = [0.0], 2
        for _, times in groups:
            ticks.append(place + (len(times) - 1) / 2)
            for name, ms in times.items():
                _bar(axis, place, ms, name)
                place += 1
            place += 1
        axis.set_xticks(ticks, ["1\nResNet-50", *(f"{scale}\n{config}" for (scale, config), _ in groups)])
        axis.set_xlabel("scale s")
        axis.set_ylabel("milliseconds a call")
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.12)
    handles = {text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.suptitle("Latency of Res2Net-50 against its scale s, fp32, 224x224 pixels: lower is better", fontsize=11)
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(w_pad=2, rect=(0, 0.5 / (3.1 * rows + 0.5), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(axis: Any, place: int, ms: float, name: str) -> None:
    """A bar with its milliseconds on top, readable also where the line of ResNet-50 crosses them."""
    label = {"ours": "res2net_fused, frozen and compiled", "pytorch": "PyTorch, fastest mode"}.get(name) or _NAMES[name]
    axis.bar(place, ms, color=_COLOURS[name], label=label)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axis.annotate(
        milliseconds(ms), (place, ms), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8, bbox=ground
    )


Groups = list[tuple[tuple[int, str], dict[str, float]]]


def bars(runs: Sequence[NetworkRun]) -> list[tuple[str, float, Groups]]:
    """What `draw` shows: title, ResNet-50's time, then ((scale, config), time by contender) for each network, by scale.

    Only outputs of `cpu.py networks` that time `ours_compile` and ResNet-50; ValueError where there is none.
    """
    panels = []
    for run in (run for run in runs if run.path.suffix == ".txt"):
        compiled = [found for found in run.ratios if found.provider == "ours_compile" and "resnet50" in found.others]
        for batch in dict.fromkeys(found.batch for found in compiled):
            groups: Groups = []
            for found in (found for found in compiled if found.batch == batch):
                config = found.model.rpartition("_")[2]
                times = {name: found.others[name][0] for name in _COLOURS if name in found.others}
                groups.append(((int(re.sub(r".*w|s$", "", config)), config), times | {"ours": found.ms}))
            resnet = next(found.others["resnet50"][0] for found in compiled if found.batch == batch)
            panels.append((f"{short(run.device)}, {run.threads} cores, batch {batch}", resnet, sorted(groups)))
    if not panels:
        raise ValueError("no committed networks.txt times ours_compile beside ResNet-50")
    return panels
