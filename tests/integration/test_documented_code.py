"""Every block of Python on the pages of documentation runs as it stands, and every command on them exists with its options."""

from __future__ import annotations

import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from packaging.requirements import InvalidRequirement, Requirement
from pages import PAGES, PREAMBLE, ROOT, command_lines, fenced

from res2net_fused.models import create_model, list_models

BLOCKS = {page: fenced(page, "python") for page in PAGES}
COMMANDS = [command for page in PAGES for command in command_lines(page)]
# The weights would be fetched, and one block in each stage is enough to show that the lines run.
NOTHING_FETCHED = """
import timm
_create_model = timm.create_model
def _shallow(name, pretrained=False, **settings):
    return _create_model(name, pretrained=False, **settings | ({"layers": (1, 1, 1, 1)} if "res2net" in name else {}))
timm.create_model = _shallow
"""
# Compiling takes most of the time of a page that does.
SHALLOW = """
import functools, res2net_fused.models as _models
_models.create_model = functools.partial(_models.create_model, layers=(1, 1, 1, 1))
"""
# Measurements as short as they may be: what they find is of no matter here.
HASTY = """
import res2net_fused.modules.measuring as _measuring, res2net_fused.tuning.tune as _tune
_measuring.measure_block.__defaults__ = (0.0,)
_tune._MODEL_SECONDS = 0.0
"""
VARIABLES = {k: v for k, v in os.environ.items() if not k.startswith(("RES2NET_FUSED_", "MAKE"))} | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
}


def run(*command: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, env=VARIABLES | variables, capture_output=True, text=True)


def test_there_is_something_to_try():
    assert len(BLOCKS[ROOT / "README.md"]) >= 2
    assert len(COMMANDS) > 40
    assert {"make", "pip", "python", "res2net-fused", "pytest"} <= {program(command.text)[0] for command in COMMANDS}


# AOTInductor compiles C++ for half a minute; the tests of `examples/cpp` do the same.
SLOW = {"deployment.md"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else ()) for page in PAGES if BLOCKS[page]],
    ids=lambda page: page.name,
)
def test_blocks_run(page, tmp_path):
    """In order, in one namespace and a fresh process; files of weights that they name are there, with random weights."""
    text = "\n".join(block.text for block in BLOCKS[page])
    for name in re.findall(r'"(\w+)\.pth"', text):
        assert name in list_models(), f"{name}.pth: of which network?"
        torch.save(create_model(name).state_dict(), tmp_path / f"{name}.pth")
    script = [PREAMBLE, NOTHING_FETCHED if "timm" in text else "", SHALLOW if "aoti_compile" in text else ""]
    script.append(HASTY if "rf.tune" in text else "")
    for block in BLOCKS[page]:
        # compile: what goes wrong is told with the page's own line.
        small = block.text.replace("3, 224, 224)", "3, 64, 64)")
        script.append(f"exec(compile({chr(10) * (block.line - 1) + small!r}, {block.page!r}, 'exec'))")
    choices = str(tmp_path / "choices.json")  # not the user's
    done = run(sys.executable, "-c", "\n".join(script), cwd=tmp_path, RES2NET_FUSED_CHOICES=choices)
    assert done.returncode == 0, done.stderr


# Commands -------------------------------------------------------------------------------------------------------------


def program(text: str) -> list[str]:
    """The words of a command behind the variables before it, without the folder of the program."""
    words = shlex.split(text)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return [Path(words[0]).name.replace("python3", "python"), *words[1:]]


def python_path(text: str) -> list[Path]:
    """Where `python -m` looks for modules when this command is run from the top of the checkout."""
    given = re.match(r"PYTHONPATH=(\S+)\s", text)
    return [ROOT, *(ROOT / folder for folder in (given[1].split(os.pathsep) if given else ()))]


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]


@functools.cache
def help_of(*command: str) -> str:
    """What Python prints for `command` --help. command: a script or -m and a module, then words.

    In a fork of this process, which has imported PyTorch already.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(writing, 1), os.dup2(writing, 2), os.chdir(ROOT)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w") for fd in (1, 2))
            status = _run_here([*command, "--help"])
            sys.stdout.flush()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as output:
        text = output.read()
    assert os.waitpid(child, 0)[1] == 0, text
    return text


def _run_here(words: list[str]) -> int:
    """The exit status of `python *words` in this process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def accept(words: list[str], *command: str) -> None:
    """--help of the command names every option among the words."""
    for option in options(words):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_of(*command)), f"{command} has no {option}"


def check_make(words: list[str], folders: list[Path]) -> None:
    """What `make` would run last is checked in turn, with the ARGS that it is given."""
    makefile = (ROOT / "Makefile").read_text()
    settings = [word for word in words if "=" in word]
    for setting in settings:
        assert re.search(rf"^{setting.partition('=')[0]} \?=", makefile, re.M), f"the Makefile has no {setting}"
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = run("make", "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    last = shlex.split(done.stdout.strip().splitlines()[-1])
    if any(setting.startswith("ARGS=") for setting in settings):
        check_python(last[1:], folders)


def check_python(words: list[str], folders: list[Path]) -> None:
    if "--" in words:  # another command behind it
        at = words.index("--")
        check_words(words[at + 1 :], folders)
        words = words[:at]
    if words[0] == "-m" and words[1] in ("res2net_fused", "pip", "pytest"):
        check_words([words[1].replace("_", "-"), *words[2:]], folders)
    elif words[0] == "-m":
        path = words[1].replace(".", "/")
        found = [folder for folder in folders for end in (".py", "/__main__.py") if (folder / f"{path}{end}").is_file()]
        assert found, f"there is no module {words[1]}"
        accept(words[2:], "-m", words[1])
    else:
        assert any((ROOT / words[0] / end).is_file() for end in ("", "__main__.py")), f"there is no {words[0]}"
        named = [word for word in words[1:2] if word[0] != "-" and word in help_of(words[0]).split()]  # a command of its own
        accept(words[1:], words[0], *named)


def check_pip(words: list[str], folders: list[Path]) -> None:
    assert words[0] == "install", words
    accept(words[1:], "-m", "pip", "install")
    project = (ROOT / "pyproject.toml").read_text()
    values = {after for before, after in zip(words, words[1:], strict=False) if re.match("--.*index", before)}
    for word in (word for word in words[1:] if not word.startswith("-") and word not in values):
        own = re.fullmatch(r"(?:\.|res2net-fused)(?:\[([\w,]+)\])?", word)
        if own is None and not word.endswith(".whl"):
            Requirement(word)  # InvalidRequirement for what pip would not understand
        for extra in own[1].split(",") if own and own[1] else ():
            assert re.search(rf"^{extra} = \[", project, re.M), f"there is no extra {extra!r}"


def check_res2net_fused(words: list[str], folders: list[Path]) -> None:
    if words and not words[0].startswith("-"):
        assert words[0] in ("info", "check", "bench", "tune"), f"there is no command {words[0]}"
        accept(words, "-m", "res2net_fused", words[0])
    else:
        accept(words, "-m", "res2net_fused")


def check_pytest(words: list[str], folders: list[Path]) -> None:
    accept(words, "-m", "pytest")
    for word in words:
        if word.endswith(".py") or "/" in word:
            assert (ROOT / word.partition("::")[0]).exists(), f"there is no {word}"


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "pytest": check_pytest,
    "res2net-fused": check_res2net_fused,
}


def check_words(words: list[str], folders: list[Path]) -> None:
    name, *arguments = words
    if name not in CHECKS:
        assert shutil.which(name), f"there is no program {name}"
    elif arguments:
        CHECKS[name](arguments, folders)


def check(text: str) -> None:
    check_words(program(text), python_path(text))


@pytest.mark.parametrize("text", sorted({command.text for command in COMMANDS}))
def test_commands_exist_with_their_options(text):
    where = next(str(command) for command in COMMANDS if command.text == text)
    try:
        check(text)
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from None


@pytest.mark.parametrize(
    "text",
    [
        "make no-such-target",
        "make bench NO_SUCH=1",
        'make bench ARGS="--no-such"',
        "python examples/no_such.py",
        "python -m card --help",
        "pip install --no-such .",
        "pip install '.[no_such]'",
        "pip install a==",
        "res2net-fused no-such",
        "res2net-fused check --train all",
        "pytest tests/no_such.py",
    ],
)
def test_what_does_not_exist_is_noticed(text):
    with pytest.raises((AssertionError, InvalidRequirement)):
        check(text)
