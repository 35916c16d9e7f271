"""Every instruction set and arithmetic of the native CPU kernels, for the tests that try them all."""

from collections.abc import Iterator, Sequence

import pytest

from res2net_fused.backends import cpu as cpu_backend

INSTRUCTION_SETS = cpu_backend.settings.available_instruction_sets()
ARITHMETICS = [name for name in cpu_backend.settings.ARITHMETICS if name != "auto"]


def each_kernel(arithmetics: Sequence[str] = ARITHMETICS) -> Iterator[str]:
    """Sets the environment to every instruction set of this machine with every arithmetic in turn; gives a name for it."""
    for isa in INSTRUCTION_SETS:
        for arithmetic in arithmetics:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(cpu_backend.settings.ISA_VARIABLE, isa)
                patch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, arithmetic)
                yield f"{isa}, {arithmetic}"
