"""JAX as a peer: a case written out for jax_peer.py, which runs apart from this process and its GPU memory."""

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

from res2net_fused._timing import Timing
from res2net_fused.bench.candidates import module_case
from res2net_fused.bench.record_file import Row
from res2net_fused.bench.runner import make_row
from res2net_fused.bench.timed_case import TimedCase
from res2net_fused.bench.work import Work, least_work, least_work_of_network, rotation_count
from res2net_fused.chain.tolerances import forward_bound, network_bound
from res2net_fused.modules.block_parts import parts_of
from res2net_fused.modules.folding import fold, projection_of
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.testing.cases import TORCH_DTYPES, ReferenceChain
from res2net_fused.testing.parity import relative_error

from .runner import RecordRunner, build_network, image_size

PEER = Path(__file__).resolve().with_name("jax_peer.py")
_CHECKED = 2  # images


def why_not() -> str | None:
    """Why JAX cannot be timed here, or None."""
    return None if importlib.util.find_spec("jax") else "jax is not installed"


def time_case(case: TimedCase, runner: RecordRunner, seconds: float) -> Row:
    """One row; RuntimeError where the process fails, takes longer than `seconds`, or is less exact than is allowed."""
    import numpy as np

    conditions = runner.conditions
    module, shape, parts = _module(case, runner)
    dtype = TORCH_DTYPES[case.dtype]
    x = torch.randn(_CHECKED, *shape[1:], generator=torch.Generator().manual_seed(0)).relu_().to(conditions.device, dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(module).double()(x.double())
        eager_error = relative_error(module(x), expected)
    bound = network_bound(eager_error) if case.stage is None else forward_bound(case.dtype, eager_error)
    program, arrays = _export(case.workload, module)
    arrays |= {"x": x.float(), "expected": expected}
    count = max(2, rotation_count(sum(part.activations for part in parts), conditions.l2))
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        np.savez(Path(folder, "arrays.npz"), **values)
        spec = {
            "program": program, "arrays": str(Path(folder, "arrays.npz")), "shape": shape, "dtype": case.dtype,
            "count": count, "repeats": conditions.repeats, "gpu": torch.device(conditions.device).type == "cuda",
        }  # fmt: skip
        Path(folder, "spec.json").write_text(json.dumps(spec))
        found = _run(Path(folder, "spec.json"), seconds, torch.device(conditions.device))
    if not found["error"] <= bound:
        raise RuntimeError(f"JAX's relative error is {found['error']:.2g}; at most {bound:.2g} is allowed")
    timing = Timing.of_samples(found["samples_ms"], found["peak_mb"])
    row = make_row(case, ("jax", False), timing, conditions, runner.floor_ms(parts, case.dtype))
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


def _module(case: TimedCase, runner: RecordRunner) -> tuple[nn.Module, tuple[int, ...], list[Work]]:
    """The reference, the shape of x (N, C, H, W), and its least work."""
    if case.stage is None:
        network, size = build_network(case.config, case.dtype, runner.conditions), image_size(runner.conditions)
        shape = (case.batch, 3, size, size)
        return network, shape, least_work_of_network(network, shape, case.dtype)
    inner = module_case(case, runner.conditions)
    shape = (case.batch, inner.channels, inner.input_size, inner.input_size)
    module = inner.module()
    return module, shape, [least_work(module, shape, case.dtype)]


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
