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
