"""What the compiler made of the CUDA chain kernels: registers, stack and tensor-core instructions of every instance.

Read from compiled code with `cuobjdump`, so neither a GPU nor a CUDA torch is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from ..._native import library
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from . import machine_code
from . import plan as launch_plan

# chain_kernel<StripCta<bf16, depths, columns, tiles>, warps>, and the same of the other two without depths
_KERNEL = re.compile(
    r"chain_kernelINS\w*?_\d+(?P<kind>Strip|Cluster|Wgmma)CtaI4(?P<dtype>bf16|fp16|tf32)(?P<numbers>(?:Li\d+E)+)E"
)
# (w, s) of the published Res2Net-50s at their first stage; w doubles at each of the four stages, of 56, 28, 14 and 7 rows
PUBLISHED = ((26, 4), (14, 8), (48, 2))


@dataclass(frozen=True)
class CompiledKernel:
    """One instance for one architecture. stack, local: bytes of a thread; both are 0 where nothing spills.

    counts: of its instructions.
    """

    architecture: str
    instance: str
    dtype: str
    registers: int
    stack: int
    local: int
    counts: machine_code.Counts


def find_cuobjdump() -> str | None:
    """The tool from PATH, else the one inside Triton's wheel."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.is_file() else None
    return found


def instance_of(symbol: str) -> tuple[str, str] | None:
    """(instance, dtype) of a kernel's mangled name, or None for other functions."""
    match = _KERNEL.search(symbol)
    if match is None:
        return None
    *depths, columns, tiles = re.findall(r"Li(\d+)E", match["numbers"])
    head = f"d{depths[0]}" if match["kind"] == "Strip" else f"{match['kind'].lower()}_"
    return f"{head}c{columns}t{tiles}", match["dtype"]


def compiled_kernels(file: Path, cuobjdump: str) -> list[CompiledKernel]:
    """Every chain kernel in a library or fat binary, one entry for each architecture it was compiled for."""
    text = subprocess.run([cuobjdump, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    code = machine_code.functions(file, cuobjdump)
    kernels, architecture = [], "?"
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            symbol = match[1]
        elif (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line)) and (name := instance_of(symbol)):
            counts = machine_code.counts(code[architecture, symbol], int(name[0].rpartition("t")[2]))
            registers, stack, local = map(int, match.groups())
            kernels.append(CompiledKernel(architecture, *name, registers, stack, local, counts))
    return sorted(kernels, key=lambda k: (int(re.findall(r"\d+", k.architecture)[0]), k.instance, k.dtype))


def kernel_table() -> list[tuple[str, ...]]:
    """Rows for `res2net-fused info --kernels`, the first of them the head.

    Per architecture, instance and dtype (tf32: float32 multiplied in TF32): registers, stack and local bytes of a thread,
    instructions of a half tile, of a copy and of a turn of the main loop (`machine_code.Counts`), and the widths of the
    published models that it runs with the shared memory of a CTA at batch 32 on an H200. Raises RuntimeError where there is
    nothing to read.
    """
    path = library.cuda_library().path
    if not path.is_file():
        raise RuntimeError("the CUDA library is not built; `res2net-fused info` says why")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("cuobjdump was found neither on PATH nor in Triton's wheel: install triton or the CUDA toolkit")
    head = ("architecture", "instance", "dtype", "registers", "stack", "local", "half tile", "copy", "weights", "turn",
            "width: shared KiB of a CTA")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    shared = _shared_bytes_by_kernel() if library.cpu_library().loaded else {}
    for k in compiled_kernels(path, cuobjdump):
        widths = ", ".join(f"{w}: {n / 1024:.0f}" for w, n in sorted(shared.get((k.instance, k.dtype), {}).items()))
        figures = (k.registers, k.stack, k.local, *dataclasses.astuple(k.counts))
        rows.append((k.architecture, k.instance, k.dtype, *map(str, figures), widths))
    return rows


def prediction_table(device: str = "sm_90", batches: tuple[int, ...] = (1, 32, 256)) -> list[tuple[str, ...]]:
    """Rows, the first of them the head: what the plan's model predicts for the published chains in bf16. None is measured.

    The chains are those of a block, which lays its groups out and whose conv1 writes the one that passes. MB: of x, weights and
    out, each once. issue, tensor, shared and memory: us that the busiest multiprocessor's instructions, products and shared
    memory, and the device's memory take at the least. device: a key of `launch_plan.LIMITS`.
    """
    rows: list[tuple[str, ...]] = [
        ("chain", "rows", "instance", "batch", "CTAs", "CTA's part", "parts", "warps", "shared KiB", "us", "issue", "tensor",
         "shared", "memory", "per step us", "MB", "GFLOP")
    ]  # fmt: skip
    for width, scale, stage, size in _published():
        for batch in batches:
            plan = launch_plan.plan_chain(_problem(batch, width << stage, scale, size), launch_plan.LIMITS[device])
            part = f"{plan.images} images" if plan.whole else f"{plan.rows}x{plan.columns}"
            rows.append(
                (f"{width}w{scale}s", f"{size}", launch_plan.INSTANCE_NAMES[plan.instance], f"{batch}", f"{plan.ctas}", part,
                 f"{plan.row_parts}x{plan.channel_parts}", launch_plan.warps(plan), f"{plan.shared_bytes / 1024:.0f}",
                 *(f"{nanoseconds / 1000:.0f}" for nanoseconds in (plan.nanoseconds, *plan.bounds(), plan.steps_nanoseconds)),
                 f"{plan.dram_bytes / 1e6:.1f}", f"{plan.flops / 1e9:.2f}")
            )  # fmt: skip
    return rows


def _published() -> list[tuple[int, int, int, int]]:
    """(w at the first stage, s, stage from 0, rows of the map) of every chain of PUBLISHED."""
    return [(w, s, stage, size) for w, s in PUBLISHED for stage, size in enumerate((56, 28, 14, 7))]


def _problem(batch: int, width: int, scale: int, size: int, dtype: torch.dtype = torch.bfloat16) -> ChainProblem:
    around = 64 * 4 * 56 // size, 64 * 4 * 56 // size
    return ChainProblem(ChainConfig(), torch.device("cuda"), dtype, batch, size, size, width, scale - 1, True, around)


def _shared_bytes_by_kernel() -> dict[tuple[str, str], dict[int, int]]:
    """(instance, dtype) -> width -> bytes"""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)):
        for width, scale, stage, size in _published():
            plan = launch_plan.plan_chain(_problem(32, width << stage, scale, size, dtype), launch_plan.LIMITS["sm_90"])
            found.setdefault((launch_plan.INSTANCE_NAMES[plan.instance], name), {})[width << stage] = plan.shared_bytes
    return found
