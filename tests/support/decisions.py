"""What a pass through a network decides, ReLU's masks and max-pool's places, and a float64 pass that decides alike.

Rounding may turn the sign of a value near zero; a gradient then differs by a whole pixel's share, which says nothing about the
arithmetic. With the decisions given, a gradient is a smooth function of weights and images.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from res2net_fused.modules import fused_forward, training
from res2net_fused.patching.accelerate import fused_blocks

Decisions = dict[str, list[Tensor]]  # by the name of a ReLU or max-pool: what each of its calls decided


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[Decisions]:
    """The decisions of one pass within, with gradients on; those of fused blocks are read off their operator's x and result."""
    decisions: Decisions = defaultdict(list)
    blocks = dict(fused_blocks(model))
    chain: list[Tensor] = []  # the masks of the block that is running

    def watched(operator: Callable) -> Callable:
        def call(x, weights, *arguments, **settings):
            result = operator(x, weights, *arguments, **settings)
            groups = getattr(result, "out", result).split(weights[0].shape[0], 1)
            chain.extend(t > 0 for t in (x, *groups[: len(weights)]))  # the last group passes
            return result

        return call

    def hook_of(name: str, module: nn.Module) -> Callable | None:
        def block(_module, _arguments, out):
            decisions[f"{name}.relu"].extend([*chain, out > 0])
            chain.clear()

        def relu(_module, _arguments, out):
            decisions[name].append(out > 0)

        def pool(module, arguments, _out):
            window = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
            decisions[name].append(F.max_pool2d(*arguments, *window, return_indices=True)[1])

        if name in blocks:
            return block
        if isinstance(module, nn.ReLU):  # a hook inside a fused block would make it run its own forward
            return None if any(name.startswith(f"{fused}.") for fused in blocks) else relu
        return pool if isinstance(module, nn.MaxPool2d) else None

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if (hook := hook_of(name, module)) is not None:
                stack.callback(module.register_forward_hook(hook).remove)
        for place, operator in ((training, "hierarchical_conv_bn"), (fused_forward, "hierarchical_conv2d")):
            stack.enter_context(mock.patch.object(place, operator, watched(getattr(place, operator))))
        yield decisions


class _Decided(nn.Module):
    """A ReLU or max-pool that does what another one did."""

    def __init__(self, calls: list[Tensor]) -> None:
        super().__init__()
        self.calls = list(calls)

    def forward(self, x: Tensor) -> Tensor:
        call = self.calls.pop(0)
        return x * call if call.dtype == torch.bool else x.flatten(2).gather(2, call.flatten(2)).view(call.shape)


def deciding_alike(model: nn.Module, decisions: Decisions) -> nn.Module:
    """A float64 copy of a model of plain PyTorch, for one pass with these decisions."""
    twin = copy.deepcopy(model).double()
    for name, calls in decisions.items():
        twin.set_submodule(name, _Decided(calls))
    return twin


def differences(one: Decisions, other: Decisions) -> int:
    """How many values the two decided differently about."""
    pairs = [pair for name in one.keys() | other.keys() for pair in zip(one[name], other[name], strict=True)]
    return sum(int((a != b).sum()) for a, b in pairs)
