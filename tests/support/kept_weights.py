"""A block in float64, its own forward beside it, and the tensors that it keeps from call to call."""

import torch
from helpers import assert_close, randomize

from res2net_fused import Bottle2neck
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.modules.weight_cache import CacheKey


def make(stype="normal", **keywords):
    """In float64 a stale value cannot hide behind rounding."""
    return randomize(Bottle2neck(32, 8, stype=stype, **keywords).double()).eval()


X = torch.randn(2, 32, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def own_forward(block, x=X):
    with torch.no_grad():
        return ReferenceBottle2neck.forward(block, x)


def fused(block, x=X):
    with torch.no_grad():
        return block(x)


def assert_current(block):
    assert_close(fused(block), own_forward(block), 1e-12)


def kept_tensors(block):
    """Tensors reachable from the block's state, but for those that it compares with its own."""
    state = vars(block)[STATE]
    found = []

    def visit(value):
        if isinstance(value, CacheKey):
            return
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(vars(state))
    return found
