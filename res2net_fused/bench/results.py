"""Result files: {"environment": {...}, "rows": [...]} in JSON, validated when written and when read."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .._native import library
from .._native.machine import device_name

WORKLOADS = ("chain", "block", "network", "train_chain", "train_block", "train_step")
PROVIDERS = (
    "eager", "eager_channels_last", "compile", "compile_freezing", "compile_max_autotune",
    "tensorrt", "onnxruntime", "openvino", "jax",
    "ours_plain", "ours", "ours_compile", "ours_graph", "triton", "cuda", "cpu",  # the last three: ours on that backend
)  # fmt: skip
ENVIRONMENT_FIELDS = ("device", "torch", "triton", "cuda", "commit", "command")
_NUMBER = (int, float)
ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "workload": (str,),
    "config": (str,),
    "stage": (int, type(None)),  # None for a whole network
    "batch": (int,),
    "dtype": (str,),
    "device": (str,),
    "provider": (str,),
    "median_ms": _NUMBER,
    "p20_ms": _NUMBER,
    "p80_ms": _NUMBER,
    "peak_mb": _NUMBER,
}


def environment(device: str, command: str) -> dict[str, Any]:
    """What the numbers of a run depend on. command: what the user typed."""
    try:
        import triton

        triton_version = triton.__version__
    except Exception:  # missing, or broken in whatever way
        triton_version = None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": source_commit(),
        "command": command,
    }


def source_commit() -> str:
    """The commit of the checkout that runs, or of the installed package's build."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    commit = ""
    if git("rev-parse", "--show-toplevel") == str(root):  # an installed package may lie inside another repository
        commit = git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return commit or library.build_information().get("commit") or "unknown"


def write(path: Path, environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes a result file, whole or not at all; ValueError where `read` would not take it."""
    data = {"environment": environment, "rows": rows}
    validate(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(unfinished, path)


def read(path: Path) -> dict[str, Any]:
    """Reads a result file; ValueError, naming the file and the field, where it is none."""
    try:
        data = json.loads(Path(path).read_text())
        validate(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no result file: {error}") from None
    return data


def validate(data: object) -> None:
    """ValueError naming the field that is missing, of a wrong type or no finite number."""
    if not isinstance(data, dict) or not isinstance(data.get("environment"), dict) or not isinstance(data.get("rows"), list):
        raise ValueError("an object with 'environment' (an object) and 'rows' (a list) is needed")
    for field in ENVIRONMENT_FIELDS:
        if field not in data["environment"]:
            raise ValueError(f"environment has no {field!r}")
    # Of records that grow over several calls.
    for field, kind in (("failures", dict), ("absent", dict), ("cut_off", dict), ("runs", list)):
        if not isinstance(data["environment"].get(field, kind()), kind):
            raise ValueError(f"environment has {field} of type {type(data['environment'][field]).__name__}")
    if not all(isinstance(run, dict) and isinstance(run.get("command"), str) for run in data["environment"].get("runs", [])):
        raise ValueError("environment has runs without a command")
    for i, row in enumerate(data["rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"rows[{i}] is a {type(row).__name__}, not an object")
        for field, types in ROW_FIELDS.items():
            if field not in row:
                raise ValueError(f"rows[{i}] has no {field!r}")
            if not isinstance(row[field], types) or isinstance(row[field], bool):
                raise ValueError(f"rows[{i}] has {field}={row[field]!r} of type {type(row[field]).__name__}")
            if types is _NUMBER and not (math.isfinite(row[field]) and row[field] >= 0):
                raise ValueError(f"rows[{i}] has {field}={row[field]!r}; a finite number of at least 0 is needed")
        for field, allowed in (("workload", WORKLOADS), ("provider", PROVIDERS)):
            if row[field] not in allowed:
                raise ValueError(f"rows[{i}] has {field}={row[field]!r}; allowed are {', '.join(map(repr, allowed))}")
