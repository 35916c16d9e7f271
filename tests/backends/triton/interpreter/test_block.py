"""The whole block on Triton against the reference block in float64, in its padded inner layout."""

import copy

import pytest
import torch
from torch import nn
from triton_cases import BLOCKS, make_block

from res2net_fused import Bottle2neck
from res2net_fused.backends.triton import block as triton_block
from res2net_fused.backends.triton import launch
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

BOUND = {torch.float32: 5e-6, torch.float16: 2e-3}


def in_float64(block: Bottle2neck, x: torch.Tensor) -> torch.Tensor:
    return ReferenceBottle2neck.forward(copy.deepcopy(block).double(), x.double())


@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_block(name: str, dtype: torch.dtype, poisoned_memory) -> None:
    torch.manual_seed(3)
    block = make_block(name, dtype)
    x = torch.randn(2, block.conv1.in_channels, 5, 3, dtype=dtype)
    before = x.clone()
    out = block(x)
    expected = in_float64(block, x)
    assert out.shape == expected.shape and out.dtype == dtype and out.is_contiguous()
    assert (out.double() - expected).norm() <= BOUND[dtype] * expected.norm()
    assert torch.equal(x, before)
    last = block(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert (last.double() - expected).norm() <= BOUND[dtype] * expected.norm()  # ATen's shortcut may round differently


@torch.no_grad()
def test_attention_and_its_shortcut_stay_outside(poisoned_memory) -> None:
    torch.manual_seed(4)
    block = make_block("w6s4", torch.float32)
    block.se = nn.Hardsigmoid()  # in the place of an attention: not linear, so it must come before the shortcut
    x = torch.randn(1, 48, 4, 4)
    expected = in_float64(block, x)
    assert (block(x).double() - expected).norm() <= BOUND[torch.float32] * expected.norm()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@torch.no_grad()
def test_an_infinite_input_spreads_no_further_than_in_the_reference(value: float, poisoned_memory) -> None:
    """An Inf leaves NaN in padded channels (Inf * 0) unless they are set to zero; conv3 would carry it to every channel."""
    torch.manual_seed(5)
    block = make_block("w6s4", torch.float32)
    block.conv1.weight.abs_()  # no Inf - Inf: what is finite in the reference must stay finite
    x = torch.randn(1, 48, 7, 7)
    x[0, 3, 2, 4] = value
    expected, out = ReferenceBottle2neck.forward(block, x), block(x)
    assert torch.equal(out.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert (out[finite] - expected[finite]).norm() <= BOUND[torch.float32] * expected[finite].norm()


@pytest.mark.parametrize(("name", "launches"), [("w6s4", 3 + 2), ("w8s3", 3 + 1), ("w5s2", 3), ("stage_stride2", 3)])
@torch.no_grad()
def test_launches(name: str, launches: int, monkeypatch) -> None:
    """A normal block is 3 + (s - 2) launches: conv1, s - 1 steps, conv3; a stage block is three."""
    counted = []
    run = launch.KernelCall.run
    monkeypatch.setattr(launch.KernelCall, "run", lambda self: (counted.append(self.kernel), run(self)))
    block = make_block(name, torch.float32)
    block(torch.randn(1, block.conv1.in_channels, 4, 4))
    assert len(counted) == launches


def test_published_slots_are_multiples_of_16_bytes() -> None:
    pitches = {width: triton_block.slot_pitch(width, 1, 2) for width in (14, 26, 28, 48, 52, 104, 208)}
    assert pitches == {14: 16, 26: 32, 28: 32, 48: 48, 52: 56, 104: 104, 208: 208}
    assert triton_block.slot_pitch(26, 1, 4) == 28
