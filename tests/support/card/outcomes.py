"""What a backend's calls give on the stand-in card, where nobody runs the kernels: PyTorch's own operators' results.

The package's functions run as ever, down to their launches. What they return is then overwritten with the reference's result,
computed in float32 on the same memory, so that a result that nobody wrote shows as NaN where this module is switched off.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import faults
from .cards import Card
from .cuda_module import Device
from .triton_driver import LAUNCHES

if TYPE_CHECKING:
    from . import Settings

PACKAGE = "res2net_fused"


def insert(device: Device, card: Card, settings: Settings) -> None:
    """Prepares what happens to modules of the package when they are imported."""
    planted = faults.read()
    LAUNCHES.planted = planted.at_kernel
    changes: dict[str, Callable[[Any], None]] = {
        f"{PACKAGE}._native.library": lambda m: _use_library(m, device, card, settings)
    }
    for name in ("triton", "cuda"):
        changes[f"{PACKAGE}.backends.{name}"] = functools.partial(_answer, name, settings, planted)
    if settings.launch == "nothing":  # whose results are never right
        changes[f"{PACKAGE}.backends.verification"] = lambda m: setattr(m, "_suspended", True)
    if settings.batch > 1:
        from . import cuts

        for name, change in cuts.changes(settings.batch).items():
            changes[name] = _both(changes.get(name), change)
    sys.meta_path.insert(0, _Changed(changes))


class _Changed(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as it has been imported."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            change, execute = self.changes[name], spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _both(first: Callable[[Any], None] | None, second: Callable[[Any], None]) -> Callable[[Any], None]:
    def both(module: Any) -> None:
        if first is not None:
            first(module)
        second(module)

    return both


def _use_library(native: Any, device: Device, card: Card, settings: Settings) -> None:
    """The package's libraries, with the CUDA one over the stub of the runtime in place of the real one."""
    own = native._installed
    record = own.record()
    folder = Path(device.c._name).with_suffix(f".{settings.card}{'' if settings.cuda_library else '-no-cuda'}")
    part = {"built": False, "file": native.build_flags.CUDA_LIBRARY, "size": None, "reason": "not wanted on this card"}
    if settings.cuda_library:
        from . import BUILD, cuda_library

        built = cuda_library.build(BUILD / "cuda_library")
        runtime = cuda_library.runtime(built)
        runtime.set_cards([card.limits] * settings.count)
        runtime.execute(settings.launch == "interpreter")
        part = {**part, "built": True, "size": built.stat().st_size, "reason": ""}
        _link(folder / native.build_flags.CUDA_LIBRARY, built)
    for name in (native.build_flags.CPU_LIBRARY, native.build_flags.OPS_LIBRARY):
        _link(folder / name, own._package_dir / name)
    record["parts"]["cuda"] = part
    record["info"] = {**record["info"], "cuda_version": "13.0.88"}
    target = folder / native.build_flags.BUILD_RECORD
    fresh = target.with_suffix(".new")
    fresh.write_text(json.dumps(record))
    fresh.replace(target)
    native._installed = native.NativeLibraries(folder)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.resolve() != target.resolve():
        path.unlink(missing_ok=True)
        path.symlink_to(target)


# Results --------------------------------------------------------------------------------------------------------------


def _answer(name: str, settings: Settings, planted: faults.Faults, module: Any) -> None:
    """Wraps the calls that one backend runs itself, and not those that it inherits."""
    backend = module.BACKEND
    answers = _ANSWERS if settings.launch == "reference" else {}
    if answers:  # which native bodies would not get
        backend.native_settings = lambda *call: None
    for call in ("forward", "block_forward", "train_forward", "train_backward", "chain_backward"):
        if call in vars(type(backend)):
            setattr(backend, call, _wrapped(getattr(backend, call), name, call, answers.get(call), planted))


def _wrapped(own: Any, name: str, call: str, answer: Any, planted: faults.Faults) -> Any:
    @functools.wraps(own)
    def answered(*args: Any, **options: Any) -> Any:
        problem = next(a for a in args if type(a).__name__ == "ChainProblem")
        with planted.around(name, call, problem) as wrong:
            result = own(*args, **options)
            if answer is not None:
                answer(result, *args, **options)
            if wrong:
                (result if call in ("forward", "block_forward") else result[0]).mul_(1.5)
        return result

    return answered


def _forward(out: Any, problem: Any, x: Any, weights: Any, biases: Any, packed: Any) -> None:
    """Rounded where kernels round: each y and each u = x + y to the dtype, and float32 factors to TF32 if that is allowed."""
    import torch
    import torch.nn.functional as F

    from res2net_fused.backends.triton.availability import uses_tf32
    from res2net_fused.backends.triton.tf32 import round_to_tf32
    from res2net_fused.chain import reference

    c, tf32 = problem.config, x.itemsize == 4 and uses_tf32(problem)

    def rounded(t: Any) -> Any:
        return t.to(x.dtype).float()

    def convolution(k: int, u: Any) -> Any:
        u, weight = rounded(u), weights[k].float()
        if tf32:
            u, weight = round_to_tf32(u), round_to_tf32(weight)
        y = F.conv2d(u, weight, None if biases is None else biases[k].float(), c.stride, c.dilation, c.dilation, c.groups)
        return rounded(reference.activate(y, c.activation))

    if out.numel():
        # In one layout, as kernels read it: oneDNN sums in another order where the layout is another.
        groups = list(x.float().contiguous(memory_format=torch.channels_last).split(problem.width, 1))
        if c.passthrough == "first_added":  # what is added is what passes, rounded
            groups[0], c = rounded(reference.pool_passthrough(groups[0], c)), dataclasses.replace(c, pool=None)
        out.copy_(torch.cat(reference.hierarchical_chain(groups, convolution, c), 1))


def _block(out: Any, problem: Any, x: Any, shortcut: Any, folded: Any, relu: bool) -> None:
    import torch.nn.functional as F

    from res2net_fused.chain import reference

    u = F.conv2d(x.float(), folded.conv1_weight.float(), folded.conv1_bias.float()).relu_()
    y = reference.hierarchical_conv2d(
        u, [w.float() for w in folded.weights], [b.float() for b in folded.biases], problem.config
    )
    y = F.conv2d(y, folded.conv3_weight.float(), folded.conv3_bias.float())
    y = y if shortcut is None else y + shortcut.float()
    out.copy_(y.relu_() if relu else y)


def _copy(into: Any, other: Any) -> None:
    import torch

    if isinstance(into, torch.Tensor):
        into.copy_(other)
    elif into is not None:
        for a, b in zip(into, other, strict=True):
            _copy(a, b)


def _train_forward(result: Any, *args: Any, **options: Any) -> None:
    from res2net_fused.backends.selection import get_backend
    from res2net_fused.chain import batch_norm

    out, statistics, z = result
    other, other_statistics, other_z = batch_norm.train_forward(get_backend("reference"), *args, **options)
    _copy((out, *vars(statistics).values()), (other, *vars(other_statistics).values()))
    _copy(z, other_z if z else [])


def _train_backward(
    result: Any, problem: Any, grad: Any, x: Any, out: Any, z: Any, mean: Any, invstd: Any, weights: Any,
    gammas: Any, needed: Any, group: str = "",
) -> None:  # fmt: skip
    from res2net_fused.backends.selection import get_backend
    from res2net_fused.chain import batch_norm

    reference, eps = get_backend("reference"), [1e-5] * problem.steps  # which the saved statistics hold already
    arguments = grad, x, out, z, mean, invstd, weights, gammas, eps, needed, group
    _copy_needed(result, batch_norm.train_backward(reference, problem, *arguments), needed)


def _chain_backward(result: Any, problem: Any, grad: Any, x: Any, out: Any, weights: Any, needed: Any) -> None:
    from res2net_fused.chain import backward

    _copy_needed(result, backward.chain_backward(grad, x, out, weights, problem.config, needed), needed)


def _copy_needed(result: Any, other: Any, needed: Any) -> None:
    for mine, theirs, wanted in zip(result, other, (*needed, *needed[-1:]), strict=False):
        if wanted:
            _copy(mine, theirs)


def _rows(result: Any, problem: Any, x: Any, weights: Any, biases: Any, scale: Any, shift: Any, keep: bool) -> None:
    from res2net_fused.chain import reference

    out, kept = result
    _copy((out, kept), reference.hierarchical_conv1d(x, weights, biases, scale, shift, problem.config, keep))


_ANSWERS: dict[str, Any] = {
    "forward": _forward, "block_forward": _block, "train_forward": _train_forward, "train_backward": _train_backward,
    "chain_backward": _chain_backward,
}  # fmt: skip
