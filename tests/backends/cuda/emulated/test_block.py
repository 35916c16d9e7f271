"""The `cuda` backend's block with ATen's 1x1 convolutions; with Triton's: backends/triton/interpreter/test_cuda_block.py."""

import pytest
import torch
from emulator.block_case import BLOCKS, ODD_BLOCKS, relative_error_of_block


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_emulated_block_in_padded_slots(name, dtype, bound, monkeypatch, poisoned_memory):
    assert relative_error_of_block(name, dtype, monkeypatch) < bound


@pytest.mark.parametrize("name", ODD_BLOCKS)
def test_emulated_block_of_odd_width(name, monkeypatch, poisoned_memory):
    assert relative_error_of_block(name, torch.float32, monkeypatch) < 1e-3
