"""The block of every published config at equal FLOPs, in the four stages: `pytest benchmarks/test_block.py`."""

import pytest

from res2net_fused.bench.providers import PROVIDERS
from res2net_fused.testing.cases import DEFAULT_CONFIGS, STAGES


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("config", DEFAULT_CONFIGS, ids=str)
def test_block(time_case, provider, config, stage):
    time_case(provider, "block", config, stage)
