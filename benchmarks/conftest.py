"""One fixture for all cases: a provider on a chain, a block or a network, timed by pytest-benchmark."""

import pytest
import torch

from res2net_fused.backends import choices
from res2net_fused.bench import providers
from res2net_fused.bench.networks import DEFAULT_MODELS, prepare_network
from res2net_fused.testing import parity
from res2net_fused.testing.cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
BATCH = 32 if DEVICE == "cuda" else 8
BACKEND = "auto"


@pytest.fixture(scope="session", autouse=True)
def as_published():
    with choices.as_published():
        yield


@pytest.fixture
def time_module(benchmark):
    """Times one provider on a module in eval mode: `time_module(name, module, inputs)`."""

    def run(name, module, inputs):
        if name not in providers.select(DEVICE, "network", peers="all", dtype=DTYPE):
            reason = providers.unavailable(DEVICE, DTYPE).get(name, f"does not exist on {DEVICE}")
            pytest.skip(f"{name}: {reason}")
        providers.forget_compiled()
        with parity.convolution_precision(DTYPE, DEVICE):
            _, graph = providers.candidates([name], DEVICE)[-1]
            contender = providers.contender(name, module, inputs, BACKEND, graph)

            def once():
                contender.run()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()

            benchmark.pedantic(once, rounds=20, warmup_rounds=3)
        benchmark.extra_info.update(device=DEVICE, dtype=DTYPE, calls_per_round=contender.calls)

    return run


@pytest.fixture
def time_case(time_module, benchmark):
    """Times one provider on a chain or block, ours only after its parity: `time_case(name, workload, config, stage)`."""

    def run(name, workload, config, stage):
        case = Case(workload, config, stage, BATCH, DTYPE, DEVICE)
        if providers.PROVIDERS[name].networks_only:
            pytest.skip(f"{name} differs from ours in whole networks only")
        if name in providers.OURS:
            report = parity.check_case(case, BACKEND)
            assert report.ok, f"not timed, since the parity gate is red:\n{report}"
        benchmark.group = str(case)
        time_module(name, case.module(), case.inputs(4))

    return run


@pytest.fixture(scope="session", params=DEFAULT_MODELS)
def network(request):
    """A whole network on two photographs, compared with float64."""
    case = prepare_network(request.param, DTYPE, DEVICE, BACKEND)
    assert case.parity.ok, f"not timed, since the parity gate is red:\n{case.parity}"
    return case
