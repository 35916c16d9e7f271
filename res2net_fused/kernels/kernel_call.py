"""A launch as data, so that the same description runs on a GPU, in the interpreter, or is only compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class KernelCall:
    """`kernel[grid](**arguments, **options)`."""

    kernel: triton.JITFunction
    programs: int
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)
