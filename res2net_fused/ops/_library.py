"""What the operators share: the library, pieces of schemas, gradients, autocast, FLOPs, checks."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from .._native import library as _native_library
from ..backends.selection import get_backend
from ..chain.config import ChainConfig
from ..chain.memory_format import in_format_of, memory_format

SETTINGS = "int stride, int dilation, int groups, bool hierarchical, str passthrough, str? pool, str activation"
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("res2net_fused", "DEF")  # of all operators
# Those with native bodies, by name. The native library, where there is one, has defined them by the same file.
SCHEMAS = {
    text.partition("(")[0]: text
    for text in re.findall(r'R"\((.*?)\)"', files(__package__).joinpath("schemas.inc").read_text(), re.S)
}
_native_library.ops_library()
for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.res2net_fused, _name):
        library.define(_schema, tags=TAGS)

cached_config = functools.lru_cache(ChainConfig)


# Native bodies --------------------------------------------------------------------------------------------------------


class _Refusal(threading.local):
    """What Python last refused to a native body, whose caller gets it: from C++ an exception comes as its text alone."""

    error: BaseException | None = None

    @staticmethod
    def text_of(error: BaseException) -> str:
        return f"{type(error).__name__}: {error}"

    def taken(self, text: str) -> BaseException | None:
        error, self.error = self.error, None
        return error if error is not None and self.text_of(error) == text else None


_refusal = _Refusal()
_asked = torch.library.Library("res2net_fused_python", "DEF")  # what csrc/operators/decisions.cpp calls


def register_kernel(
    name: str, chosen: Callable[..., tuple[Any, str]], run: Callable[..., Any], packed_for: Callable[..., str] = lambda *_: ""
) -> None:
    """Makes Python the kernel of the operator `name` on every device, and the one whom its native bodies ask.

    chosen: (*arguments) -> the problem and the name of its backend, or raises. run: (problem, backend's name, *arguments) ->
    what the operator returns. packed_for: (*arguments) -> the backend in whose layout weights are given, or "".
    """

    def kernel(*arguments: Any) -> Any:
        return run(*chosen(*arguments), *arguments)

    def answer(*arguments: Any) -> Sequence[Tensor]:
        say = torch.ops.res2net_fused_native.say
        try:
            problem, backend = chosen(*arguments)
            own = get_backend(backend)
            packed = packed_for(*arguments) == backend
            settings = own.native_settings(problem, arguments[0], packed) if problem.batch else None
            if settings is not None:
                say(backend, settings, "")
                return []
            out = run(problem, backend, *arguments)
            return [out] if isinstance(out, Tensor) else out
        except BaseException as error:
            _refusal.error = error
            say("", [], _refusal.text_of(error))
            return []

    packet = getattr(torch.ops.res2net_fused, name)
    for callee in (packet, packet.default):
        callee._op = _called(name, callee._op)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    _asked.define(f"{SCHEMAS[name].rpartition('->')[0]}-> Tensor[]")
    _asked.impl(name, answer, "CompositeExplicitAutograd")


def _called(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, PyTorch's of the operator `name`, that raises what Python refused and spares calls gradients' kernel if it can.

    That one is Python and hands all arguments on. Under a transform or a mode nothing is spared: who traces sees every kernel.
    Tangents are refused here because a native body cannot see them.
    """
    below_autograd = torch._C._AutoDispatchBelowAutograd
    modes, transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack

    def called(*arguments: Any, **keywords: Any) -> Any:
        try:
            if modes() or transforms() is not None:
                return call(*arguments, **keywords)
            if forward_mode():
                refuse_tangents(name, *arguments, *keywords.values())
            if torch.is_grad_enabled() and any(map(_requires_grad, (*arguments, *keywords.values()))):
                return call(*arguments, **keywords)
            with below_autograd():
                return call(*arguments, **keywords)
        except RuntimeError as error:
            refused = _refusal.taken(str(error))
            if refused is None:
                raise
        raise refused

    return called


def _requires_grad(argument: Any) -> bool:
    """Whether a tensor in it may; what is neither tensor, list nor setting is left to PyTorch."""
    if isinstance(argument, Tensor):
        return argument.requires_grad
    if argument is None or isinstance(argument, (str, int)):
        return False
    return any(map(_requires_grad, argument)) if isinstance(argument, (list, tuple)) else True


def answer_native_bodies() -> None:
    """Tells the native bodies, once all operators are registered, that Python is there to be asked."""
    native = torch.ops.res2net_fused_native
    if hasattr(native, "answer_by_python"):
        native.answer_by_python(True)


def kernel_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes a function the kernel of the operator `name` on every device."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        library.impl(name, kernel, "CompositeExplicitAutograd")
        return kernel

    return register


# Gradients --------------------------------------------------------------------------------------------------------------


def register_backward(
    name: str,
    kernel: Callable[..., Sequence[Any]],
    differentiable: Callable[..., Sequence[Any] | None],
    like: Sequence[int],
    kept: Callable[[Sequence[Any], Any], tuple[Sequence[Tensor | Sequence[Tensor] | None], Sequence[object]]],
) -> None:
    """Registers the gradients of the operator `name`, whose first arguments are x and lists of tensors, or None for a list.

    They come from `<name>_backward(grad, *tensors, *settings, needed)`, of which only the schema is defined elsewhere.
    kernel: what that computes, a gradient of x and a list for each list, in any format; of those not `needed` anything.
    differentiable: the same by PyTorch's operators, for second derivatives and batched gradients, or None where it has none.
    like: the places, among its arguments, of the tensors that have the shapes and dtypes of these gradients.
    kept: (inputs, output) of `name` -> the tensors and the settings of the backward operator.
    """

    def flat(found: Sequence[Any], arguments: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for i, values in _wanted(arguments, like):
            for gradient, value in zip([found[i]] if i == 0 else found[i], values, strict=True):
                yield gradient.to(value.dtype), value

    def run(*arguments: Any) -> list[Tensor]:
        return [in_format_of(*pair) for pair in flat(kernel(*arguments), arguments)]

    def run_differentiable(*arguments: Any) -> list[Tensor] | None:
        with torch._C._DisableAutocast():  # the tensors have been cast
            found = differentiable(*arguments)
            return None if found is None else [gradient for gradient, _ in flat(found, arguments)]

    def run_transformed(*arguments: Any) -> list[Tensor]:
        found = run_differentiable(*arguments)
        if found is None:
            raise no_derivative(name, SEVERAL_PROCESSES)
        return found

    def fake(*arguments: Any) -> list[Tensor]:
        return [
            torch.empty(value.shape, dtype=value.dtype, device=value.device, memory_format=memory_format(value))
            for _, values in _wanted(arguments, like)
            for value in values
        ]

    def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        tensors, ctx.settings = kept(inputs, output)
        ctx.lengths = [None if t is None else len(t) for t in inputs[1 : len(like)]]
        ctx.sizes = [None if t is None else -1 if isinstance(t, Tensor) else len(t) for t in tensors]
        if not isinstance(output, Tensor):
            ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*itertools.chain.from_iterable([t] if isinstance(t, Tensor) else t or () for t in tensors))

    def backward(ctx: Any, grad: Any) -> tuple[object, ...]:
        grad = grad if grad is None or isinstance(grad, Tensor) else grad[0]
        results: list[object] = [None, *(None if length is None else [None] * length for length in ctx.lengths)]
        if grad is not None:
            saved = iter(ctx.saved_tensors)
            tensors = [
                None if size is None else next(saved) if size < 0 else list(itertools.islice(saved, size)) for size in ctx.sizes
            ]
            needed = [needs if isinstance(needs, bool) else any(needs) for needs in ctx.needs_input_grad[: len(like)]]
            needed[1:] = [needs and length is not None for needs, length in zip(needed[1:], ctx.lengths, strict=True)]
            arguments = (grad, *tensors, *ctx.settings, needed)
            again = torch.is_grad_enabled()  # create_graph=True: what is computed now is differentiated again
            gradients = run_differentiable(*arguments) if again else None
            if gradients is None:
                gradients = getattr(torch.ops.res2net_fused, f"{name}_backward").default(*arguments)
            found = iter(gradients)
            results[0] = next(found) if needed[0] else None
            for i, length in enumerate(ctx.lengths, start=1):
                if needed[i]:
                    results[i] = list(itertools.islice(found, length))
        given = len(ctx.needs_input_grad)  # of the operator's arguments: without those that are their defaults
        return *results, *[None] * (given - len(results))

    def refuse(ctx: Any, *grads: Any) -> None:
        raise no_derivative(name, "has no second derivative")

    library.impl(f"{name}_backward", run, "CompositeExplicitAutograd")
    for key in (_TRANSFORMS, _BATCHED_GRADIENTS):
        library.impl(f"{name}_backward", run_transformed, key)
    torch.library.register_fake(f"res2net_fused::{name}_backward", fake, lib=library)
    torch.library.register_autograd(f"res2net_fused::{name}", backward, setup_context=save, lib=library)
    torch.library.register_autograd(f"res2net_fused::{name}_backward", refuse, lib=library)


def _wanted(arguments: Sequence[Any], like: Sequence[int]) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """The tensors whose gradients are needed, x in a list of its own, each list with its place in `like`."""
    for i, (needs, place) in enumerate(zip(arguments[-1], like, strict=True)):
        if needs and arguments[place] is not None:
            yield i, [arguments[place]] if i == 0 else arguments[place]


# torch.func and forward mode --------------------------------------------------------------------------------------------

SEVERAL_PROCESSES = "has no rule for torch.func, forward mode and batched gradients over several processes"

_TRANSFORMS: Any = "FuncTorchDynamicLayerFrontMode"  # the key of every call under a transform of torch.func, and of no other
_BATCHED_GRADIENTS: Any = "Batched"  # the key of is_grads_batched=True inside the autograd engine


def register_transforms(name: str, differentiable: Callable[..., Any], folds: bool) -> None:
    """Makes `name` run, under the transforms of torch.func, as `differentiable`: the same by PyTorch's operators.

    folds: whether the images of a batch are computed each for itself. Then vmap over x alone makes them one larger batch, on
    which the operator runs.
    """
    operator = getattr(torch.ops.res2net_fused, name).default
    by_rule = torch.library.get_kernel(operator, _TRANSFORMS)  # PyTorch's own, which asks for the rule of the transform

    def transformed(keyset: Any, *arguments: Any) -> Any:
        alone = folds and _vmaps_x_alone(arguments[1:])
        return by_rule.call_boxed(keyset, *arguments) if alone else differentiable(*arguments)

    def vmapped(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[Any, Any]:
        batched = x.movedim(in_dims[0], 0)
        found = operator(batched.flatten(0, 1), *rest)
        outputs = [out.unflatten(0, batched.shape[:2]) for out in ([found] if isinstance(found, Tensor) else found)]
        return (outputs[0], 0) if isinstance(found, Tensor) else (outputs, [0] * len(outputs))

    library.impl(name, transformed, _TRANSFORMS, with_keyset=True)
    if folds:
        torch.library.register_vmap(operator, vmapped, lib=library)


def _vmaps_x_alone(others: Sequence[Any]) -> bool:
    functorch = torch._C._functorch
    if forward_mode() or any(level.key() != functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ()):
        return False
    return not any(isinstance(t, Tensor) and functorch.is_batchedtensor(t) for t in tree_leaves(others))


def forward_mode() -> bool:
    """Whether tensors may have tangents, which torch.library has no rules for and would lose in silence."""
    return torch.autograd.forward_ad._current_level >= 0


def refuse_tangents(name: str, *arguments: Any) -> None:
    """Raises NotImplementedError, naming the operator, where a tensor that reached its kernel has a tangent."""
    unpack = torch.autograd.forward_ad.unpack_dual
    if forward_mode() and any(isinstance(t, Tensor) and unpack(t).tangent is not None for t in tree_leaves(arguments)):
        raise no_derivative(name, "has no forward-mode derivative")


def config_for(x: Tensor, chain: Sequence[Any]) -> ChainConfig:
    """The chain's settings for x (N, C, H, W), of which nothing is asked that it does not know inside vmap."""
    config, size = cached_config(*chain), x.shape[2:]
    return config.clamped_to(max(size)) if all(type(n) is int for n in size) else config


def no_derivative(name: str, lack: str) -> NotImplementedError:
    return NotImplementedError(f"{name} {lack}; res2net_fused.chain.reference, or rf.restore(model), computes it")


# Autocast and FLOPs -----------------------------------------------------------------------------------------------------

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def cast_convolution(dtype: torch.dtype, x: Tensor, weights: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    """Under autocast, x and the convolution weights in `dtype`; all else stays as it is, BatchNorm's parameters too."""
    return x.to(dtype), [weight.to(dtype) for weight in weights], *rest


def register_autocast(name: str, cast: Callable[..., tuple[object, ...]] = cast_convolution) -> None:
    """Makes `name` run, under autocast, with the arguments that `cast(dtype, *arguments)` returns.

    As for ATen's convolutions, nothing is cast where x or a weight, the first two arguments, is fp64 or no floating-point
    tensor.
    """
    operator = getattr(torch.ops.res2net_fused, name).default

    def kernel_for(device_type: str, key: str) -> Callable[..., object]:
        def kernel(*arguments):
            x, weights, *_ = arguments
            if not any(t.dtype == torch.float64 or not t.is_floating_point() for t in (x, *weights)):
                arguments = cast(torch.get_autocast_dtype(device_type), *arguments)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return operator(*arguments)

        return kernel

    for device_type, key in _AUTOCAST_KEYS.items():
        library.impl(name, kernel_for(device_type, key), key)


def register_flops(name: str, weights: int, kept: int | None = None) -> None:
    """Registers the FLOPs of the operator `name` and of its backward.

    weights: their place in the backward operator's arguments. kept: that of outputs which it convolves again if there are none.
    """

    def forward(x_shape: Any, weight_shapes: Any, *rest: Any, out_shape: Any = None, **keywords: Any) -> int:
        return convolution_flops(weight_shapes, out_shape if isinstance(out_shape[0], int) else out_shape[0])

    def backward(grad_shape: Any, *rest: Any, out_shape: Any = None, **keywords: Any) -> int:
        need_x, need_weights, *_ = rest[-1]
        again = kept is not None and not rest[kept - 1]
        return (need_x + need_weights + again) * convolution_flops(rest[weights - 1], grad_shape)

    register_flop_formula(getattr(torch.ops.res2net_fused, name))(forward)
    register_flop_formula(getattr(torch.ops.res2net_fused, f"{name}_backward"))(backward)


def convolution_flops(weight_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]) -> int:
    """Multiplications and additions of convolutions by weight_shapes, all (w, w/groups, *kernel), to (N, C, *size)."""
    batch, _, *size = out_shape
    return 2 * batch * math.prod(size) * len(weight_shapes) * math.prod(weight_shapes[0])


# Decompositions ---------------------------------------------------------------------------------------------------------

_decompositions: dict[Any, Callable[..., Any]] = {}


def register_decomposition(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes `kernel`, by PyTorch's operators, what `name` decomposes into for who asks; the ONNX exporter does.

    It writes nothing in place, which decomposed graphs may not. With an entry among the meta functions, fake tensors of
    symbolic sizes go on to take `fake`.
    """
    operator = getattr(torch.ops.res2net_fused, name).default
    torch._decomp.register_decomposition(operator)(kernel)
    torch._decomp.register_decomposition(operator, type="meta")(fake)
    _decompositions[operator] = kernel


def fake_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes a function the fake of the operator `name`, which every compiler calls first."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def told(*arguments: Any) -> Any:
            _keep_in_inductor(getattr(torch.ops.res2net_fused, name).default)
            return fake(*arguments)

        torch.library.register_fake(f"res2net_fused::{name}", told, lib=library)
        return told

    return register


def _keep_in_inductor(operator: Any) -> None:
    """Tells Inductor that it calls the operator, as it would by itself: where CI is set it refuses one with a decomposition."""
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    layout_of = getattr(lowering, "tag_to_layout_constraint", None)  # None: while it is imported
    if layout_of is not None and operator not in lowering.lowerings:
        lowering.make_fallback(operator, layout_of(torch.Tag.needs_exact_strides), warn=False)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What the fused operators are in PyTorch's own, for `exported_program.run_decompositions`.

    A program of torch.export keeps the fused operators. `program.run_decompositions(decompositions())` gives one without them,
    for runtimes where this package is not installed. To decompose PyTorch's operators as well, update
    `torch.export.default_decompositions()` by what this returns.
    """
    return dict(_decompositions)


# Checks -----------------------------------------------------------------------------------------------------------------


def needed_only(gradients: Sequence[Any], needed: Sequence[bool]) -> list[Tensor]:
    """The gradients that are asked for, in one list. gradients: of x, None where it is not asked for, then lists of tensors."""
    of_x, *others = gradients
    lists = zip(needed[1:], others, strict=True)
    return [*([] if of_x is None else [of_x]), *(t for wanted, tensors in lists if wanted for t in tensors)]


def check_devices(x: Tensor, **others: Tensor | Sequence[Tensor] | None) -> None:
    """Raises ValueError, with the argument's name, where one of the `others` is not on x's device."""
    allowed = {x.device}
    for name, value in others.items():
        if value is None:
            continue
        tensors = (value,) if isinstance(value, Tensor) else value
        if not allowed.issuperset(map(_device_of, tensors)):
            i = next(i for i, tensor in enumerate(tensors) if tensor.device != x.device)
            name = name if isinstance(value, Tensor) else f"{name}[{i}]"
            raise ValueError(f"{name} is on {tensors[i].device} but x is on {x.device}; both must be on one device")


_device_of = operator.attrgetter("device")
