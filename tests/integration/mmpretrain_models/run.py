"""Compares mmpretrain's Res2Net networks, plain and accelerated, in eval and train mode, in float64.

    python tests/integration/mmpretrain_models/run.py

mmpretrain and what it imports come from PyPI into a virtual environment in build/, which sees this interpreter's packages. Its
wheel holds no tests. Exit status: 0 where all agree, 1 where one does not, 2 where it cannot be installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_environment import run_in

# mmpretrain refuses mmcv from 2.2 on.
PACKAGES = (
    "mmpretrain==1.2.0", "mmengine==0.10.7", "mmcv-lite==2.1.0", "addict", "yapf", "platformdirs", "termcolor", "rich",
    "einops",
    "model-index", "ordered-set", "click", "markdown", "mat4py", "importlib_metadata==8.5.0", "zipp", "opencv-python-headless",
    "matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing", "python-dateutil", "six", "pyyaml", "pillow",
    "packaging", "pygments", "markdown-it-py", "mdurl",
)  # fmt: skip
SETTINGS = ({"depth": 50}, {"depth": 101, "scales": 4, "base_width": 26}, {"depth": 50, "deep_stem": True, "avg_down": True})


def main() -> int:
    return compare() if "--compare" in sys.argv else run_in("mmpretrain", PACKAGES, __file__, "--compare")


def compare() -> int:
    import copy

    import torch
    from mmpretrain.models.backbones import Res2Net

    import res2net_fused as rf

    wrong = 0
    for settings in SETTINGS:
        torch.manual_seed(0)
        plain = Res2Net(out_indices=(0, 1, 2, 3), **settings).double()
        for bn in plain.modules():
            if isinstance(bn, torch.nn.BatchNorm2d):
                bn.running_var.uniform_(0.5, 2)
                bn.running_mean.normal_(0, 0.1)
        accelerated = rf.accelerate(copy.deepcopy(plain), recompute=True)  # which runs the operator in training too
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        for training in (False, True):
            plain.train(training), accelerated.train(training)  # which return nothing
            with torch.set_grad_enabled(training):
                own, ours = plain(x), accelerated(x)
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, own, strict=True))
            reports = rf.explain(accelerated)
            fused = sum(report.fused is True for report in reports)
            wrong += error > 1e-9 or fused < len(reports)
            mode = "train" if training else "eval"
            print(f"{settings} {mode}: {fused} of {len(reports)} blocks fused, relative error {error:.1e}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
