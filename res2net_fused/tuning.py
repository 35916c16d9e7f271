"""`res2net-fused tune`: measures candidate tiles on this GPU and writes the fastest of each shape to the user's table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .bench.workloads import TORCH_DTYPES, Case, Config, cases
from .kernels.tile_table import ENVIRONMENT_VARIABLE, Row, Shape, Tile, dtype_class, merge, read, user_path, write

if TYPE_CHECKING:
    from .kernels.kernel_call import KernelCall  # imports Triton, which may be missing

# Measures one launch: milliseconds, or None where the tile does not compile or does not fit.
Timer = Callable[["KernelCall"], "float | None"]


@dataclass(frozen=True)
class Job:
    """One shape to tune, and a launch that has it; the launch's tile is replaced by each candidate."""

    shape: Shape
    call: KernelCall

    @property
    def tile(self) -> Tile:
        """What the launch has now."""
        block_m, block_n, block_k = (self.call.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return Tile(block_m, block_n, block_k, self.call.options["num_warps"], self.call.options["num_stages"])

    def with_tile(self, tile: Tile) -> KernelCall:
        """The same launch cut into other tiles."""
        arguments, options = self.call.arguments, self.call.options
        pixels = arguments["pixels"]
        columns = arguments["OUT_LANES"] if self.shape.kernel == "pointwise" else arguments["CHANNELS"]
        tasks = self.call.programs // _tiles(pixels, columns, self.tile)
        return replace(
            self.call,
            programs=tasks * _tiles(pixels, columns, tile),
            arguments={**arguments, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
            options={**options, "num_warps": tile.warps, "num_stages": tile.stages},
        )


def _tiles(pixels: int, columns: int, tile: Tile) -> int:
    return -(-pixels // tile.block_m) * -(-columns // tile.block_n)


def candidates(shape: Shape) -> Iterator[Tile]:
    """Tiles worth measuring: powers of two that waste less than half of a tile, and accumulators that fit the registers."""
    widest = max(16, 1 << (shape.width - 1).bit_length())
    deepest = max(16, 1 << (shape.inputs - 1).bit_length())
    blocks = {"half": (16, 32, 64), "tf32": (16, 32), "ieee": (16,)}[shape.dtype]
    for block_m, block_n, block_k in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), blocks):
        area = block_m * block_n
        if block_n > widest or block_k > deepest or area > (128 * 256 if shape.dtype == "half" else 64 * 128):
            continue
        for warps, stages in itertools.product((1, 2, 4, 8), (2, 3, 4)):
            if 256 <= area // warps <= 4096 and not (block_m >= 64 and block_n >= 64 and warps < 4):
                yield Tile(block_m, block_n, block_k, warps, stages)


def jobs(settings: Iterable[Case]) -> Iterator[Job]:
    """Every distinct shape in the blocks of these cases: conv1, the chain's launches, conv3."""
    seen = set()
    for case in settings:
        for job in _jobs_of_block(case):
            if job.shape not in seen:
                seen.add(job.shape)
                yield job


def _jobs_of_block(case: Case) -> Iterator[Job]:
    from .backends.triton_block import block_calls, pack_block
    from .backends.triton_settings import capability, plan_for
    from .folding import fold_block
    from .kernels.step_plan import step_shape
    from .layouts import parts_of

    module = case.module()
    problem = case.problem(module)
    x = case.inputs()[0].contiguous(memory_format=torch.channels_last)
    own = capability(problem.device)
    folded = fold_block(parts_of(module), TORCH_DTYPES[case.dtype])
    planes = folded.conv3_weight.shape[0]
    size = problem.batch, planes, problem.output_height, problem.output_width
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    shortcut = torch.randn_like(out)
    plan = plan_for(problem, own)
    kind = dtype_class(problem.dtype.itemsize, plan.precision)
    for call in block_calls(problem, own, x, shortcut, pack_block(folded, problem.config), True, out):
        arguments = call.arguments
        if "IN_LANES" in arguments:
            shape = Shape("pointwise", own, kind, arguments["OUT_LANES"], arguments["IN_LANES"], arguments["pixels"])
        elif "BLOCK_K" in arguments:
            shape = step_shape(problem, own, plan.precision, min(plan.images, problem.batch))
        else:
            continue  # only prepares u
        yield Job(shape, call)


def tune(todo: Iterable[Job], timer: Timer, advance: Callable[[], object] = lambda: None) -> list[Row]:
    """The fastest candidate of each job; the present tile is among them, so that a tuned table is never slower."""
    rows = []
    for job in todo:
        times = {tile: timer(job.with_tile(tile)) for tile in dict.fromkeys((job.tile, *candidates(job.shape)))}
        measured = {tile: ms for tile, ms in times.items() if ms is not None}
        if measured:
            rows.append(Row(job.shape, min(measured, key=measured.__getitem__)))
        advance()
    return rows


def cuda_timer(call: KernelCall) -> float | None:
    """Median of replays of a CUDA graph; None for a tile that does not fit this GPU."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph

    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            return do_bench_cudagraph(call.launch, rep=10, return_mode="median")
    except OutOfResources:
        return None


def run_tune(configs: Iterable[Config], batches: Iterable[int], dtypes: Iterable[str], device: str, out: Path | None) -> int:
    """Measures all shapes of these networks' blocks and merges the result into the table; returns the exit status."""
    if torch.device(device).type != "cuda":
        raise RuntimeError(f"device is {device}; tiles are measured on a CUDA device")
    from tqdm import tqdm

    path = out or user_path()
    try:
        known = read(path) if path.exists() else []
        write(path, known)  # fails before the measurements rather than after them
    except OSError as error:
        remedy = f"name another file by --out or {ENVIRONMENT_VARIABLE}"
        raise RuntimeError(f"{path} cannot be written ({error}): {remedy}") from None
    rows: list[Row] = []
    for dtype in dtypes:
        settings = cases(("block",), configs, batches, dtype, device, ("normal", "stage"))
        todo = list(jobs(settings))
        with tqdm(total=len(todo), desc=f"tiles for {dtype}", disable=None) as bar:
            rows += tune(todo, cuda_timer, bar.update)
        write(path, merge(known, rows))  # after each dtype, so that an interrupted run keeps what it measured
    print(f"{len(rows)} shapes measured; {path} now holds {len(merge(known, rows))}")
    return 0
