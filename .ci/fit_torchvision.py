"""Sees to it that torchvision, and so timm, can be imported beside the torch of this environment.

    python .ci/fit_torchvision.py

PyPI has one build of each torchvision, for the CUDA of PyPI's torch: its compiled operators do not load beside a torch of
another build, such as one for CPUs. Where the import fails, PyTorch's own index of wheels is tried for the build of this torch.
Where that cannot be reached either, torchvision goes without its compiled operators (torchvision_without_binary.py): what is
written in Python works, all of timm and torchvision's networks and heads, and `nms` and `roi_align` say that they are missing.

The exit status is 0 in any case, and a sentence says what does not work: the package itself needs neither of the two.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

WHEELS = "https://download.pytorch.org/whl"
SHIM = Path(__file__).with_name("torchvision_without_binary.py")
TIMEOUT_S = 15


def why_not(module: str) -> str | None:
    """None where the module can be imported in a fresh process, else the last line of the error."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def build_of_torch() -> str | None:
    """What stands behind the + of torch's version, such as cpu or cu130."""
    import torch

    return torch.__version__.partition("+")[2] or None


def install_fitting(wheels: str) -> None:
    """Installs the same release of torchvision in the build of this torch, where that can be had."""
    build = build_of_torch()
    if build is None:
        return
    release = importlib.metadata.version("torchvision").partition("+")[0]
    print(f"torchvision: trying release {release} in the build {build}", flush=True)
    # The exact version with its build: what the user's own indexes have beside it cannot be taken for it.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    limits = ["--retries", "0", "--timeout", str(TIMEOUT_S)]
    where = ["--extra-index-url", f"{wheels}/{build}"]
    subprocess.run([*pip, *limits, *where, f"torchvision=={release}+{build}"], capture_output=True)


def install_shim() -> None:
    """Copies the module into site-packages, with the line that has Python import it at its start."""
    site = Path(sysconfig.get_path("purelib"))
    shutil.copy2(SHIM, site)
    (site / f"{SHIM.stem}.pth").write_text(f"import {SHIM.stem}\n")


def fit(wheels: str = WHEELS) -> str:
    """Tries one way after the other; returns the sentence that says what works."""
    try:
        importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return "torchvision is not installed: pip install --no-deps torchvision"
    if why_not("torchvision") is None:
        return "torchvision can be imported"
    install_fitting(wheels)
    if why_not("torchvision") is None:
        return "torchvision was replaced by the build that fits this torch"
    install_shim()
    reason = why_not("torchvision")
    if reason is None:
        return "torchvision can be imported, without its compiled operators, which are of another build than this torch"
    return f"torchvision cannot be imported ({reason}): install the release and build that belong to this torch"


def main() -> None:
    print(fit())
    reason = why_not("timm")
    if reason is not None:
        print(f"timm cannot be imported ({reason}): what is written for it, such as examples/accelerate_timm.py, will not run")


if __name__ == "__main__":
    main()
