"""The examples in a short form."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("sklearn")
    specification = importlib.util.spec_from_file_location("train_digits", EXAMPLES / "train_digits.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "train_digits", module)
    specification.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def test_digits_are_learnt_alike_by_both_paths(digits, tmp_path):
    curves = digits.train_both(epochs=3)
    fused, reference = curves["fused"], curves["reference"]
    assert len(fused.loss) == len(reference.loss) == 3 * 22
    # The first steps agree but for rounding; later ones drift apart as any two runs of different rounding do.
    assert fused.loss[:4] == pytest.approx(reference.loss[:4], rel=1e-3)
    for curve in (fused, reference):
        assert curve.loss[0] > 1.5 > 0.7 > sum(curve.loss[-5:]) / 5
        assert curve.accuracy[-1] > 0.85
    assert abs(fused.accuracy[-1] - reference.accuracy[-1]) < 0.08
    digits.plot(curves, str(tmp_path / "digits.png"))
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_digits_help_has_examples():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_digits.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "examples:" in done.stdout and "--epochs" in done.stdout
