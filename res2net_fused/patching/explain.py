"""`explain(model)`: for every Res2Net block, whether it runs fused, on which backend, how, and if not, why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from .._tables import format_table
from ..backends import policy
from ..backends.base import Backend
from ..backends.cpu.stem import plan as stem_plan
from ..backends.selection import choose, choose_for_training, get_backend, plan
from ..chain.batch_norm import wide_dtype
from ..chain.block_weights import BlockWeights
from ..chain.problem import ChainProblem
from ..modules.block_parts import parts_of
from ..modules.block_state import STATE, BlockState, FusedModule, FusedState
from ..modules.eligibility import why_not_read
from ..modules.fused_forward import reads_old_weights
from ..modules.fused_forward1d import BlockState1d, parts_1d, reads_old_weights_1d, why_not_alike_1d
from ..modules.training import synchronises
from .accelerate import LOST, REFUSAL
from .bare_chains import BARE_CHAIN, is_bare_chain
from .recognition import layout_of
from .recognition1d import looks_like_1d
from .stem import STEM_REFUSAL, FusedStem, StemState, reads_old_stem

OUTDATED = "its kept weights are not its parameters' any more: call refresh(model) after writes that PyTorch does not see"


def saved_bytes(problem: ChainProblem, recompute: bool) -> tuple[int, int]:
    """Bytes that the chain keeps for its backward, x and out included: in one operator, and by PyTorch's own operators.

    The latter keep every u_i that is a sum, every z_i and every y_i beside the concatenated out; statistics are kept by both.
    """
    config, item = problem.config, problem.dtype.itemsize
    group = problem.batch * problem.output_height * problem.output_width * problem.width * item
    x = problem.batch * problem.height * problem.width_pixels * problem.scale * problem.width * item
    both = x + problem.scale * group + 2 * problem.steps * problem.width * wide_dtype(problem.dtype).itemsize
    sums = sum(step.adds for step in config.convolutions(problem.steps))
    return both + (0 if recompute else problem.steps * group), both + (2 * problem.steps + sums) * group


def describe_training(backend: Backend, problem: ChainProblem, recompute: bool, synchronised: bool) -> str:
    """One line for `explain`."""
    whose = " of all processes" if synchronised else ""
    how = backend.plan_training(problem) if not synchronised or backend.synchronises else "ATen"
    fused, eager = (f"{size / 2**20:.3g} MiB" for size in saved_bytes(problem, recompute))
    again = ", convolved again in backward" if recompute else ""
    return f"batch statistics{whose}, {how}, {fused} kept for backward instead of {eager}{again}"


@dataclass(frozen=True)
class BlockReport:
    """One block. name: in the model. fused: whether its last call (or the example's) ran fused; None if not run yet.

    backend: of that call, or "". reason: for the backend, or against fusing. plan: how the backend runs these shapes.
    """

    name: str
    fused: bool | None
    backend: str
    reason: str
    plan: str = ""


class BlockReports(list[BlockReport]):
    """A list of BlockReport that prints as a table.

    stems: reports on what stands in front of the blocks of a network, which are printed above the blocks' and not counted.
    """

    def __init__(self, blocks: Iterable[BlockReport] = (), stems: Iterable[BlockReport] = ()) -> None:
        super().__init__(blocks)
        self.stems = list(stems)

    def __str__(self) -> str:
        head = ("block", "fused", "backend", "plan", "reason")
        words = {True: "yes", False: "no", None: "?"}
        rows = [(r.name or "(model)", words[r.fused], r.backend, r.plan, r.reason) for r in (*self.stems, *self)]
        fused = sum(r.fused is True for r in self)
        return format_table(head, rows, left=len(head)) + f"\n{fused} of {len(self)} blocks fused"

    __repr__ = __str__


def explain(model: nn.Module, *example_inputs: object) -> BlockReports:
    """Reports on every Res2Net block of `model`, and on the stems in front: a list of BlockReport that prints as a table.

    With example_inputs the model is run on them once, without gradients; its buffers, mode and the random state are left as
    they were; what its forward raises is raised. Without, the report is about each block's last call.
    """
    if example_inputs:
        run_unnoticed(model, example_inputs)
    reports, listed = BlockReports(stems=_stems(model)), list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(other) for other in listed)
        if isinstance(module, FusedModule) or vars(module).get(REFUSAL) == LOST or looks_like_1d(module) or layout_of(module):
            reports.append(_with_status(_report(name, module)))
            listed.append(f"{name}." if name else "")
        elif not inside and is_bare_chain(module):
            reports.append(BlockReport(name, False, "", BARE_CHAIN))
    return reports


def _stems(model: nn.Module) -> Iterator[BlockReport]:
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        state: StemState | None = vars(module).get(STATE) if isinstance(module, FusedStem) else None
        if state is None:
            if STEM_REFUSAL in vars(module):
                yield BlockReport(f"{prefix}(stem)", False, "", vars(module)[STEM_REFUSAL])
            continue
        called = prefix + ", ".join(state.config)
        weights = state.last_weights
        if state.last_refusal is not None:
            yield BlockReport(called, False, "", state.last_refusal)
        elif weights is None:
            yield BlockReport(called, None, "", "not run yet")
        else:
            reason = "called in turn by its forward, and nothing looks between"
            outdated = f"; {OUTDATED}" if reads_old_stem(module) else ""
            yield BlockReport(called, True, "cpu", reason + outdated, stem_plan(weights, state.last_problem))


def _with_status(report: BlockReport) -> BlockReport:
    status = policy.EXPERIMENTAL.get(report.backend)
    return report if status is None else replace(report, reason=f"{report.reason}; {status}")


def _report(name: str, module: nn.Module) -> BlockReport:
    if not isinstance(module, FusedModule) or STATE not in vars(module):
        reason = module.__dict__.get(REFUSAL, "accelerate(model) has not been called since this block was added")
        return BlockReport(name, False, "", reason)
    state: FusedState = getattr(module, STATE)
    if state.last_refusal is not None:
        return BlockReport(name, False, "", state.last_refusal)
    problem = state.last_problem
    if problem is None:
        return BlockReport(name, None, "", "not run yet")
    try:
        if state.last_trained:
            choice = choose_for_training(problem, state.backend)
            assert isinstance(state, BlockState)
            synchronised = any(map(synchronises, parts_of(module, state.layout).bns))
            how = describe_training(get_backend(choice.name), problem, state.recompute, synchronised)
        else:
            kept, frozen = state.kept, state.frozen  # read once: another thread may drop them
            weights = kept[1] if kept else None
            if frozen is not None:
                weights = frozen.held.get((problem.dtype, problem.device))
            choice = choose(problem, state.backend, weights.layout if isinstance(weights, BlockWeights) else "plain")
            unpacked = choose(problem, state.backend)
            choice = unpacked if unpacked.name == choice.name else choice  # its reasons name what is against other backends
            how = plan(problem, choice.name)
    except RuntimeError as error:
        return BlockReport(name, False, "", str(error))
    notes = [choice.reason]
    nchw = isinstance(problem, ChainProblem) and not problem.channels_last
    if nchw and choice.name != "reference" and policy.channels_last_pays(problem.device, problem.dtype):
        notes.append(policy.NCHW)
    if not state.last_trained and _reads_old_weights(module, state):
        notes.append(OUTDATED)
    return BlockReport(name, True, choice.name, "; ".join(notes), f"{problem}: {how}")


def _reads_old_weights(block: nn.Module, state: FusedState) -> bool:
    dtype = state.last_problem.dtype
    if isinstance(state, BlockState1d):
        return why_not_alike_1d(block, state) is None and reads_old_weights_1d(parts_1d(block, state.layout), dtype, state)
    assert isinstance(state, BlockState)
    parts = parts_of(block, state.layout)
    return why_not_read(parts) is None and reads_old_weights(parts, dtype, state)


def run_unnoticed(model: nn.Module, inputs: tuple[object, ...]) -> None:
    """Runs the model without gradients and leaves its buffers and the random state as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            model(*inputs)
        finally:
            for name, buffer in model.named_buffers():
                if not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
