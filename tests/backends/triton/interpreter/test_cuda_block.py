"""The block of the `cuda` backend: Triton's 1x1 convolutions, interpreted, around the CUDA chain, emulated."""

import pytest
import torch
from emulator.block_case import BLOCKS, relative_error_of_block


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("name", ["w26s4", "stage"])
def test_emulated_block_in_padded_slots(
    name: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch, poisoned_memory
) -> None:
    assert name in BLOCKS
    assert relative_error_of_block(name, dtype, monkeypatch) < bound


def test_its_1x1_convolutions_lose_no_bits_of_tf32(monkeypatch: pytest.MonkeyPatch, poisoned_memory, cut_off) -> None:
    assert 5e-6 < relative_error_of_block("w26s4", torch.float32, monkeypatch) < 1e-3
    assert not cut_off
