"""The line that says how far Triton's compilation is, by Triton's own hooks, with a made-up clock."""

from __future__ import annotations

import sys

import pytest

from res2net_fused.backends.triton import compile_progress as module
from res2net_fused.backends.triton.compile_progress import compile_progress


@pytest.fixture
def compile_kernels(monkeypatch):
    """Compiles kernels that take so many seconds each, as Triton's JITFunction does."""
    knobs = pytest.importorskip("triton").knobs
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def run(*durations):
        for seconds in durations:
            hooks = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
            if hooks[0] is not None and hooks[0](key="k", already_compiled=False):
                continue
            now[0] += seconds
            if hooks[1] is not None:
                hooks[1](key="k", already_compiled=False)

    return run


def test_a_file_has_a_line_when_patience_ends_and_one_at_the_end(compile_kernels, capsys):
    with compile_progress():
        compile_kernels(0.01, 1.0, 0.9)
        assert capsys.readouterr().err == ""
        compile_kernels(0.5, 3.0)
        assert capsys.readouterr().err == "compiling Triton kernels: 3 done, 2 s\n"
    assert capsys.readouterr().err == "compiling Triton kernels: 4 done, 5 s\n"


def test_quick_compilation_says_nothing(compile_kernels, capsys):
    with compile_progress():
        compile_kernels(*[0.01] * 500, 1.9)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_one_line(compile_kernels, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with compile_progress():
        compile_kernels(4.0, 1.0)
    line = "\rcompiling Triton kernels: {} done, {} s"
    assert capsys.readouterr().err == line.format(1, 4) + line.format(2, 5) + line.format(2, 5) + "\n"


class Bar:
    def __init__(self, disable):
        self.disable, self.postfixes = disable, []

    def set_postfix_str(self, text):
        self.postfixes.append(text)


def test_a_bar_has_it_behind_itself(compile_kernels, capsys):
    shown, hidden = Bar(disable=False), Bar(disable=True)
    for bar in (shown, hidden):
        with compile_progress(bar):
            compile_kernels(3.0)
    assert shown.postfixes == ["compiling Triton kernels: 1 done, 3 s", ""] and hidden.postfixes == []
    assert capsys.readouterr().err == "compiling Triton kernels: 1 done, 3 s\n"  # of the hidden one


def test_hooks_of_others_stay_in_force(compile_kernels, monkeypatch, capsys):
    from triton import knobs

    seen = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", refuses := lambda **keywords: seen.append(keywords) or True)
    with compile_progress():
        compile_kernels(9.0)
    assert len(seen) == 1 and capsys.readouterr().err == "", "their answer keeps Triton from compiling"
    assert knobs.runtime.jit_cache_hook is refuses and knobs.runtime.jit_post_compile_hook is None


def test_hooks_are_put_back_behind_an_error(compile_kernels, capsys):
    from triton import knobs

    with pytest.raises(ZeroDivisionError), compile_progress():
        compile_kernels(3.0)
        raise ZeroDivisionError
    assert knobs.runtime.jit_cache_hook is None and knobs.runtime.jit_post_compile_hook is None


def test_what_cannot_be_said_disturbs_nobody(compile_kernels):
    class Broken(Bar):
        def set_postfix_str(self, text):
            raise OSError

    with compile_progress(Broken(disable=False)):
        compile_kernels(3.0)


@pytest.mark.parametrize("replaced", ["triton", "triton.knobs"])
def test_without_triton_or_its_hooks_nothing_happens(replaced, monkeypatch, capsys):
    if replaced == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton, "knobs", type("Knobs", (), {"runtime": object()}))
    with compile_progress():
        pass
    assert capsys.readouterr().err == ""
