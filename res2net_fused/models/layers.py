"""Layers of networks that PyTorch has not: channel attention, and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Channel attention (arXiv:1709.01507): x * sigmoid(fc2(relu(fc1(mean of x over its pixels)))); keys are timm's.

    channels: of x (N, channels, H, W), as of the result. reduction: fc1 leaves channels / reduction of them, at least 8 and a
    multiple of 8.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(8, (channels // reduction + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, inner, kernel_size=1)
        self.fc2 = nn.Conv2d(inner, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, H, W) -> the same shape."""
        weights = self.fc1(x.mean((2, 3), keepdim=True)).relu()  # (N, inner, 1, 1)
        return x * self.fc2(weights).sigmoid()


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, each image's x is 0 with probability `rate`, else x / (1 - rate).

    Raises ValueError for a rate below 0, or of 1 and above.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        _check_rate("rate", rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> the same shape."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        """The rate, for printing."""
        return f"rate={self.rate}"


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate}; a probability of at least 0 and below 1 is needed")


def drop_paths(drop_path_rate: float, blocks: int) -> list[DropPath | None]:
    """One for each block, from 0 at the first to `drop_path_rate` at the last; None where nothing is dropped."""
    _check_rate("drop_path_rate", drop_path_rate)
    rates = [drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)]
    return [DropPath(r) if r else None for r in rates]
