"""These tests need TRITON_INTERPRET=1 before Triton's import, hence a process of their own: see tests/test_triton.py."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tiles, since the interpreter takes its time per program, not per element; one test has small ones."""
    from res2net_fused.kernels import step_plan

    monkeypatch.setattr(step_plan, "_MULTIPROCESSORS", {(8, 0): 1})
