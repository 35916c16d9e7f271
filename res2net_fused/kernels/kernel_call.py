"""A launch as data, so that the same description runs on a GPU, in the interpreter, or is only compiled."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class KernelCall:
    """`kernel[grid](**arguments, **options)`."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict[str, object]
    options: dict[str, object]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)
