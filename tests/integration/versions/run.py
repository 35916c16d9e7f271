"""Tries the wheel in dist/ with other versions of torch: its own check, then the core tests, each in a fresh environment.

What came of it is written to the table of docs/install.md, a row for each combination, with the date.

    python tests/integration/versions/run.py                                    # the oldest supported torch, then the newest
    python tests/integration/versions/run.py --torch 2.11.0 --python python3.10 # one, under another Python
    python tests/integration/versions/run.py --torch 2.13.0 --triton 3.9.0      # with another Triton than the torch asks for

    python tests/integration/versions/run.py --into /somewhere/bin/python       # an environment that has its torch and pytest

Environments lie under build/versions, one at a time: PyPI's torch has CUDA and takes 5 GB. pip's own variables choose another
index, such as one of CPU builds. Other arguments are pytest's, and told in the row. Exit status: 0 where everything passed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "versions"
OLDEST, NEWEST = "2.11.0", "newest"
PAGE, BEGIN, END = ROOT / "docs" / "install.md", "<!-- versions:begin -->", "<!-- versions:end -->"
PASSES = "`check` and the core tests"
PYTEST = ("-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider")
CHECK = ("check", "--quick", "--no-network", "--device", "cpu")
CORE = (
    "backends/cpu/test_block.py", "backends/cpu/test_chain.py", "backends/triton/test_chain.py", "models/test_checkpoint.py",
    "modules", "native/test_library.py", "ops", "patching/test_accelerate.py", "robustness/test_damaged_files.py",
    "robustness/test_faults.py",
)  # fmt: skip
FACTS = """
import platform, torch, triton, res2net_fused
from res2net_fused._native import library
assert res2net_fused.__file__.startswith({folder!r}), res2net_fused.__file__
status = library.cpu_library()
assert status.loaded, status.reason
print("|".join((platform.python_version(), torch.__version__, triton.__version__, platform.machine())))
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", help=f"version, or {NEWEST!r}; may be repeated ({OLDEST} and {NEWEST})")
    parser.add_argument("--triton", help="version (default: the one that torch asks for)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (default: this one)")
    parser.add_argument("--into", help="interpreter of an environment that is there: the wheel alone is installed into it")
    options, for_pytest = parser.parse_known_args(arguments)
    fitting = f"res2net_fused-*_{platform.machine()}.whl"
    wheels = sorted((ROOT / "dist").glob(fitting), key=lambda path: path.stat().st_mtime)
    if not wheels:
        print("versions: dist/ holds no wheel for this processor: run `make wheel`", file=sys.stderr)
        return 2
    outcome = {}
    for version in [options.into] if options.into else options.torch or (OLDEST, NEWEST):
        folder = FOLDER / re.sub("[^a-z0-9.]+", "-", f"torch-{version}")
        facts = f"{platform.python_version()}|{version}|{options.triton or 'as torch asks'}|{platform.machine()}"
        try:
            python = made(folder, version, options, wheels[-1])
            facts = within(
                folder, python, "-c", FACTS.format(folder=str(Path(python).parents[1])), stdout=subprocess.PIPE
            ).stdout.strip()
            outcome[facts] = f"passed {PASSES}{f': `{shlex.join(for_pytest)}`' if for_pytest else ''}"
            within(folder, python, "-m", "res2net_fused", *CHECK)
            within(folder, python, *PYTEST, *(str(ROOT / "tests" / name) for name in CORE), *for_pytest)
        except subprocess.CalledProcessError as error:
            outcome[facts] = f"FAILED: {' '.join(map(str, error.cmd[1:4]))}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        PAGE.write_text(with_row(PAGE.read_text(), facts, outcome[facts]))
    print("\n".join(["", *(f"{facts}: {what}" for facts, what in outcome.items())]))
    return int(any(what.startswith("FAILED") for what in outcome.values()))


def with_row(page: str, facts: str, result: str) -> str:
    """The page with this row in its table, in the place of an older one of the same versions; the newest versions first."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    head, rows = table.strip().splitlines()[:2], table.strip().splitlines()[2:]
    row = "| " + " | ".join((*facts.split("|"), time.strftime("%Y-%m-%d"), result)) + " |"
    versions = row.split(" | ")[:4]
    rows = [old for old in rows if old.split(" | ")[:4] != versions] + [row]
    rows.sort(key=lambda text: [tuple(map(int, re.findall(r"\d+", cell))) for cell in text.split("|")[2:0:-1]], reverse=True)
    return f"{before}{BEGIN}\n" + "\n".join([*head, *rows]) + f"\n{END}{after}"


def within(folder: Path, *command: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees neither the checkout nor what is installed beside the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    # CI: there a test fails whose package is missing, and these environments have none of the extras.
    left_out = ("PYTHONPATH", "CI")
    environment = {k: v for k, v in os.environ.items() if k not in left_out and not k.startswith("RES2NET_FUSED_")}
    return subprocess.run(command, cwd=folder, env=environment, check=True, text=True, **settings)


def made(folder: Path, version: str, options: argparse.Namespace, wheel: Path) -> str:
    """The interpreter of an environment with that torch and the wheel; CalledProcessError of what failed."""
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if options.into:
        here = ("-m", "pip", "--python", options.into, *pip[2:])
        within(folder, sys.executable, *here, "--no-deps", "--force-reinstall", "--no-index", str(wheel))
        return options.into
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    subprocess.run([options.python, "-m", "venv", str(folder)], check=True)
    torch = "torch" if version == NEWEST else f"torch=={version}"  # a CPU build does not bring Triton by itself
    within(folder, python, *pip, torch, "triton", "numpy", "tqdm", "pytest", "hypothesis", "safetensors")
    if options.triton:
        within(folder, python, *pip, "--no-deps", f"triton=={options.triton}")
    within(folder, python, *pip, "--no-deps", str(wheel))
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
