"""The examples in a short form, and what they compute."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, timm_or_skip
from networks import TINY, pair, tiny_pair

from res2net_fused import explain
from res2net_fused.models.registry import create_model

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def example(monkeypatch):
    """An example as a module, by its name; other examples can import it."""

    def load(name):
        specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, name, module)
        specification.loader.exec_module(module)
        return module

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load
    torch.set_num_threads(threads)


@pytest.fixture
def digits(example):
    pytest.importorskip("sklearn")
    return example("train_digits")


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_digits_are_learnt_alike_by_both_paths(digits, tmp_path):
    curves = digits.train_both(epochs=3)
    fused, reference = curves["fused"], curves["reference"]
    assert len(fused.loss) == len(reference.loss) == 3 * 22
    # The first steps agree but for rounding; later ones drift apart as any two runs of different rounding do.
    assert fused.loss[:4] == pytest.approx(reference.loss[:4], rel=1e-3)
    for curve in (fused, reference):
        assert curve.loss[0] > 1.5 > 0.7 > sum(curve.loss[-5:]) / 5
        assert curve.accuracy[-1] > 0.85
    assert abs(fused.accuracy[-1] - reference.accuracy[-1]) < 0.08
    digits.plot(curves, str(tmp_path / "digits.png"))
    assert is_picture(tmp_path / "digits.png")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_examples(name):
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py"), "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout and f"python examples/{name}.py" in done.stdout


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50d"])
def test_blocks_of_timm(name, example, monkeypatch, capsys):
    timm = timm_or_skip()
    own = timm.models.res2net.Bottle2neck
    run_main(example("accelerate_timm"), monkeypatch, "--model", name, "--size", "64")
    out = capsys.readouterr().out
    assert "16 of 16 blocks fused" in out
    differences = [float(line.split("relative difference ")[1].split()[0]) for line in out.splitlines() if "relative" in line]
    assert len(differences) == 2 and all(0 < difference < 1e-4 for difference in differences)
    assert timm.models.res2net.Bottle2neck is own


def test_a_timm_that_cannot_be_imported_is_told(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit, match="timm cannot be imported.*\n.*pip install"):
        run_main(example("accelerate_timm"), monkeypatch)


@pytest.mark.slow
def test_latency_by_scale(example, tmp_path):
    module = example("scale_latency")
    medians = module.milliseconds(1, 32, 2, layers=(1, 1, 1, 1))
    assert list(medians) == ["PyTorch", "fused"]
    assert all(list(by_scale) == [1, 2, 4, 8] and min(by_scale.values()) > 0 for by_scale in medians.values())
    module.plot(medians, "title", str(tmp_path / "scale.png"))
    assert is_picture(tmp_path / "scale.png")


@pytest.mark.slow
def test_export(example, tmp_path, monkeypatch, capsys):
    state = create_model("res2net50_14w_8s").state_dict()
    torch.save(state, tmp_path / "weights.pth")
    arguments = ("--model", "res2net50_14w_8s", "--checkpoint", tmp_path / "weights.pth", "--size", "64", "--out", tmp_path)
    run_main(example("export_model"), monkeypatch, *arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if "relative difference" in line]
    assert str(tmp_path / "res2net50_14w_8s.pt2") in lines[0]
    assert len(lines) == 1 + (tmp_path / "res2net50_14w_8s.onnx").exists()
    assert all(float(line.split()[-1]) < 1e-4 for line in lines)


# Class activation maps ------------------------------------------------------------------------------------------------


@pytest.fixture
def maps(example):
    return example("class_activation_maps")


def grad_cam_by_hand(model, stage, images):
    """The map of the likeliest class from the stage's output alone, with the rest of the network as a function of it."""
    features = [images]
    with torch.no_grad():
        features += model.stages(images)
    x = features[stage].clone().requires_grad_()
    out = x
    for i in range(stage, len(model.feature_channels)):
        out = model.get_submodule(f"layer{i + 1}")(out)
    (gradients,) = torch.autograd.grad(model.classify(out).amax(1).sum(), x)
    return (gradients.mean((2, 3), keepdim=True) * x).sum(1).relu().detach()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_grad_cam_of_an_accelerated_model_is_the_references(maps, name, stage):
    plain, fused = tiny_pair(name)
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    results = [maps.grad_cam(model, model.get_submodule(f"layer{stage}"), images) for model in (plain, fused)]
    assert all(report.fused for report in explain(fused))
    assert_close(results[1][0], results[0][0], 1e-10)
    assert torch.equal(results[1][1], results[0][1])
    small = grad_cam_by_hand(plain, stage, images)
    large = torch.nn.functional.interpolate(small[:, None], (33, 47), mode="bilinear", align_corners=False)[:, 0]
    assert_close(results[1][0], large / large.amax((1, 2), keepdim=True), 1e-10)
    assert images.grad is None and not images.requires_grad


def test_grad_cam_in_float32_of_trees(maps):
    plain, fused = pair("dla60_res2net")
    images = torch.randn(2, 3, 64, 64)
    results = [maps.grad_cam(model, model.level4, images, torch.tensor([3, 7]))[0] for model in (plain, fused)]
    assert_close(results[1], results[0], 1e-4)


@pytest.mark.slow
def test_maps_of_photographs(maps, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    files = []
    for name in ("res2net50_26w_4s", "resnet50"):
        files.append(tmp_path / f"{name}.pth")
        torch.save(create_model(name).state_dict(), files[-1])
    run_main(maps, monkeypatch, "--checkpoint", *files, "--out", tmp_path / "maps.png")
    assert is_picture(tmp_path / "maps.png")


@pytest.mark.slow
def test_maps_of_digits(maps, digits, tmp_path, monkeypatch, capsys):
    run_main(maps, monkeypatch, "--epochs", "3", "--out", tmp_path / "maps.png")
    assert is_picture(tmp_path / "maps.png")
    assert float(capsys.readouterr().out.split("test accuracy ")[1].split()[0]) > 85
