"""Statistics over all processes of a group, as nn.SyncBatchNorm takes them.

Every process contributes one small vector; all of them are gathered and combined in the order of the ranks, so that every
process gets the same bits, run after run. Processes may have batches of different sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather(vector: Tensor, group: str) -> Tensor:
    """Gathers a vector (n,) of every process into (processes, n). group: the name of a process group of torch.distributed."""
    import torch.distributed._functional_collectives as collectives

    name: Any = group  # later releases of torch have a type of its own for names
    gathered = collectives.all_gather_tensor(vector[None].contiguous(), 0, name)
    return collectives.wait_tensor(gathered)


def combine_moments(mean: Tensor, squares: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (w,), sum of squared deviations from it (w,) and count (1,) over all processes, from those of this one.

    Merged as parallel variances are, so that no digits cancel.
    """
    width = len(mean)
    everyone = gather(torch.cat([mean, squares, mean.new_full((1,), count)]), group)
    means, counts = everyone[:, :width], everyone[:, 2 * width :]
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    squares = (everyone[:, width : 2 * width] + counts * (means - mean).square()).sum(0)
    return mean, squares, total


def combine_sums(sums: Tensor, count: int, group: str) -> Tensor:
    """Sums (2, w) over all processes, divided by the count over all processes: means."""
    everyone = gather(torch.cat([sums.flatten(), sums.new_full((1,), count)]), group).sum(0)
    return (everyone[:-1] / everyone[-1]).view_as(sums)
