"""Tests on the stand-in card: collected only by the processes that have it, which tests/rehearsal/test_rehearsals.py starts."""

import os

import pytest

from res2net_fused.backends import selection, verification

if not os.environ.get("STAND_IN_CARD"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def as_in_a_new_process(monkeypatch):
    """A function after which no kernel has been compared with float64, or put aside."""

    def forget():
        for name in ("_known", "_agreed"):
            monkeypatch.setattr(verification, name, set())
        monkeypatch.setattr(verification, "_suspended", False)
        monkeypatch.setattr(selection, "_aside", {})

    forget()
    return forget
