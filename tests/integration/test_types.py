"""The types that users see, as mypy finds them: a program in order, and one full of mistakes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tool

import res2net_fused

PROGRAMS = Path(__file__).with_name("typed")


def mypy(program: Path, cache: Path) -> subprocess.CompletedProcess:
    """mypy over one file of a user, with strict settings of the user's own; the package is found as Python finds it here."""
    tool(importlib.util.find_spec("mypy"), "mypy", "`make setup` installs it")
    settings = cache / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\n")
    package = Path(res2net_fused.__file__).parent
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(cache), "--follow-imports",
               "silent", "--show-error-codes", "--no-error-summary", str(program)]  # fmt: skip
    # An editable install may use an import hook, which mypy does not follow; the folder itself it does.
    environment = os.environ | {"MYPYPATH": str(package.parent)}
    return subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


def test_package_says_that_it_is_typed():
    assert (Path(res2net_fused.__file__).parent / "py.typed").is_file()


@pytest.mark.slow  # mypy reads all of PyTorch; `make types` looks at the package itself
def test_a_users_program_has_the_promised_types(cache):
    done = mypy(PROGRAMS / "user_program.py", cache)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = re.findall(r'# (Revealed type is ".*")', (PROGRAMS / "user_program.py").read_text())
    assert len(expected) == 1 and all(text in done.stdout for text in expected), done.stdout


@pytest.mark.slow
def test_mistakes_are_found(cache):
    program = PROGRAMS / "mistakes.py"
    done = mypy(program, cache)
    lines = enumerate(program.read_text().splitlines(), start=1)
    expected = {(number, match[1]) for number, line in lines if (match := re.search(r"# mistake: ([\w-]+)$", line))}
    found = {(int(n), code) for n, code in re.findall(r"mistakes\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)}
    assert found == expected, done.stdout + done.stderr
