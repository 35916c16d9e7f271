"""Tiles of Triton's kernels for a block's call, measured before its backends are: each is then timed as fast as it can be."""

from __future__ import annotations

import torch
from torch import nn

from ..backends import choices
from ..backends.choices import Problem
from ..backends.measuring import candidates
from ..backends.selection import get_backend, why_put_aside
from ..backends.triton.availability import uses_tf32
from ..backends.triton.tiles import user_path
from ..bench.record_file import Record
from ..bench.tune import Tuner, launches_of
from ..bench.turns import ContextLost
from ..chain.problem import Chain1dProblem, ChainProblem
from ..chain.tolerances import first_use_bound
from ..modules.block_parts import parts_of
from ..modules.block_state import STATE
from ..modules.measuring import call_of
from ..ops.packed_weights import one_operator

_LIMIT_S = 20.0  # for one tile


def tune_tiles(block: nn.Module, problem: Problem, passes: str, record: Record) -> list[str]:
    """Measures the tiles that the user's table lacks for a block's call, and writes them there. Returns what to note.

    record: of `marked.py`.

    Nothing is done where Triton's kernels do not run the call, on a GPU, or are wrong as they are.
    """
    if isinstance(problem, Chain1dProblem) or passes != "inference":
        return []
    if not (one_operator(problem.config) and "triton" in candidates(passes, problem)):
        return []
    try:
        return _tune_tiles(block, problem, passes, record)
    except ContextLost:
        raise
    except Exception as error:  # no memory
        return [f"tiles cannot be measured: {type(error).__name__}: {error!s:.200}"]


def _tune_tiles(block: nn.Module, problem: ChainProblem, passes: str, record: Record) -> list[str]:
    parts, device = parts_of(block, vars(block)[STATE].layout), str(problem.device)
    shape = problem.batch, parts.conv1.in_channels, problem.height, problem.width_pixels
    x = torch.randn(shape, device=device, dtype=problem.dtype).contiguous(memory_format=torch.channels_last)

    with choices.pinned("triton"), torch.autocast("cuda", enabled=False):
        call_of(block, x, passes)()  # compared with float64 before its first use
    why = why_put_aside(get_backend("triton"), problem)
    if why is not None:
        return [f"triton: {why}"]
    with torch.cuda.device(problem.device), torch.inference_mode():
        launches = launches_of(parts, problem, x)
        limit = first_use_bound(problem.dtype, problem.dtype == torch.float32 and uses_tf32(problem))
        tuner = Tuner(user_path(), record, device, _LIMIT_S, says=False)
        rows = tuner.tune_launches(f"a block's call, {problem}", launches, limit)
    return [f"tiles of {len(rows)} launches measured"] if rows else []
