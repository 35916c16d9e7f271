"""When launches may begin while the one before them ends, and what the chain's launch is told."""

import pytest
import torch

from res2net_fused.backends import overlap
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.cuda.plan import LIMITS
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem


@pytest.fixture(autouse=True)
def read_anew():
    overlap.allowed.cache_clear()
    yield
    overlap.allowed.cache_clear()


def test_the_device_the_driver_and_the_environment_decide(monkeypatch):
    monkeypatch.delenv(overlap.VARIABLE, raising=False)
    assert not overlap.allowed((8, 9)) and overlap.allowed((9, 0)) and overlap.allowed((12, 0))
    for version, expected in ((12020, False), (12030, True), (None, True)):
        monkeypatch.setattr(overlap, "_driver_version", lambda version=version: version)
        overlap.allowed.cache_clear()
        assert overlap.allowed((9, 0)) is expected
    monkeypatch.setenv(overlap.VARIABLE, "off")
    overlap.allowed.cache_clear()
    assert not overlap.allowed((9, 0))
    monkeypatch.setenv(overlap.VARIABLE, "no")
    overlap.allowed.cache_clear()
    with pytest.raises(ValueError, match=f"{overlap.VARIABLE} is 'no'; allowed are on, off"):
        overlap.allowed((9, 0))


@pytest.mark.parametrize("around", [None, (256, 256)], ids=["chain", "block"])
@pytest.mark.parametrize("device, overlaps", [("sm_80", False), ("sm_90", True)])
def test_only_in_a_block_weights_are_known_to_stand(around, device, overlaps, monkeypatch):
    """Without conv1 between, the launch before the chain may be the one that packs the weights."""
    calls = []
    monkeypatch.setattr(cuda_chain, "device_limits", lambda _: LIMITS[device])
    monkeypatch.setattr(torch.ops.res2net_fused_native, "cuda_chain", lambda *_, **named: calls.append(named), raising=False)
    problem = ChainProblem(ChainConfig(), torch.device("cuda"), torch.float16, 2, 14, 14, 26, 3, True, around)
    slots = cuda_chain.Slots(torch.empty(0), 104, 26)
    cuda_chain.launch_chain(problem, slots, slots, [torch.empty(0)] * 2, 26)
    assert [(call["overlaps"], call["weights_stand"]) for call in calls] == [(overlaps, around is not None)]
