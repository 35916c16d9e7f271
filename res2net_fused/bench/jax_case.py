"""JAX as a peer: a unit written out for benchmarks/jax_peer.py, which runs apart from this process and its GPU memory."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..modules.block_parts import parts_of
from ..modules.folding import fold, projection_of
from ..modules.reference_blocks import ReferenceBottle2neck
from ..testing.cases import TORCH_DTYPES, Case, ReferenceChain
from ..testing.parity import relative_error
from ..testing.tolerances import forward_bound, network_bound
from .candidates import Conditions, build_network
from .record_file import Row
from .roofline import least_work, least_work_of_network, rotation_count
from .runner import make_row
from .schedule import Unit
from .timing import Timing

PEER = Path(__file__).resolve().parents[2] / "benchmarks" / "jax_peer.py"
_CHECKED = 2  # images


def why_not() -> str | None:
    """Why JAX cannot be timed here, or None."""
    if not PEER.is_file():
        return f"{PEER} is not there: run from a checkout"
    return None if importlib.util.find_spec("jax") else "jax is not installed"


def time_unit(unit: Unit, conditions: Conditions, seconds: float) -> Row:
    """One row; RuntimeError where the process fails, takes longer than `seconds`, or is less exact than is allowed."""
    import numpy as np

    module, shape, parts = _module(unit, conditions)
    dtype = TORCH_DTYPES[unit.dtype]
    x = torch.randn(_CHECKED, *shape[1:], generator=torch.Generator().manual_seed(0)).relu_().to(conditions.device, dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(module).double()(x.double())
        eager_error = relative_error(module(x), expected)
    bound = network_bound(eager_error) if unit.stage is None else forward_bound(unit.dtype, eager_error)
    program, arrays = _export(unit.workload, module)
    arrays |= {"x": x.float(), "expected": expected}
    count = max(2, rotation_count(sum(part.activations for part in parts), conditions.l2))
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        np.savez(Path(folder, "arrays.npz"), **values)
        spec = {
            "program": program, "arrays": str(Path(folder, "arrays.npz")), "shape": shape, "dtype": unit.dtype,
            "count": count, "repeats": conditions.repeats, "gpu": torch.device(conditions.device).type == "cuda",
        }  # fmt: skip
        Path(folder, "spec.json").write_text(json.dumps(spec))
        found = _run(Path(folder, "spec.json"), seconds, torch.device(conditions.device))
    if not found["error"] <= bound:
        raise RuntimeError(f"JAX's relative error is {found['error']:.2g}; at most {bound:.2g} is allowed")
    timing = Timing(found["median_ms"], found["p20_ms"], found["p80_ms"], found["repeats"], found["peak_mb"])
    row = make_row(unit, ("jax", False), timing, conditions, conditions.floor_ms(parts, unit.dtype))
    return row | {"calls": found["calls"], "jax": found["jax"]}


def _run(spec: Path, seconds: float, device: torch.device) -> dict[str, Any]:
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if device.type == "cuda":  # JAX takes the first that it sees
        index = torch.cuda.current_device() if device.index is None else device.index
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
    try:
        done = subprocess.run([sys.executable, str(PEER), str(spec)], env=environment, capture_output=True, text=True,
                              timeout=seconds)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"JAX took longer than the {seconds:.0f} s that were left") from None
    if done.returncode:
        raise RuntimeError(f"JAX failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _module(unit: Unit, conditions: Conditions) -> tuple[nn.Module, tuple[int, ...], list]:
    """The reference, the shape of x (N, C, H, W), and its least work."""
    if unit.stage is None:
        network = build_network(unit.config, unit.dtype, conditions)
        shape = (unit.batch, 3, conditions.image_size, conditions.image_size)
        return network, shape, least_work_of_network(network, shape, unit.dtype)
    case = Case(unit.workload, unit.config, unit.stage, unit.batch, unit.dtype, conditions.device, unit.variant)
    shape = (unit.batch, case.channels, case.input_size, case.input_size)
    module = case.module()
    return module, shape, [least_work(module, shape, unit.dtype)]


def _export(kind: str, module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What runs, and its weights with the BatchNorms folded, in fp32."""
    arrays: dict[str, Tensor] = {}

    def add(name: str, weight: Tensor, bias: Tensor) -> None:
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = weight.detach().float(), bias.detach().float()

    if isinstance(module, ReferenceChain):
        for k, (weight, bias) in enumerate(zip(module.weights, module.biases, strict=True)):
            add(f"0.convs.{k}", weight, bias)
        return {"kind": kind, "blocks": [_description(module.config, len(module.weights))]}, arrays
    blocks = [block for block in module.modules() if isinstance(block, ReferenceBottle2neck)]
    for i, block in enumerate(blocks):
        parts = parts_of(block)
        add(f"{i}.conv1", *fold(parts.conv1, parts.bn1, torch.float32))
        for k, (conv, bn) in enumerate(zip(parts.convs, parts.bns, strict=True)):
            add(f"{i}.convs.{k}", *fold(conv, bn, torch.float32))
        add(f"{i}.conv3", *fold(parts.conv3, parts.bn3, torch.float32))
        projection = projection_of(parts)
        if projection is not None:
            add(f"{i}.downsample", *fold(*projection[1:], torch.float32))
    if kind == "network":
        stem = cast(nn.Conv2d, module.get_submodule("conv1")), cast(nn.BatchNorm2d, module.get_submodule("bn1"))
        add("stem", *fold(*stem, torch.float32))
        add("head", module.get_parameter("fc.weight"), module.get_parameter("fc.bias"))
    return {"kind": kind, "blocks": [_description(b.chain_config, len(b.convs)) for b in blocks]}, arrays


def _description(config, steps: int) -> dict[str, Any]:
    return {
        "scale": config.scale(steps), "steps": steps, "stride": config.stride, "hierarchical": config.hierarchical,
        "pooled": config.pool is not None,
    }  # fmt: skip
