"""A launch as data, so that the same description runs on a GPU, in the interpreter, or is only compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.runtime.errors import OutOfResources

from .step_plan import MAX_PROGRAMS
from .tiles import ENVIRONMENT_VARIABLE

_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


@dataclass(frozen=True)
class KernelCall:
    """`kernel[grid](**arguments, **options)`."""

    kernel: triton.JITFunction
    programs: int
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.programs > MAX_PROGRAMS:
            raise ValueError(f"the call needs {self.programs} programs in one launch; at most {MAX_PROGRAMS} are allowed")

    def launch(self) -> object:
        """Returns the compiled kernel. Raises what Triton raises."""
        return self.kernel[(self.programs,)](**self.arguments, **self.options)

    def run(self) -> object:
        """`launch`; RuntimeError with the remedy where the kernel can be neither compiled nor found in Triton's cache."""
        try:
            return self.launch()
        except OSError as error:
            remedy = "set TRITON_CACHE_DIR to a folder that can be written and has room"
            raise RuntimeError(f"Triton cannot compile a kernel and keep it ({error}): {remedy}") from error
        except OutOfResources as error:
            tile = {name: value for name, value in {**self.arguments, **self.options}.items() if name in _TILE}
            table = f"the table of tiles ({ENVIRONMENT_VARIABLE}, else in the user's cache folder)"
            remedy = f"if `explain` calls it tuned, delete {table} or write it anew with `res2net-fused tune`"
            raise RuntimeError(f"the tile {tile} does not fit this GPU ({error}): {remedy}") from error
