"""How a chain is cut into launches of the Triton step kernel, and into tiles within a launch. Pure Python, no Triton.

A chain that adds needs one launch per convolution, since convolution i + 1 reads what convolution i formed; a chain
that adds nothing is one launch. The group that passes through rides along as extra programs of an existing launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...chain.problem import ChainProblem
from .tiles import MIN_BLOCK, Shape, Tile, dtype_class, lookup

MAX_PIXELS = 2**31 - 2**10  # the kernel counts the output pixels of one launch in int32, and one tile beyond
MAX_PROGRAMS = 2**31 - 1  # of a one-dimensional grid
MAX_CHANNELS = 15360  # of a convolution group: offsets within the weights of one convolution are int32
# Per step and image: u is read, x_{i+1} read, y_i and u_{i+1} written. So much of it stays in an L2 of 40 MB and up.
CHUNK_BYTES = 32 * 2**20
# From so many output pixels on, aligning a badly aligned first group once costs less than nine unaligned reads of it.
ALIGN_FIRST_PIXELS = 50_000
# The usual GPU of each compute capability: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
_MULTIPROCESSORS = {(8, 0): 108, (8, 6): 82, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}


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
    """tile: of every launch, from `tile_source`. images: per run through `launches`, so that a chunk of the batch stays in L2.

    padded_channels: that a convolution group takes up in scratch, a multiple of 8 so that loads are 16-byte ones.
    precision: of the products, as `tl.dot` names it; only float32 is affected. capability: of the GPU, known or not.
    """

    tile: Tile
    tile_source: str
    launches: tuple[Launch, ...]
    images: int
    padded_channels: int
    precision: str
    capability: tuple[int, int]

    @property
    def scratch_buffers(self) -> int:
        """u_{i+1} is written while u_i is read, so two buffers take turns."""
        return min(2, sum(launch.forms_next for launch in self.launches))

    def programs(self, problem: ChainProblem, launch: Launch, images: int) -> int:
        """Size of the one-dimensional grid."""
        tasks = launch.steps + launch.passes if launch.steps else 1
        return tasks * _tiles(problem, self.tile.block_m, self.tile.block_n, images)

    def describe(self, problem: ChainProblem) -> str:
        chunks = -(-problem.batch // max(1, self.images))
        tile, known = self.tile, nearest_known(self.capability)
        own, stand_in = ("{}.{}".format(*capability) for capability in (self.capability, known))
        return (
            f"Triton, {len(self.launches) * chunks} launches"
            + (f" ({chunks} chunks of {self.images} images)" if chunks > 1 else "")
            + f", tile {tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.warps} warps, {tile.stages} stages"
            + f" ({self.tile_source})"
            + (f", {self.precision}" if problem.dtype == torch.float32 else "")
            + (f", as for compute capability {stand_in}, since {own} is not known" if own != stand_in else "")
        )


def dot_precision(dtype: torch.dtype, tf32: bool) -> str:
    """`input_precision` of tl.dot. tf32: whether float32 products may be rounded to TF32."""
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def plan_steps(
    problem: ChainProblem, capability: tuple[int, int], *, tf32: bool = False, pitch: int | None = None, in_place: bool = False
) -> StepPlan:
    """The launches and tiles for one call.

    tf32: whether float32 products may be rounded to TF32. pitch: channels from one slot of x to the next, if not w.
    in_place: the group that passes through already lies where it belongs, so that nothing copies it.
    """
    precision = dot_precision(problem.dtype, tf32)
    padded = padded_channels(problem.width // problem.config.groups)
    pixels_per_image = problem.output_height * problem.output_width
    fitting = most_pixels(problem) // pixels_per_image
    if not _independent(problem):
        traffic = 4 * pixels_per_image * problem.config.groups * padded * problem.dtype.itemsize
        fitting = min(fitting, CHUNK_BYTES // traffic)
    chunks = -(-problem.batch // max(1, fitting))
    images = -(-problem.batch // max(1, chunks))
    tuned = lookup(step_shape(problem, capability, precision, images))
    tile, tile_source = (default_tile(problem, capability, precision, images), "rule") if tuned is None else (tuned, "tuned")
    passes = problem.config.passthrough != "none" and not in_place
    launches = _launches(problem, pixels_per_image * images, (pitch or problem.width) * problem.dtype.itemsize, passes)
    return StepPlan(tile, tile_source, launches, images, padded, precision, capability)


def plan_training(problem: ChainProblem, capability: tuple[int, int], *, tf32: bool = False) -> StepPlan:
    """`plan_steps` with tiles that leave no spill beside the epilogues of training, which hold on to more."""
    plan = plan_steps(problem, capability, tf32=tf32)
    tile = plan.tile
    if problem.dtype == torch.float32:
        tile = replace(tile, block_m=32, block_n=min(tile.block_n, 32), block_k=16, warps=4, stages=3)
    elif not (9, 0) <= capability < (10, 0):
        tile = replace(tile, block_m=min(tile.block_m, 64), stages=4)
        if capability >= (12, 0):  # where ptxas would spill a register to fit one more block of 256 threads
            tile = replace(tile, block_n=min(tile.block_n, 64), warps=min(tile.warps, 4))
    return replace(plan, tile=tile)


def padded_channels(channels: int) -> int:
    """Channels of a convolution group once padded: 8, for 16-byte loads of half types, or a multiple of 16, K of one mma."""
    return -(-channels // 8) * 8 if channels <= 8 else -(-channels // 16) * 16


def most_pixels(problem: ChainProblem) -> int:
    """Output pixels that one launch may have, whatever its tiles are."""
    channels = problem.width // problem.config.groups
    tasks = (problem.steps + 1) * problem.config.groups * -(-channels // MIN_BLOCK)
    return min(MAX_PIXELS, MAX_PROGRAMS // tasks * MIN_BLOCK)


def why_not_size(problem: ChainProblem) -> str | None:
    """Why no launch can hold one image of this call, or None."""
    channels, pixels = problem.width // problem.config.groups, problem.output_height * problem.output_width
    if channels > MAX_CHANNELS:
        return f"a convolution group has {channels} channels; at most {MAX_CHANNELS} are allowed"
    if pixels > (most := most_pixels(problem)):
        found = f"{problem.output_height}x{problem.output_width}"
        return f"an image of x gives {found} output pixels; at most {most} are allowed"
    return None


def _independent(problem: ChainProblem) -> bool:
    """Whether no convolution reads another's output."""
    return not any(step.adds for step in problem.config.convolutions(problem.steps))


def _launches(problem: ChainProblem, pixels: int, slot_bytes: int, passes: bool) -> tuple[Launch, ...]:
    config, steps = problem.config, problem.steps
    if _independent(problem):
        return (Launch(0, steps, reads_u=False, forms_next=False, passes=passes),)
    prepare = config.adds_passed or (pixels >= ALIGN_FIRST_PIXELS and slot_bytes % 8 != 0)
    launches = [Launch(0, 0, reads_u=False, forms_next=True, passes=passes)] if prepare else []
    for i in range(steps):
        last = i == steps - 1
        own_pass = last and passes and not prepare
        launches.append(Launch(i, 1, reads_u=i > 0 or prepare, forms_next=not last, passes=own_pass))
    return tuple(launches)


def step_shape(problem: ChainProblem, capability: tuple[int, int], precision: str, images: int) -> Shape:
    """What the table of tiles is asked for."""
    channels = problem.width // problem.config.groups
    tasks = problem.config.groups * (problem.steps if _independent(problem) else 1)
    pixels = tasks * images * problem.output_height * problem.output_width
    kind = dtype_class(problem.dtype.itemsize, precision)
    return Shape("step", capability, kind, channels, channels, max(1, pixels))


def default_tile(problem: ChainProblem, capability: tuple[int, int], precision: str, images: int) -> Tile:
    """The rule where no table has a near shape: the largest tile of a list that still gives every multiprocessor a program."""
    channels = problem.width // problem.config.groups
    single = problem.dtype.itemsize == 4
    scalar = single and precision == "ieee"  # no tensor cores: both operands live in registers
    # One tile spans up to 128 channels, so that u is read once; beyond, tiles of 64 leave less of the last one empty.
    block_n = max(16, 1 << (channels - 1).bit_length()) if channels <= 128 else 64
    block_n = min(block_n, 64) if single else block_n
    block_k = 16 if channels <= 16 else 32 if -(-channels // 32) % 2 else 64
    block_k = min(block_k, 16 if scalar else 32) if single else block_k
    shapes = [(128, block_n), (64, block_n), (64, min(block_n, 32)), (32, min(block_n, 32)), (32, 16), (16, 16)]
    shapes = shapes[1:] if single else shapes  # 128 rows of float32 spill
    wanted = multiprocessors(capability)
    steps = problem.steps if _independent(problem) else 1
    enough = (shape for shape in shapes if steps * _tiles(problem, *shape, images) >= wanted)
    block_m, block_n = next(enough, shapes[-1])
    warps = next(warps for warps, area in ((8, 8192), (4, 1024), (2, 512), (1, 0)) if block_m * block_n >= area)
    # More stages in narrow scalar tiles make ptxas for Blackwell spill a register to fit one more warp.
    stages = 2 if scalar and block_n == 16 else 3 if block_k == 64 else 4
    return Tile(block_m, block_n, block_k, warps, stages)


def nearest_known(capability: tuple[int, int]) -> tuple[int, int]:
    """The compute capability whose usual GPU a plan is made for; of two that are equally near the older one."""
    return min(sorted(_MULTIPROCESSORS), key=lambda known: abs(10 * (known[0] - capability[0]) + known[1] - capability[1]))


def multiprocessors(capability: tuple[int, int]) -> int:
    """Multiprocessors of the usual GPU of a compute capability; a plan wants at least as many programs."""
    return _MULTIPROCESSORS[nearest_known(capability)]


def has_wide_products(capability: tuple[int, int]) -> bool:
    """Whether one instruction multiplies for four warps or more (wgmma, tcgen05), so that large tiles leave registers free.

    Hopper's and Blackwell's data centre cards have them, 12.x (RTX 50) multiplies as 8.x does and has as little shared memory.
    """
    return (9, 0) <= capability < (12, 0)


def _tiles(problem: ChainProblem, block_m: int, block_n: int, images: int) -> int:
    """Programs that one convolution takes: pixels x output channels x convolution groups."""
    pixels = images * problem.output_height * problem.output_width
    channels = problem.width // problem.config.groups
    return -(-pixels // block_m) * -(-channels // block_n) * problem.config.groups
