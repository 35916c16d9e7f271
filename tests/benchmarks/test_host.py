"""`benchmarks/host.py`: its commands run, and what differs from float64 is not timed."""

import re
import subprocess
import sys

import host
import pytest
import torch
from tree import ROOT


def figures(out, row):
    """The numbers of the table's row of this name."""
    (line,) = [line for line in out.splitlines() if re.match(rf"{row}  ", line)]
    return line.removeprefix(row).split()


@pytest.fixture
def one_thread():
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)


@pytest.mark.usefixtures("one_thread")
def test_the_processor(capsys):
    assert host.main(["--backend", "cpu", "--rounds", "1", "--size", "1", "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert all(len(figures(out, row)) == 6 for row in ("eager", "cached", "frozen", "operator", "operator, packed"))
    assert figures(out, "eager")[1] == "-" and float(figures(out, "frozen")[0]) > 0
    assert all("-" not in figures(out, row) for row in ("cached", "frozen", "operator", "operator, packed"))


@pytest.mark.usefixtures("one_thread")
def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(host, "timed", lambda *a: pytest.fail("timed"))
    own = host.hierarchical_conv2d
    monkeypatch.setattr(host, "hierarchical_conv2d", lambda *a, **k: own(*a, **k) * 1.001)
    with pytest.raises(RuntimeError, match="operator: relative error 0.001, 5e-06 is allowed; nothing is timed"):
        host.main(["--backend", "cpu", "--rounds", "1", "--size", "1", "--no-compile"])


def test_without_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(host, "STAND_IN", tmp_path / "support")
    assert host.main(["--backend", "triton"]) == 2
    assert "run this from a checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_the_stand_in_card():
    command = [sys.executable, str(ROOT / "benchmarks" / "host.py"), "--backend", "triton", "--rounds", "1", "--size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "launches of a frozen block: 5, 9;" in done.stdout and len(figures(done.stdout, "frozen")) == 2
