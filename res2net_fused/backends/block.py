"""The whole block on a backend: by its own block kernels where it has them, else its chain between ATen's 1x1 convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain import ChainProblem
from ..folding import FoldedBlock
from .selection import Backend


def run_block(
    backend: Backend, problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: FoldedBlock, relu: bool
) -> Tensor:
    """relu(conv3(chain(relu(conv1(x)))) + shortcut); a new tensor (N, planes * 4, H', W') in x's memory format.

    A backend with block kernels offers `pack_block(folded, config) -> list[Tensor]` and
    `block_forward(problem, x, shortcut, folded, relu) -> Tensor`; `folded.packed` is what its packing returned, or None.
    `shortcut` is already projected there, unless the backend says PROJECTS.
    """
    own = getattr(backend, "block_forward", None) if problem.batch else None
    projects = own is not None and getattr(backend, "PROJECTS", False)
    if shortcut is not None and folded.projection_weight is not None and not projects:
        assert folded.projection_bias is not None
        bias = folded.projection_bias.to(shortcut.dtype)
        shortcut = F.conv2d(shortcut, folded.projection_weight, bias, folded.projection_stride)
    if own is not None:
        return own(problem, x, shortcut, folded, relu)
    u = F.conv2d(x, folded.conv1_weight, folded.conv1_bias.to(x.dtype)).relu_()  # (N, s*w, H, W)
    if problem.batch:
        u = backend.forward(problem, u, folded.weights, folded.biases, folded.packed)  # (N, s*w, H', W')
    else:
        u = u.new_empty(0, u.shape[1], problem.output_height, problem.output_width)
    out = F.conv2d(u, folded.conv3_weight, folded.conv3_bias.to(x.dtype))
    if shortcut is not None:
        out += shortcut
    if relu:
        out.relu_()
    return out.contiguous(memory_format=torch.channels_last if problem.channels_last else torch.contiguous_format)
