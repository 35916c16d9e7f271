"""A few elements of many tensors, read again at their addresses and compared bit by bit with what was there.

    table, a part for each program            the tensors, wherever they lie
      +---------------------------+
      | addresses         (ROWS)  |  -------> one element of 1, 2, 4 or 8 bytes each
      | sizes and number  (ROWS)  |              |
      | bits that were there      |  <--compare--+--->  number into noticed[number % slots], where any differs
      +---------------------------+

Elements are read in their own size, since what lies beside them may belong to others. Rows that are not used have size 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..launch import KernelCall

ROWS = 512  # elements a program
SIZES = (1, 2, 4, 8)  # of elements, in bytes
SIZE_BITS = 4  # of an entry, the number is behind them


@triton.jit
def compare_samples(table, noticed, SLOTS: tl.constexpr, KEEPS: tl.constexpr, ROWS: tl.constexpr):
    """KEEPS: the bits go into the table. Else they are compared, and noticed (SLOTS,) may lie in the host's memory."""
    row = table + tl.program_id(0).to(tl.int64) * (3 * ROWS) + tl.arange(0, ROWS)
    address = tl.load(row)
    entry = tl.load(row + ROWS)
    size = entry & 15
    bits = tl.load(address.to(tl.pointer_type(tl.int64)), mask=size == 8, other=0)
    bits |= tl.load(address.to(tl.pointer_type(tl.int32)), mask=size == 4, other=0).to(tl.int64)
    bits |= tl.load(address.to(tl.pointer_type(tl.int16)), mask=size == 2, other=0).to(tl.int64)
    bits |= tl.load(address.to(tl.pointer_type(tl.int8)), mask=size == 1, other=0).to(tl.int64)
    if KEEPS:
        tl.store(row + 2 * ROWS, bits)
    else:
        differing = tl.sum((bits != tl.load(row + 2 * ROWS)).to(tl.int32), 0)
        number = tl.max(entry >> 4, 0)
        tl.store(noticed + number % SLOTS, number, mask=differing > 0)


def sample_calls(table: Tensor, noticed: Tensor, keeps: bool) -> Iterator[KernelCall]:
    """The one launch. table: (programs, 3, ROWS); noticed: (slots,), written where `keeps` is not set; both int64."""
    arguments = {"table": table, "noticed": noticed, "SLOTS": len(noticed), "KEEPS": keeps, "ROWS": ROWS}
    yield KernelCall(compare_samples, len(table), arguments, {"num_warps": 4})
