""".ci/fit_torchvision.py: a torchvision whose operators are of another build than torch, and what is done about it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tree import ROOT

TOOL = ROOT / ".ci" / "fit_torchvision.py"

# What torchvision does at its import, without the rest of it: first the binary, then shapes for two of its operators.
PACKAGE = {
    "__init__.py": "from . import extension\nfrom torchvision import _meta_registrations\n",
    "_meta_registrations.py": (
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda *arguments: None)\n"
    ),
}
NO_BINARY = "loaded = False\n"
BINARY = (
    "import torch\n"
    "library = torch.library.Library('torchvision', 'DEF')\n"
    "for name in ('nms', 'qnms'):\n"
    "    library.define(f'{name}(Tensor boxes) -> Tensor')\n"
)


@pytest.fixture
def tool():
    specification = importlib.util.spec_from_file_location("fit_torchvision", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def environment(tmp_path):
    """python(arguments) of a virtual environment with this torch and a torchvision whose binary does not load."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parent.parent))
    (site / "torchvision").mkdir()
    for name, text in {**PACKAGE, "extension.py": NO_BINARY}.items():
        (site / "torchvision" / name).write_text(text)
    (site / "torchvision-0.1.dist-info").mkdir()
    (site / "torchvision-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")

    def python(*arguments):
        command = [str(folder / "bin" / "python"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    python.site = site
    return python


@pytest.mark.slow  # waits for an index of wheels; make runs the same
def test_torchvision_goes_without_a_binary_that_does_not_load(environment):
    use = ("-c", "import torchvision, torch; print(torch.ops.torchvision.nms.default._schema)")
    done = environment(*use)
    assert done.returncode != 0 and "operator torchvision::nms does not exist" in done.stderr, done.stderr
    done = environment(TOOL)
    assert done.returncode == 0 and "can be imported, without its compiled operators" in done.stdout, done.stdout + done.stderr
    done = environment(*use)
    assert done.returncode == 0 and "iou_threshold" in done.stdout, done.stderr
    # A torchvision that fits is installed later: its own operators are the ones that count.
    (environment.site / "torchvision" / "extension.py").write_text(BINARY)
    done = environment(*use)
    assert done.returncode == 0 and "(Tensor boxes)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("failures", "done", "sentence"),
    [
        ([None], [], "^torchvision can be imported$"),
        (["nms", None], ["wheel"], "was replaced by the build that fits"),
        (["nms", "nms", None], ["wheel", "shim"], "without its compiled operators"),
        (["nms"] * 3, ["wheel", "shim"], r"cannot be imported \(nms\): install the release and build that"),
    ],
    ids=["fits", "index", "shim", "nothing helps"],
)
def test_one_way_after_the_other(tool, monkeypatch, failures, done, sentence):
    left, found = list(failures), []
    monkeypatch.setattr(tool.importlib.metadata, "version", lambda name: "0.28.0")
    monkeypatch.setattr(tool, "why_not", lambda module: left.pop(0))
    monkeypatch.setattr(tool, "install_fitting", lambda wheels: found.append("wheel"))
    monkeypatch.setattr(tool, "install_shim", lambda: found.append("shim"))
    assert re.search(sentence, tool.fit())
    assert found == done and not left


def test_the_wheel_of_torchs_own_build_is_asked_for(tool, monkeypatch):
    calls = []
    monkeypatch.setattr(tool.importlib.metadata, "version", lambda name: "0.28.0+cu130")
    monkeypatch.setattr(tool.subprocess, "run", lambda command, **settings: calls.append(command))
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    tool.install_fitting("https://example.org/whl")
    (call,) = calls
    assert call[-3:] == ["--extra-index-url", "https://example.org/whl/cpu", "torchvision==0.28.0+cpu"]
    assert "--no-deps" in call, "its dependencies would change torch"
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    tool.install_fitting("https://example.org/whl")
    assert len(calls) == 1, "which build that is, nothing says"


def test_a_timm_that_does_not_import_is_told(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "fit", lambda: "torchvision can be imported")
    monkeypatch.setattr(tool, "why_not", lambda module: "ModuleNotFoundError: No module named 'yaml'")
    tool.main()
    assert "timm cannot be imported (ModuleNotFoundError: No module named 'yaml')" in capsys.readouterr().out
