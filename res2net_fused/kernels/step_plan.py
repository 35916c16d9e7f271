"""How a chain is cut into launches of the Triton step kernel, and into tiles within a launch. Pure Python, no Triton.

A chain that adds needs one launch per convolution, since convolution i + 1 reads what convolution i formed; a chain that
adds nothing is one launch. The group that passes through rides along as extra programs of a launch that exists anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..chain import ChainProblem

MAX_PIXELS = 2**31 - 2**10  # the kernel counts the output pixels of one launch in int32, and one tile beyond
# Per step and image: u is read, x_{i+1} read, y_i and u_{i+1} written. So much of it stays in an L2 of 40 MB and up.
CHUNK_BYTES = 32 * 2**20
# From so many output pixels on, aligning a badly aligned first group once costs less than nine unaligned reads of it.
ALIGN_FIRST_PIXELS = 50_000
_MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148}


@dataclass(frozen=True)
class Tile:
    """One program computes block_m pixels x block_n output channels, block_k products of a tap at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """Convolutions first_step ... first_step + steps - 1; steps is 0 in a launch that only prepares u.

    reads_u: the source is scratch, else x. forms_next: the u of the following step is written to scratch.
    passes: programs for the group that passes through are added.
    """

    first_step: int
    steps: int
    reads_u: bool
    forms_next: bool
    passes: bool


@dataclass(frozen=True)
class StepPlan:
    """tile: of every launch. images: per run through `launches`, so that a chunk of the batch stays in L2.

    lanes: channels that a convolution group takes up in scratch, a multiple of 8 so that loads are 16-byte ones.
    precision: of the products, as `tl.dot` names it; only float32 is affected.
    """

    tile: Tile
    launches: tuple[Launch, ...]
    images: int
    lanes: int
    precision: str

    @property
    def scratch_buffers(self) -> int:
        """u_{i+1} is written while u_i is read, so two buffers take turns."""
        return min(2, sum(launch.forms_next for launch in self.launches))

    def programs(self, problem: ChainProblem, launch: Launch, images: int) -> int:
        """Size of the one-dimensional grid."""
        tasks = launch.steps + launch.passes if launch.steps else 1
        return tasks * _tiles(problem, self.tile.block_m, self.tile.block_n, images)

    def describe(self, problem: ChainProblem) -> str:
        chunks = max(1, -(-problem.batch // self.images))
        tile = self.tile
        return (
            f"Triton, {len(self.launches) * chunks} launches"
            + (f" ({chunks} chunks of {self.images} images)" if chunks > 1 else "")
            + f", tile {tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.warps} warps, {tile.stages} stages"
            + (f", {self.precision}" if problem.dtype == torch.float32 else "")
        )


def plan_steps(problem: ChainProblem, capability: tuple[int, int], *, tf32: bool = False) -> StepPlan:
    """The launches and tiles for one call; `tf32` says whether float32 products may be rounded to TF32."""
    precision = "tf32" if tf32 and problem.dtype == torch.float32 else "ieee"
    channels = problem.width // problem.config.groups
    lanes = padded_lanes(channels)
    per_image = 4 * problem.height * problem.width_pixels * problem.config.groups * lanes * problem.dtype.itemsize
    pixels_per_image = problem.output_height * problem.output_width
    fitting = min(max(1, CHUNK_BYTES // per_image), max(1, MAX_PIXELS // pixels_per_image))
    chunks = max(1, -(-problem.batch // fitting))
    images = max(1, -(-problem.batch // chunks))
    tile = default_tile(problem, capability, precision, images)
    return StepPlan(tile, _launches(problem, pixels_per_image * images), images, lanes, precision)


def padded_lanes(channels: int) -> int:
    """Channels of a convolution group once padded: a multiple of 16 (of 8 below that), as strides are hinted by 16."""
    return -(-channels // 8) * 8 if channels <= 8 else -(-channels // 16) * 16


def _launches(problem: ChainProblem, pixels: int) -> tuple[Launch, ...]:
    config, steps = problem.config, problem.steps
    passes = config.passthrough != "none"
    if not any(config.adds(config.first_convolved + i) for i in range(steps)):
        return (Launch(0, steps, reads_u=False, forms_next=False, passes=passes),)
    slot_bytes = problem.width * problem.dtype.itemsize
    prepare = config.adds(config.first_convolved) or (pixels >= ALIGN_FIRST_PIXELS and slot_bytes % 8 != 0)
    launches = [Launch(0, 0, reads_u=False, forms_next=True, passes=passes)] if prepare else []
    for i in range(steps):
        last = i == steps - 1
        launches.append(Launch(i, 1, reads_u=i > 0 or prepare, forms_next=not last, passes=last and passes and not prepare))
    return tuple(launches)


def default_tile(problem: ChainProblem, capability: tuple[int, int], precision: str, images: int) -> Tile:
    """Hand-made defaults: the largest tile of a list that still gives every multiprocessor a program.

    A measured table replaces them by replacing this function's answer; the launches stay.
    """
    channels = problem.width // problem.config.groups
    block_n = max(16, 1 << (channels - 1).bit_length())
    # Multiples of 64 channels are cut exactly; anything else wastes less in one wide tile, read once.
    block_n = min(block_n, 64 if channels > 128 else 128)
    block_k = 16 if channels <= 16 else 64 if -(-channels // 64) * 64 == -(-channels // 32) * 32 else 32
    floating = problem.dtype.itemsize * 8
    if floating == 32:
        block_k = min(block_k, 32 if precision == "tf32" else 16)
        block_n = min(block_n, 64)
    shapes = [(128, block_n), (64, block_n)]
    shapes += [(64, n) for n in (64, 32) if n < block_n] + [(32, n) for n in (32, 16) if n <= block_n] + [(16, 16)]
    if precision == "ieee" and floating == 32:
        shapes = [shape for shape in shapes if shape[0] <= 64]
    wanted = _MULTIPROCESSORS.get(capability, 108)
    tasks = problem.steps if _independent(problem) else 1
    for block_m, block_n in shapes:  # noqa: B007
        if tasks * _tiles(problem, block_m, block_n, images) >= wanted:
            break
    warps = 8 if block_m * block_n >= 128 * 128 else 4 if block_m >= 64 else 2 if block_m * block_n >= 32 * 32 else 1
    return Tile(block_m, block_n, block_k, warps, 4 if block_k <= 32 else 3)


def _independent(problem: ChainProblem) -> bool:
    return len(_launches(problem, 0)) == 1


def _tiles(problem: ChainProblem, block_m: int, block_n: int, images: int) -> int:
    """Programs that one convolution takes: pixels x output channels x convolution groups."""
    pixels = images * problem.output_height * problem.output_width
    channels = problem.width // problem.config.groups
    return -(-pixels // block_m) * -(-channels // block_n) * problem.config.groups
