"""A launch as data, so that the same description runs on a GPU, in the interpreter, or is only compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton

from .step_plan import MAX_PROGRAMS


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

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)
