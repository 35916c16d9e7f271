"""`benchmarks/cpu.py plain`: its rows of single blocks, in inference and training, and what differs is not timed."""

import cpu
import pytest
import torch


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCKS", {"a": (16, 4, 1, 6), "b, first": (16, 8, 2, 8)})
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)


@pytest.mark.parametrize("mode", [[], ["--train"]], ids=["inference", "training"])
def test_single_blocks(mode, capsys):
    assert cpu.main(["plain", "--blocks", "--batch", "1", "2", "--repeats", "1", "--threads", "1", *mode]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.startswith(("a ", "b, first "))]
    assert len(rows) == 4 and all(float(row[-1]) < 1e-5 for row in rows)


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    class Wrong(torch.nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own = own

        def forward(self, x):
            return self.own(x) * 1.001

    monkeypatch.setattr(cpu, "accelerate", lambda block: Wrong(block))
    monkeypatch.setattr(cpu, "medians", lambda *a, **k: pytest.fail("timed"))
    assert cpu.main(["plain", "--blocks", "--batch", "1", "--threads", "1"]) == 1
    assert "nothing is timed" in capsys.readouterr().err
