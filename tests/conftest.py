"""Fixtures for all tests: reproducible numbers, no backend from the environment, memory poisoned on request."""

import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from res2net_fused.backends import choices, choices_file, policy

# What was measured on this machine decides no test, nor what another test measures.
_CHOICES = Path(tempfile.mkdtemp(prefix="res2net_fused-"), "choices.json")
os.environ["RES2NET_FUSED_CHOICES"] = str(_CHOICES)


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, help="only so many cases of each test function, evenly spread (default: all)")


@pytest.hookimpl(trylast=True)  # slow tests are deselected by then
def pytest_collection_modifyitems(config, items):
    """Minutes first, seconds last: of two processes neither waits long for the other's last test."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/rehearsal/", "tests/backends/triton/test_chain.py")))
    most = config.getoption("--cases")
    if most is None:
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {one[k * len(one) // most] for one in cases.values() for k in range(most)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def same_conditions(monkeypatch):
    monkeypatch.delenv("RES2NET_FUSED_BACKEND", raising=False)
    monkeypatch.delenv("RES2NET_FUSED_CHOICE", raising=False)
    monkeypatch.setattr(policy, "why_left_to_pytorch", lambda device, dtype: None)  # processors have different instructions
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        yield
        return
    from res2net_fused.backends.verification import suspended
    from res2net_fused.testing.parity import convolution_precision

    # monkeypatch cannot restore these attributes: they are not the object's own. Tests count launches, and compare themselves.
    with convolution_precision("float32", "cuda"), suspended():
        yield


@pytest.fixture(autouse=True)
def nothing_measured():
    yield
    if choices._state.rows or _CHOICES.exists():
        _CHOICES.unlink(missing_ok=True)
        choices.forget()


@pytest.fixture(autouse=True)
def training_pays(monkeypatch):
    """Small blocks train by the operator too: what runs where it is faster must be right everywhere."""

    own = policy.training_pays
    monkeypatch.setattr(policy, "training_pays", lambda problem: True)
    return own


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin give NaN: what a kernel leaves unwritten shows."""
    from res2net_fused.testing.parity import poisoned_allocations

    with poisoned_allocations():
        assert torch.empty(3).isnan().all()
        yield


@pytest.fixture
def poisoned_scratch(monkeypatch):
    """The scratch memory of the native CPU kernels holds NaN before every call."""
    monkeypatch.setenv("RES2NET_FUSED_CPU_POISON", "1")


@pytest.fixture
def impatient_threads():
    """The interpreter switches threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def own_table(monkeypatch, variable, path, forget):
    """The path of a table of this test's own, and no memory of others."""
    monkeypatch.setenv(variable, str(path))
    forget()
    yield path
    forget()


@pytest.fixture
def user_table(monkeypatch, tmp_path):
    """A user's table of tiles."""
    from res2net_fused.backends.triton import tiles

    yield from own_table(monkeypatch, tiles.ENVIRONMENT_VARIABLE, tmp_path / "tiles.json", tiles.forget)


@pytest.fixture
def choices_table(monkeypatch, tmp_path):
    """A user's table of choices."""
    yield from own_table(monkeypatch, choices_file.PATH_VARIABLE, tmp_path / "choices.json", choices.forget)


@pytest.fixture
def timed(monkeypatch):
    """What cases of a record timed, by the names of the candidates; each runs once."""
    from res2net_fused import _timing as timing
    from res2net_fused.bench import turns

    found = []

    def once(contenders, device, **_):
        found.append({key[-1][0] for key in contenders})
        return timing.measure(contenders, device, seconds=0, min_repeats=1, warm_up=0)

    monkeypatch.setattr(turns, "measure", once)
    return found


@pytest.fixture
def record(tmp_path):
    """An empty record."""
    from record_cases import environment

    from res2net_fused.bench.record_file import Record

    record = Record(tmp_path / "record.json", environment())
    record.begin_run()
    yield record
    record.close()


@pytest.fixture
def folds(monkeypatch):
    """Counts how often a block is folded: `len(folds)`."""
    from res2net_fused.modules import fused_forward

    calls = []
    fold_block = fused_forward.fold_block

    def counted(*args, **kwargs):
        calls.append(args[0])
        return fold_block(*args, **kwargs)

    monkeypatch.setattr(fused_forward, "fold_block", counted)
    return calls
