"""A launch as data, so that the same description runs on a GPU, in the interpreter, or is only compiled."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from .step_plan import MAX_PROGRAMS


@dataclass(frozen=True)
class KernelCall:
    """`kernel[grid](**arguments, **options)`."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict[str, object]
    options: dict[str, object]

    def __post_init__(self) -> None:
        if self.programs > MAX_PROGRAMS:
            raise ValueError(f"the call needs {self.programs} programs in one launch; at most {MAX_PROGRAMS} are allowed")

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)
