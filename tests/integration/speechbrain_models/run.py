"""Runs the doctests of SpeechBrain's ECAPA-TDNN plain and accelerated, and compares its networks both ways in float64.

    python tests/integration/speechbrain_models/run.py

SpeechBrain's sdist and what it imports come from PyPI into a virtual environment in build/, which sees this interpreter's
packages; the sdist's tests of these modules are doctests. Exit status: 0 where every doctest that passes plain passes
accelerated and all networks agree, 1 where one does not, 2 where it cannot be installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_environment import run_in

PACKAGES = (
    "--no-binary=speechbrain", "speechbrain==1.0.3", "hyperpyyaml==1.2.2", "ruamel.yaml==0.18.6", "joblib==1.4.2",
    "huggingface_hub==0.26.2", "sentencepiece==0.2.1", "scipy", "tqdm", "requests", "filelock", "pyyaml", "packaging",
    "charset-normalizer", "idna", "urllib3", "certifi",
)  # fmt: skip
SMALL = {"channels": [64, 64, 64, 64, 192], "lin_neurons": 48, "attention_channels": 16, "se_channels": 16}
NETWORKS = {
    "ECAPA-TDNN": {},
    "scale 4, global context off": {"res2net_scale": 4, "global_context": False},
    "kernels of 5 and dropout": {"kernel_sizes": [5, 5, 3, 3, 1], "dropout": 0.2},
    "leaky ReLU": {"activation": "LeakyReLU"},
    "GELU": {"activation": "GELU"},
}


def main() -> int:
    if "--compare" not in sys.argv:
        return run_in("speechbrain", PACKAGES, __file__, "--compare")
    stand_in_for_torchaudio()
    return int(not (doctests_pass() & networks_agree()))


def stand_in_for_torchaudio() -> None:
    """Of which these modules use nothing, but which SpeechBrain imports; there is none for every torch."""
    import importlib.machinery
    import types

    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        module = sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        module.__version__ = "2.1.0"  # type: ignore[attr-defined]
        module.list_audio_backends = lambda: ["soundfile"]  # type: ignore[attr-defined]


def doctests_pass() -> bool:
    """Whether no doctest fails accelerated that passes plain."""
    from speechbrain.lobes.models import ECAPA_TDNN

    import res2net_fused as rf

    plain = doctests(ECAPA_TDNN)
    own = ECAPA_TDNN.Res2NetBlock.__init__

    def accelerated(self: Any, *arguments: Any, **keywords: Any) -> None:
        own(self, *arguments, **keywords)
        rf.accelerate(self)
        made.append(self)

    made: list[Any] = []
    ECAPA_TDNN.Res2NetBlock.__init__ = accelerated
    ours = doctests(ECAPA_TDNN)
    ECAPA_TDNN.Res2NetBlock.__init__ = own
    fused = sum(type(block) is not ECAPA_TDNN.Res2NetBlock for block in made)
    lost = [name for name, failed in plain.items() if not failed and ours[name]]
    passed = [sum(not failed for failed in found.values()) for found in (plain, ours)]
    print(f"doctests: {len(plain)}, plain {passed[0]}, accelerated {passed[1]}; {fused} of {len(made)} blocks taken over")
    print("".join(f"lost: {name}\n" for name in lost), end="")
    return passed[0] > 0 and not lost and 0 < fused == len(made)


def doctests(module: Any) -> dict[str, int]:
    """How many examples of each of the module's doctests fail."""
    import doctest

    runner = doctest.DocTestRunner(verbose=False)
    return {test.name: runner.run(test).failed for test in doctest.DocTestFinder().find(module) if test.examples}


def networks_agree() -> bool:
    """Whether networks compute accelerated what they do plain: fused in eval mode, by their own forward in training."""
    import copy

    import torch
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    import res2net_fused as rf

    wrong = 0
    for name, settings in NETWORKS.items():
        torch.manual_seed(0)
        activation = getattr(torch.nn, settings.get("activation", "ReLU"))  # type: ignore[call-overload]
        plain = ECAPA_TDNN(40, **SMALL, **{**settings, "activation": activation}).double()
        for norm in plain.modules():
            if isinstance(norm, torch.nn.BatchNorm1d):
                norm.running_var.uniform_(0.5, 2)
                norm.running_mean.normal_(0, 0.1)
        accelerated = rf.accelerate(copy.deepcopy(plain), backend="cpu")
        x, lengths = torch.randn(2, 61, 40, dtype=torch.float64), torch.tensor([1.0, 0.7], dtype=torch.float64)
        for training in (False, True):
            plain.train(training), accelerated.train(training)
            results = []
            for network in (plain, accelerated):
                torch.manual_seed(1)  # dropout
                with torch.set_grad_enabled(training):
                    results.append(network(x, lengths))
            error = ((results[1] - results[0]).norm() / results[0].norm()).item()
            reports = rf.explain(accelerated)
            fused = sum(report.fused is True for report in reports)
            wrong += error > 1e-9 or len(reports) != 3 or fused != (0 if training else 3)
            mode = "train" if training else "eval"
            print(f"{name}, {mode}: {fused} of {len(reports)} blocks fused, relative error {error:.1e}", flush=True)
    return wrong == 0


if __name__ == "__main__":
    sys.exit(main())
