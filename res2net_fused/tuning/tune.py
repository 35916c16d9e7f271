"""`tune(model, *inputs)`: measures every choice for every block of a model on this machine, and keeps the fastest right one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .._timing import measure
from ..backends import choices
from ..backends.choices import Problem
from ..backends.choices_file import OWN
from ..backends.measuring import Trial
from ..backends.selection import is_auto
from ..bench.progress import progress as progress_bar
from ..chain.problem import Chain1dProblem, ChainProblem
from ..modules.block_parts import parts_of
from ..modules.block_state import STATE, BlockState, FusedModule
from ..modules.eligibility import chain_problem, why_not_read
from ..modules.fused_forward1d import BlockState1d, parts_1d
from ..modules.measuring import bare_copy, measure_block
from ..modules.training import synchronises, uses_batch_statistics
from ..ops.measured_chain import measure_chain
from ..ops.packed_weights import one_operator
from ..patching.channels_last import convert, hand_on
from ..patching.explain import run_unnoticed
from .report import IN_CHANNELS_LAST, Settled, TunedCall, TuneReport

DETERMINISTIC = "torch.use_deterministic_algorithms is on: nothing is measured, since results of choices differ by rounding"
_LIMIT_S = 420.0  # for compiling, checking and timing one call on a GPU, or the whole model
_MODEL_SECONDS = 4.0  # for the whole model by all three choices


@dataclass
class _Call:
    """What one block was called with, by its copy in a model without hooks."""

    name: str
    block: nn.Module
    x: Tensor  # of which only the kind is kept: on the meta device
    device: torch.device
    passes: str
    problem: Problem


def tune(
    model: nn.Module, *example_inputs: Any, training: bool = False, minutes: float | None = None, progress: bool = True
) -> TuneReport:
    """Measures, for every block and shape that the example meets, every way to run it here, and takes the fastest from then on.

    Each way is first compared with float64 on random images; one that is wrong or raises is put aside. What is found is kept in
    the user's table (`RES2NET_FUSED_CHOICES`), for later processes too; calls that the table has are not measured again.

    model: one that `accelerate` or `rf.models` gave. It is copied: its own statistics, gradients, hooks and the random state
        are left as they are, and other threads may go on to call it.
    example_inputs: what it is called with, of the shapes and dtypes to tune for. Under autocast, call this under it too.
    training: whether forward and backward are measured together, in training mode; norms of a model in training mode that are
        frozen in eval mode stay so. Else inference in eval mode.
    minutes: after which no call is begun; the rest is in the report, and another `tune` goes on.
    progress: whether a bar or lines say how far it is.

    A model whose blocks meet images in NCHW is measured in channels-last as well. Its weights stay as they are; the report says
    what converting them gains.

    Returns a TuneReport, which prints as a table. Raises TypeError for what is no module, ValueError for a model without blocks
    that can run fused, and whatever the model's own forward raises. On a GPU, RuntimeError where a kernel leaves it unusable to
    this process: another process goes on behind that call.
    """
    return tune_within(_LIMIT_S, model, *example_inputs, training=training, minutes=minutes, progress=progress)


def tune_within(
    limit_s: float, model: nn.Module, *example_inputs: Any, training: bool, minutes: float | None, progress: bool
) -> TuneReport:
    """See `tune`. limit_s: seconds for one call on a GPU, after which a process that is supervised counts as hanging.

    Raises `turns.ContextLost` where the GPU is lost to this process.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; an nn.Module is needed")
    model, example_inputs = _unwrapped(model, example_inputs)
    if not any(isinstance(m, FusedModule) and STATE in vars(m) for m in model.modules()):
        raise ValueError("model has no block that can run fused: call accelerate(model) first, and see explain(model)")
    if torch.are_deterministic_algorithms_enabled():
        return TuneReport(notes=(DETERMINISTIC,))
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes is {minutes}; a positive number or None is needed")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with torch.inference_mode(False), torch.random.fork_rng(devices=_cuda_devices(model)):
        example_inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs)  # a forward may write to them
        left_out, bare = _without_hooks(model, training)
        calls = _seen_calls(bare, example_inputs, training, left_out)
        converted = _in_channels_last(bare, calls)
        if converted is not None:
            calls += _seen_calls(converted, example_inputs, training, left_out)
        kinds: dict[tuple[str, Problem], list[_Call]] = {}
        for call in calls:
            kinds.setdefault((call.passes, call.problem), []).append(call)
        found = []
        with progress_bar("tune", len(kinds), "kinds of calls") if progress else nullcontext() as bar:
            for same in kinds.values():
                late = end is not None and time.monotonic() > end
                found.append(_tuned(same, late, limit_s))
                if bar is not None:
                    bar.update()
        notes = [f"{name or '(model)'}: left as it is: {reason}" for name, reason in left_out.items()]
        model_ms = {}
        device = calls[0].device if calls else torch.device("cpu")  # without calls nothing of ours runs that could hang
        if end is None or time.monotonic() < end:
            try:
                with _marked(f"the whole model of {', '.join(call.call for call in found)}", device, limit_s):
                    try:
                        model_ms = _model_ms(bare, converted, example_inputs, training)
                    except torch.OutOfMemoryError:
                        notes.append("no memory is left to time the whole model")
            except Settled as error:
                notes.append(f"the whole model is not timed: {error}")
    return TuneReport(tuple(found), model_ms, tuple(notes))


def warm_up(model: nn.Module, *example_inputs: Any) -> None:
    """Runs the model once on example inputs, without gradients, so that what its first call costs is paid before serving.

    Weights are packed, kernels compiled, and GPU kernels compared with float64 for these shapes and dtypes. Buffers, mode and
    the random state are left as they were.
    """
    run_unnoticed(model, example_inputs)


# The copy, and what its blocks are called with -------------------------------------------------------------------------


def _without_hooks(model: nn.Module, training: bool) -> tuple[dict[str, str], nn.Module]:
    """Blocks that are left out, by name with the reason, and a copy of the model to measure on."""
    left_out = {}
    for name, block in model.named_modules():
        state = vars(block).get(STATE)
        if not isinstance(block, FusedModule) or state is None:
            continue
        if not is_auto(state.backend):
            left_out[name] = f"it is asked to run by backend={state.backend!r}"
        elif training and any(synchronises(m) for m in block.modules() if isinstance(m, nn.SyncBatchNorm)):
            left_out[name] = "its SyncBatchNorms take statistics over several processes, which must all choose alike"
    return left_out, _in_mode(bare_copy(model, kept=hand_on), training)


def _in_mode(model: nn.Module, training: bool) -> nn.Module:
    """Puts it in eval mode; or in training mode, where frozen norms of the model stay so and nothing is dropped at random."""
    if not training:
        return model.eval()
    modes = {m: m.training for m in model.modules()} if model.training else {}
    for module in model.train().modules():
        module.training = modes.get(module, True) and "drop" not in type(module).__name__.lower()
    return model


def _seen_calls(model: nn.Module, inputs: tuple[Any, ...], training: bool, left_out: dict[str, str]) -> list[_Call]:
    """Runs the copy once and looks at what its blocks are called with. Adds to `left_out` what cannot run fused."""
    found: list[_Call] = []
    with _watched(model, left_out, training, found), torch.no_grad(), choices.pinned(OWN):
        model(*inputs)
    return found


def _in_channels_last(model: nn.Module, calls: Sequence[_Call]) -> nn.Module | None:
    """A copy with its convolutions' weights in channels-last, where that changes what its blocks are called with."""
    if all(isinstance(call.problem, Chain1dProblem) or call.problem.channels_last for call in calls):
        return None
    converted = copy.deepcopy(model)
    convert(converted, torch.channels_last)
    return converted


@contextmanager
def _watched(model: nn.Module, left_out: dict[str, str], training: bool, found: list[_Call]) -> Iterator[None]:
    handles = []
    for name, block in model.named_modules():
        if isinstance(block, FusedModule) and STATE in vars(block) and name not in left_out:
            noting = _noting(name, training, left_out, found)
            handles.append(block.register_forward_pre_hook(noting, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(name: str, training: bool, left_out: dict[str, str], found: list[_Call]) -> Callable[..., None]:
    def note(block: nn.Module, inputs: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        x = next(iter((*inputs, *by_name.values())), None)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            left_out[name] = "it is not called with a tensor alone"
            return
        state = vars(block)[STATE]
        problem: Problem
        if isinstance(state, BlockState1d):
            problem, trained = parts_1d(block, state.layout).problem(x, state.config), False
        else:
            assert isinstance(state, BlockState)
            parts = parts_of(block, state.layout)
            reason = why_not_read(parts)
            if reason is not None:
                left_out[name] = reason
                return
            trained = any(map(uses_batch_statistics, parts.bns))
            problem = chain_problem(parts, x, state, trained)
        passes = "training" if trained else "gradients" if training else "inference"
        found.append(_Call(name, block, torch.empty_like(x, device="meta"), x.device, passes, problem))

    return note


# Measuring ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _marked(what: str, device: torch.device, limit_s: float) -> Iterator[Any]:
    """On a GPU the record in which it is marked; else None. Raises Settled."""
    if device.type != "cuda":
        yield None
        return
    from .marked import marked  # by what does not exist on Windows

    with marked(what, device, limit_s) as record:
        yield record


def _tuned(same: list[_Call], late: bool, limit_s: float) -> TunedCall:
    first = same[0]
    names = tuple(dict.fromkeys(call.name for call in same))
    what = f"{first.passes} {first.problem}"
    if choices.is_known(first.passes, first.problem):
        known = choices.lookup(first.passes, first.problem)
        if known is not None and known.row is not None:
            row = known.row
            return TunedCall(names, what, row.choice, row.ms, row.errors, ("measured before",))
    if late:
        return TunedCall(names, what, notes=("no time was left",))
    try:
        with _marked(f"a call of {what}", first.device, limit_s) as record:
            return _measured(same, TunedCall(names, what), record, limit_s)
    except Settled as error:
        return TunedCall(names, what, notes=(str(error),))


def _measured(same: list[_Call], found: TunedCall, record: Any, limit_s: float) -> TunedCall:
    """record: of `marked.py` on a GPU."""
    first, notes = same[0], list[str]()
    if record is not None:
        from .tiles import tune_tiles

        notes += tune_tiles(first.block, first.problem, first.passes, record)
        record.mark(*record.running, limit_s=limit_s)
    for call in same:  # one of them may run its own forward alone
        try:
            _measure_chain_inside(call)
            measured = measure_block(call.block, _like(call), call.passes, call.problem)
        except Exception as error:  # a module that cannot be copied or run by itself, no memory
            notes.append(f"it cannot be measured: {type(error).__name__}: {error!s:.200}")
            continue
        notes += [f"{name}: {why}" for name, why in measured.failures.items()]
        row = measured.row
        if row is not None:
            return replace(found, choice=row.choice, ms=row.ms, errors=row.errors, notes=tuple(dict.fromkeys(notes)))
    return replace(found, notes=tuple(dict.fromkeys(notes)))


def _like(call: _Call) -> Tensor:
    x = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.device)
    last = x.dim() == 4 and call.x.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _measure_chain_inside(call: _Call) -> None:
    """Measures the chain of a block that is not one operator, for which a backend is chosen by itself."""
    state = vars(call.block)[STATE]
    if not isinstance(state, BlockState) or one_operator(state.config) or call.passes != "inference":
        return
    assert isinstance(call.problem, ChainProblem)
    alone = replace(call.problem, around=None)
    if not choices.is_known("inference", alone):
        weights = [conv.weight.to(alone.dtype) for conv in parts_of(call.block, state.layout).convs]
        measure_chain(alone, weights, None)


# By what a whole model is measured with: its blocks' own forwards, what is predicted, what was measured.
_WHOLE = {"own": OWN, "predicted": "", "tuned": None}


def _model_ms(model: nn.Module, converted: nn.Module | None, inputs: tuple[Any, ...], training: bool) -> dict[str, float]:
    """Milliseconds of the whole model, by each of `_WHOLE`, and of what `_in_channels_last` returned."""
    trials = {name: Trial(choice, _model_call(copy.deepcopy(model), inputs, training)) for name, choice in _WHOLE.items()}
    if converted is not None:
        trials[IN_CHANNELS_LAST] = Trial(None, _model_call(converted, inputs, training))
    device = str(next((p.device for p in model.parameters()), torch.device("cpu")))
    timings = measure(trials, device, seconds=_MODEL_SECONDS, min_repeats=3, max_repeats=30, warm_up=1, peaks=False)
    return {name: float(f"{timing.median_ms:.4g}") for name, timing in timings.items()}


def _model_call(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> Callable[[], Sequence[Tensor]]:
    """Forward, and in training backward from the sum of all outputs."""

    def call() -> Sequence[Tensor]:
        with torch.set_grad_enabled(training):
            outputs = [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
            if training:
                model.zero_grad(set_to_none=True)
                differentiable = [t.float().sum() for t in outputs if t.requires_grad]
                if differentiable:
                    torch.stack(differentiable).sum().backward()
        return outputs

    return call


def _unwrapped(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module inside wrappers of PyTorch's, of data parallelism and what torch.compile returns, and what it is called with
    on its first device: they take tensors of any device, and DataParallel shares out the batch."""
    while True:
        if isinstance(model, nn.DataParallel):
            if model.device_ids:
                inputs = model.scatter(inputs, {}, model.device_ids)[0][0]
            model = model.module
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            if model.device_ids:
                device = torch.device(model.device_type, model.device_ids[0])
                inputs = tree_map_only(Tensor, methodcaller("to", device), inputs)
            model = model.module
        else:
            compiled = vars(model).get("_modules", {}).get("_orig_mod")
            if compiled is None:
                return model, inputs
            model = compiled


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
