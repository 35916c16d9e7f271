"""`res2net-fused tune`: measures candidate tiles on this GPU and writes the fastest of each shape to the user's table.

A candidate is compared with what the present tile computes before it is timed, the present tiles of a block with float64. A
child process measures (`bench/supervise.py`): a tile that hangs or kills costs itself. The table grows shape by shape, and
shapes that it holds are not measured again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._timing import Contender, GraphedContender, use_device
from ..backends.choices_file import unused
from ..backends.triton.tiles import ENVIRONMENT_VARIABLE, Row, Shape, Tile, dtype_class, merge, read, user_path, write
from ..chain.problem import ChainProblem
from ..chain.tolerances import FORWARD
from ..modules.block_parts import BlockParts, parts_of
from ..testing.cases import TORCH_DTYPES, Case, WidthScale, cases
from ..testing.parity import check_case, convolution_precision, poisoned_allocations
from . import results
from .record_file import Record
from .supervise import supervise
from .turns import Absent, ContextLost, Outcome, Wrong, noted, take_turns

if TYPE_CHECKING:
    from ..backends.triton.launch import KernelCall  # imports Triton, which may be missing

_STEPS = 2  # doublings and stages from the present tile to a candidate
_LAUNCHES = 8  # in a graph, so that the start of a replay weighs little
_TURNS = {"seconds": 0.0, "min_repeats": 15, "max_repeats": 15, "warm_up": 1}  # of `measure`
_OVER_BOUND = 4.0  # times the bound on a norm: what rounding may do to one element, and in units of what
GRACE = 40  # seconds beyond --minutes
# For the estimate, seconds of a tile: of a processor to compile it, in Python, which one thread has at a time; to time it.
_COMPILING, _IN_PYTHON, _TIMING = 1.5, 0.12, 0.06


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
        columns = arguments["OUT_CHANNELS"] if self.shape.kernel == "pointwise" else arguments["CHANNELS"]
        tasks = self.call.programs // _tiles(pixels, columns, self.tile)
        return replace(
            self.call,
            programs=tasks * _tiles(pixels, columns, tile),
            arguments={**arguments, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
            options={**options, "num_warps": tile.warps, "num_stages": tile.stages},
        )


def _tiles(pixels: int, columns: int, tile: Tile) -> int:
    return -(-pixels // tile.block_m) * -(-columns // tile.block_n)


def candidates(job: Job, shared_memory: int | None = None) -> list[Tile]:
    """The present tile, then those near it that one program's shared memory, in bytes, can hold (None: any)."""
    itemsize = 2 if job.shape.dtype == "half" else 4

    def near(tile: Tile) -> bool:
        pairs = zip(_sides(tile), _sides(job.tile), strict=True)
        steps = sum(abs(math.log2(a / b)) for a, b in pairs) + abs(tile.stages - job.tile.stages)
        held = (tile.block_m + tile.block_n) * tile.block_k * itemsize * (tile.stages - 1)  # and more, for the latest stage
        return steps <= _STEPS and (shared_memory is None or held <= shared_memory)

    return list(dict.fromkeys([job.tile, *filter(near, sensible_tiles(job.shape))]))


def _sides(tile: Tile) -> tuple[int, ...]:
    return tile.block_m, tile.block_n, tile.block_k, tile.warps


def sensible_tiles(shape: Shape) -> Iterator[Tile]:
    """All that a shape may take: powers of two that waste less than half of a tile, and accumulators that fit the registers."""
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


def jobs(blocks: Iterable[Case]) -> Iterator[Job]:
    """Every distinct shape in the blocks of these cases: conv1, the chain's launches, conv3; on tensors without memory."""
    seen = set()
    for case in blocks:
        for job in block_jobs(case, "meta"):
            if isinstance(job, Job) and job.shape not in seen:
                seen.add(job.shape)
                yield job


def block_jobs(case: Case, device: str | None = None) -> list[Job | KernelCall]:
    """All launches of a block in order; a KernelCall where there is no tile to choose. device: of the tensors (the case's)."""
    with convolution_precision(case.dtype, case.device):
        module = case.module()
        shape_of_x = case.batch, case.channels, case.input_size, case.input_size
        x = case.inputs()[0] if device is None else torch.empty(shape_of_x, dtype=TORCH_DTYPES[case.dtype], device=device)
        return launches_of(parts_of(module), case.problem(module), x)


def launches_of(parts: BlockParts, problem: ChainProblem, x: Tensor) -> list[Job | KernelCall]:
    """All launches of a block's call on images x (N, C, H, W), in order, as `block_jobs` returns them."""
    from ..backends.triton.availability import capability, plan_for
    from ..backends.triton.block import block_calls, pack_block
    from ..backends.triton.step_plan import step_shape
    from ..modules.folding import fold_block

    x = x.contiguous(memory_format=torch.channels_last)
    own = capability(problem.device)
    folded = fold_block(parts, problem.dtype)
    planes = folded.conv3_weight.shape[0]
    size = problem.batch, planes, problem.output_height, problem.output_width
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    shortcut = torch.randn_like(out)
    plan = plan_for(problem, own)
    kind = dtype_class(problem.dtype.itemsize, plan.precision)
    found: list[Job | KernelCall] = []
    for call in block_calls(problem, own, x, shortcut, pack_block(folded, problem.config), True, out, plan.precision):
        arguments = call.arguments
        if "IN_CHANNELS" in arguments:
            shape = Shape("pointwise", own, kind, arguments["OUT_CHANNELS"], arguments["IN_CHANNELS"], arguments["pixels"])
            found.append(Job(shape, call))
        elif "BLOCK_K" in arguments:
            found.append(Job(step_shape(problem, own, plan.precision, min(plan.images, problem.batch)), call))
        else:
            found.append(call)  # only prepares u
    return found


def shape_name(shape: Shape) -> str:
    return f"{shape.kernel} {shape.inputs} to {shape.width} channels, {shape.pixels} pixels, {shape.dtype}"


def tile_name(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.warps} warps, {tile.stages} stages"


class Tuner:
    """Measures blocks and writes each shape's fastest tile into the table at once."""

    def __init__(self, table: Path, record: Record, device: str, limit_s: float, says: bool = True) -> None:
        """record: where failures go, and who runs is marked. limit_s: for one tile. says: whether each result is printed."""
        self.table, self.record, self.device, self.limit_s, self._says = table, record, device, limit_s, says
        self._shared_memory = shared_memory(device)

    def left(self, case: Case) -> bool:
        """Whether the table lacks a shape of this block of which nothing went wrong."""
        return bool(self._open(block_jobs(case, "meta")))

    def tune(self, case: Case) -> list[Row]:
        """The rows of a block's shapes that the table lacks. Raises ContextLost."""
        with torch.inference_mode(), poisoned_allocations():  # an element that no launch writes stays NaN
            launches = block_jobs(case)
        with self._noted([shape_name(shape) for shape in self._open(launches)], Outcome()):
            for row in check_case(case, "triton").misses:
                raise Wrong(f"the present tiles are wrong: relative error {row.error:.2g}; at most {row.bound:.2g} is allowed")
            return self.tune_launches(str(case), launches, FORWARD[case.dtype].limit)
        return []

    def tune_launches(self, what: str, launches: Sequence[Job | KernelCall], limit: float) -> list[Row]:
        """The rows of those launches, right with their present tiles, whose shapes the table lacks.

        what: the call that they make up. limit: on relative errors.
        """
        todo, rows = self._open(launches), list[Row]()
        with self._noted([shape_name(shape) for shape in todo], Outcome()):
            tiles = self._compile(what, todo)
            with torch.inference_mode():
                for launch in launches:
                    if isinstance(launch, Job) and todo.get(launch.shape) is launch:
                        rows += self._tune(launch, tiles[launch.shape], limit)
                    (launch.call if isinstance(launch, Job) else launch).launch()  # the next ones read what it writes
        return rows

    def _open(self, launches: Iterable[Job | KernelCall]) -> dict[Shape, Job]:
        known = {row.shape for row in read(self.table)}
        found: dict[Shape, Job] = {}
        for job in launches:
            if isinstance(job, Job) and job.shape not in known and not self.record.settled(shape_name(job.shape)):
                found.setdefault(job.shape, job)
        return found

    def _noted(self, names: Sequence[str], outcome: Outcome) -> contextlib.AbstractContextManager[None]:
        return noted(self.record, names, outcome, self.limit_s)

    def _compile(self, what: str, todo: Mapping[Shape, Job]) -> dict[Shape, list[Tile]]:
        """The candidates of each shape that compile; all processors at once, unless that has ended a process."""
        together, outcome = f"compiling all tiles for {what}", Outcome()
        alone = self.record.settled(together)
        keys = [(shape, tile) for shape, job in todo.items() for tile in candidates(job, self._shared_memory)]
        calls = {key: todo[key[0]].with_tile(key[1]) for key in keys if not self.record.settled(_name(*key))}
        found: dict[Shape, list[Tile]] = {shape: [] for shape in todo}
        self.record.mark(together, limit_s=self.limit_s + _COMPILING * len(calls))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # Triton's passes leave Python's lock to the others
            compiled = {} if alone else {key: pool.submit(self._compile_one, call) for key, call in calls.items()}
            concurrent.futures.wait(compiled.values())
        for (shape, tile), call in calls.items():
            with self._noted([_name(shape, tile)], outcome):
                if alone:
                    self._compile_one(call)
                else:
                    compiled[shape, tile].result()
                found[shape].append(tile)
        return found

    def _compile_one(self, call: KernelCall) -> None:
        with torch.cuda.device(self.device):  # which is a thread's own
            call.kernel.warmup(grid=(call.programs,), **call.arguments, **call.options)

    def _tune(self, job: Job, tiles: Iterable[Tile], limit: float) -> list[Row]:
        """limit: on the relative error of a launch's output. Leaves what the launch writes as it was before."""
        written = [t for t in (job.call.arguments.get(name) for name in ("out", "scratch")) if isinstance(t, Tensor)]
        before = [t.clone() for t in written]
        job.call.launch()
        expected = [t.clone() for t in written]
        outcome, contenders, names = Outcome(), dict[Tile, Contender](), dict[Tile, str]()
        for tile in tiles:
            names[tile] = _name(job.shape, tile)
            with self._noted([names[tile]], outcome):
                contender = _contender(job.with_tile(tile), written, before)
                difference = max(_difference(a, b) for a, b in zip(written, expected, strict=True))
                if not difference <= _OVER_BOUND * limit:
                    raise Wrong(f"it computes something else than the present tile: an element differs by {difference:.2g}")
                contenders[tile] = contender
        self.record.add(absent=outcome.absent)
        timings = take_turns(contenders, names, self.record, outcome, self.device, self.limit_s, _TURNS)
        _restore(written, before)
        if not timings:
            return []
        best = min(timings, key=lambda tile: timings[tile].median_ms)
        write(self.table, merge(read(self.table), [Row(job.shape, best)]))
        present = f", {timings[job.tile].median_ms:.4g} with {tile_name(job.tile)}" if job.tile in timings else ""
        if self._says:
            print(f"{shape_name(job.shape)}: {timings[best].median_ms:.4g} ms with {tile_name(best)}{present}", flush=True)
        return [Row(job.shape, best)]


def _contender(call: KernelCall, written: Sequence[Tensor], before: Sequence[Tensor]) -> Contender:
    """Has run once, as it is timed, where nothing of it was written yet. Absent for a tile that does not fit this GPU."""
    from triton.runtime.errors import OutOfResources

    def launch(_: Tensor) -> Tensor:
        call.launch()
        return written[0]

    try:
        contender = GraphedContender(launch, [written[0]], _LAUNCHES)
        _restore(written, before)
        contender.run()
    except OutOfResources as error:
        raise Absent(str(error)) from None
    return contender


def _name(shape: Shape, tile: Tile) -> str:
    return f"{shape_name(shape)}: {tile_name(tile)}"


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _difference(out: Tensor, expected: Tensor) -> float:
    """The largest of one element, relative to it and to the mean square; infinite where only one of the two was written."""
    out, expected = out.float(), expected.float()
    if not torch.equal(out.isnan(), expected.isnan()):
        return math.inf
    out, expected = out.nan_to_num(), expected.nan_to_num()
    return float(((out - expected).abs() / (expected.abs() + expected.square().mean().sqrt() + 1e-30)).max())


def shared_memory(device: str) -> int | None:
    """Bytes that one program may have at most; None where PyTorch does not tell."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


def arithmetic(todo: Sequence[Job], limit: int | None, processors: int) -> str:
    """limit: of `shared_memory`."""
    tried = sum(len(candidates(job, limit)) for job in todo)
    sensible = sum(len(list(sensible_tiles(job.shape))) for job in todo)
    seconds = max(_COMPILING / processors, _IN_PYTHON)
    return (
        f"{len(todo)} shapes; of {sensible:,} sensible tiles {tried:,} fit and are at most {_STEPS} steps from a present one.\n"
        f"{tried:,} x ({seconds:.2f} s to compile on {processors} processors + {_TIMING} s to time) = "
        f"about {tried * (seconds + _TIMING) / 60:.0f} minutes"
    )


def tuned_blocks(configs: Iterable[WidthScale], batches: Iterable[int], dtypes: Iterable[str], device: str) -> list[Case]:
    """The blocks whose launches are tuned."""
    variants = ("normal", "stage")
    return [case for dtype in dtypes for case in cases(("block",), tuple(configs), tuple(batches), dtype, device, variants)]


def run_tune(
    blocks: Sequence[Case], device: str, out: Path | None, command: str, child: Sequence[str], minutes: float, again: bool
) -> int:
    """Measures all shapes of these blocks that the table lacks; returns the exit status: 1 where something failed.

    child: the command that calls `measure_tiles`, to which --out, --child and the time of the end are added. again: measures
    shapes anew that the table has.
    """
    if torch.device(device).type != "cuda":
        raise RuntimeError(f"device is {device}; tiles are measured on a CUDA device")
    table, end = out or user_path(), time.time() + 60 * minutes
    try:
        known = _known(table)
        write(table, known)  # fails before the measurements rather than after them
        if again and known:
            shutil.copyfile(table, unused(table, "before"))
    except OSError as error:
        remedy = f"name another file by --out or {ENVIRONMENT_VARIABLE}"
        raise RuntimeError(f"{table} cannot be written ({error}): {remedy}") from None
    use_device(device)
    planned = list(jobs(blocks))
    if again:
        shapes = {job.shape for job in planned}
        write(table, [row for row in known if row.shape not in shapes])
    record = open_record(table, device, command)
    if again:
        record.retry()
    record.save()
    record.close()
    have = {row.shape for row in read(table)}
    todo = [job for job in planned if job.shape not in have and not record.settled(shape_name(job.shape))]
    print(f"{len(planned)} shapes, {len(planned) - len(todo)} of them settled: {table}", flush=True)
    status = 0
    if todo:
        print(arithmetic(todo, shared_memory(device), os.cpu_count() or 1), flush=True)
        status = supervise([*child, "--out", str(table), "--child", str(end)], record.path, deadline=end + GRACE)
    record = open_record(table, device, command)
    record.close()
    missing = {job.shape for job in planned} - {row.shape for row in read(table)}
    for name, reason in record.failures.items():
        print(f"failed, {name}: {reason}")
    print(f"{len(planned) - len(missing)} of {len(planned)} shapes are in {table}", end="")
    print("; call again to go on, with --again to try anew what failed" if missing else "")
    return status or int(bool(record.failures))


def measure_tiles(blocks: Sequence[Case], device: str, table: Path, command: str, limit_s: float, end: float) -> bool:
    """Measures in the child until time.time() is `end`. Returns whether a new process has to go on."""
    use_device(device)
    record = open_record(table, device, command)
    record.begin_run()
    tuner = Tuner(table, record, device, limit_s)
    try:
        for case in blocks:
            if time.time() < end and tuner.left(case):
                tuner.tune(case)
    except ContextLost as error:
        print(f"the CUDA context is lost: {error}", flush=True)
        return True
    finally:
        record.save()
        record.close()
    return False


def open_record(table: Path, device: str, command: str) -> Record:
    """What went wrong in earlier calls, beside the table; begun anew where PyTorch, Triton or this package were others then."""
    path, environment = table.with_name(f"{table.stem}.tuning.json"), results.environment(device, command)
    try:
        return Record(path, environment)
    except ValueError:
        return Record(path, environment, again=True)


def _known(table: Path) -> list[Row]:
    """The rows of the table; one that cannot be read is moved aside, and said so."""
    try:
        return read(table) if table.exists() else []
    except ValueError as error:
        kept = unused(table, "before")
        table.replace(kept)
        print(f"tune: {error}. It is kept as {kept}, and a new one is begun", file=sys.stderr, flush=True)
        return []
