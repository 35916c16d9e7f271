"""The GPU program on stand-in cards: starts the processes that have one, since PyTorch must not have been imported before."""

import os
import re
import subprocess
import sys

import card
import pytest
from tree import ROOT, TESTS

CARDS = ("H100",)  # the others in `make test-full`; commands run on an RTX 4090 too


def rehearse(name, *arguments, **settings):
    """pytest on two stand-in cards; its output, which must show no failure."""
    env = card.environment(card.Settings(name, count=2, **settings))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", [n if n in CARDS else pytest.param(n, marks=pytest.mark.slow) for n in card.CARDS])
def test_rehearsals(name):
    found = re.search(r"(\d+) passed", rehearse(name, str(TESTS / "rehearsal" / "on_card")))
    assert found and int(found[1]) >= 15


def test_prepared_launches_compute():
    file = TESTS / "rehearsal" / "on_card" / "test_prepared_launches.py"
    assert "1 passed" in rehearse("H100", str(file), "-k", "numbers", launch="interpreter")


def test_native_bodies_compute():
    file = TESTS / "rehearsal" / "on_card" / "test_rehearsed_bodies.py"
    found = re.search(r"(\d+) passed", rehearse("H100", str(file), launch="interpreter"))
    assert found and int(found[1]) >= 12


# The tests that a real card runs: with fewer launches and other refusals on the smaller card, and with Triton's kernels alone.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "library", "least"), [("H100", True, 750), ("RTX4090", True, 600), ("H100", False, 180)])
def test_the_gpu_tests(name, library, least):
    found = re.search(r"(\d+) passed", rehearse(name, str(TESTS / "gpu"), cuda_library=library))
    assert found and int(found[1]) >= least


def test_the_card_stays_out_of_other_processes():
    assert "STAND_IN_CARD" not in os.environ
    import torch

    assert torch.version.cuda is None or torch.cuda.is_available()
