"""The same values in other places of memory, and values that repeat, for the tests of what callers may pass."""

from __future__ import annotations

import torch
from torch import Tensor


def _window(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, h + 2, w + 3, c + 5), torch.nan, dtype=x.dtype).permute(0, 3, 1, 2)
    return wide[:, 2 : 2 + c, 1 : 1 + h, 1 : 1 + w].copy_(x)


def _channel_slice(x: Tensor, before: int = 3) -> Tensor:
    """The last channel of the last pixel is the end of the allocation, so that a sanitizer sees a read behind it."""
    n, c, h, w = x.shape
    wide = torch.full((n, h, w, before + c), torch.nan, dtype=x.dtype).permute(0, 3, 1, 2)
    return wide[:, before:].copy_(x)


def _between_nan(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    tight = torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype)
    return tight[32:-32].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


def _every_other(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return torch.full((n, c, h, 2 * w), torch.nan, dtype=x.dtype)[..., ::2].copy_(x)


# Of (N, C, H, W): the same values, NaN around them where there is room.
SAME_VALUES = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "window": _window,
    "channel slice": _channel_slice,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "between NaN": _between_nan,
    "every other": _every_other,
}
# Values that repeat, with stride 0.
REPEATED = {
    "one image": lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "one channel": lambda x: x[:, :1].contiguous().expand(x.shape),
    "one pixel": lambda x: x[..., :1, :1].contiguous().expand(x.shape),
    "one value": lambda x: x[:1, :1, :1, :1].contiguous().expand(x.shape),
}
LAYOUTS = SAME_VALUES | REPEATED


def in_layout(x: Tensor, name: str) -> Tensor:
    """x, of three or four dimensions, in the layout of that name."""
    if x.dim() == 3:
        return in_layout(x[:, :, None], name)[:, :, 0]
    return x if x.numel() == 0 and name in REPEATED else LAYOUTS[name](x)


def stored_bytes(tensor: Tensor) -> Tensor:
    """A copy of everything that the tensor's storage holds, what lies around the tensor too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()
