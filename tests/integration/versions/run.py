"""Tries the wheel in dist/ with other versions of torch: its own check, then the core tests, each in a fresh environment.

    python tests/integration/versions/run.py                                    # the oldest supported torch, then the newest
    python tests/integration/versions/run.py --torch 2.11.0 --python python3.10 # one, under another Python
    python tests/integration/versions/run.py --torch 2.13.0 --triton 3.9.0      # with another Triton than the torch asks for

Environments lie under build/versions, one at a time: PyPI's torch has CUDA and takes 5 GB. pip's own variables choose another
index, such as one of CPU builds. Other arguments are pytest's. Exit status: 0 where everything passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "versions"
OLDEST, NEWEST = "2.11.0", "newest"
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
print("Python", platform.python_version() + ", torch", torch.__version__ + ", Triton", triton.__version__)
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", help=f"version, or {NEWEST!r}; may be repeated ({OLDEST} and {NEWEST})")
    parser.add_argument("--triton", help="version (default: the one that torch asks for)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (default: this one)")
    options, for_pytest = parser.parse_known_args(arguments)
    wheels = sorted((ROOT / "dist").glob("res2net_fused-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        print("versions: dist/ holds no wheel: run `make wheel`", file=sys.stderr)
        return 2
    outcome = {}
    for version in options.torch or (OLDEST, NEWEST):
        folder = FOLDER / f"torch-{version}"
        try:
            outcome[version] = tried(folder, version, options, wheels[-1], for_pytest)
        except subprocess.CalledProcessError as error:
            outcome[version] = f"FAILED: {' '.join(map(str, error.cmd))[:200]}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["", *(f"torch {version}: {what}" for version, what in outcome.items())]))
    return int(any(what.startswith("FAILED") for what in outcome.values()))


def tried(folder: Path, version: str, options: argparse.Namespace, wheel: Path, for_pytest: Sequence[str]) -> str:
    """Makes the environment in `folder` and tries the wheel there; CalledProcessError of what failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # What is installed here, and the checkout, must stay out of it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RES2NET_FUSED_")}
    python = str(folder / "bin" / "python")

    def run(*command: str, **settings: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=environment, check=True, text=True, **settings)

    subprocess.run([options.python, "-m", "venv", str(folder)], check=True)
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    torch = "torch" if version == NEWEST else f"torch=={version}"  # a CPU build does not bring Triton by itself
    run(*install, torch, "triton", "numpy", "tqdm", "pytest", "hypothesis", "safetensors")
    if options.triton:
        run(*install, "--no-deps", f"triton=={options.triton}")
    run(*install, "--no-deps", str(wheel))
    facts = run(python, "-c", FACTS.format(folder=str(folder)), stdout=subprocess.PIPE).stdout.strip()
    print(facts, flush=True)
    run(str(folder / "bin" / "res2net-fused"), *CHECK)
    tests = [str(ROOT / "tests" / name) for name in CORE]
    run(
        python, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider",
        *tests, *for_pytest,
    )  # fmt: skip
    return f"passed with {facts}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
