"""Some of the random chains of tests/robustness/fuzz on the Triton kernels; the interpreter is slow, so they are small."""

from fuzz.strategies import UNHURRIED, chains
from hypothesis import given, settings


@settings(UNHURRIED, max_examples=12, derandomize=True)
@given(chains(finite=True, most_channels=20, most_products=3e4))
def test_random_chains(case):
    case.check(["triton"])
