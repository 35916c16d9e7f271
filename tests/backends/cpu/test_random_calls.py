"""The random cases of tests/robustness/fuzz on the native CPU kernels alone, for `make sanitize`, which runs them over kernels
that check each access: odd sizes, every setting, layouts, threads, Inf and NaN.
"""

import pytest
import torch
from cpu_block_cases import check
from fuzz.checks import hostile_memory, release_scratch
from fuzz.strategies import UNHURRIED, blocks, chains
from helpers import Chain
from hypothesis import given, settings
from hypothesis import strategies as st

from res2net_fused._native import library
from res2net_fused.backends import cpu as cpu_backend

STATUS = library.cpu_library()
# An ordinary run has the same cases, with all backends, in tests/fuzz.
pytestmark = [pytest.mark.skipif(not STATUS.loaded, reason=STATUS.reason), pytest.mark.slow]
many = settings(UNHURRIED, max_examples=240, derandomize=True)


@many
@given(chains())
def test_random_chain(case):
    case.check(["cpu"])


@many
@given(blocks())
def test_random_block(case):
    case.check(["cpu"])


@many
@given(
    chains(finite=True, most_channels=40),
    st.fixed_dictionaries({
        "shortcut": st.booleans(), "relu": st.booleans(), "packed": st.booleans(), "projection": st.sampled_from([0, 1, 2]),
        "inplanes": st.integers(2, 90), "outplanes": st.integers(2, 90),  # x of one channel is contiguous in either layout
    }),
)  # fmt: skip
def test_random_block_kernel(case, ends):
    """Also without the ends of a block, and with activations that no block has."""
    right = cpu_backend.block.block_forward

    def block_forward(*arguments):
        release_scratch()
        return right(*arguments)

    ends["shortcut"] |= ends["projection"] > 0
    dtype = torch.float32 if case.dtype == "float64" else getattr(torch, case.dtype)
    shape = max(1, case.shape[0]), *case.shape[1:]
    with hostile_memory(case.threads), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_backend.block, "block_forward", block_forward)
        check(Chain(case.settings, case.steps, case.width), shape, dtype=dtype, arithmetics=["winograd", "direct"], **ends)
