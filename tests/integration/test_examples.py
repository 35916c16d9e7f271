"""The examples in a short form, and what they compute."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_close, timm_or_skip
from networks import TINY, pair, tiny_pair
from tree import ROOT

from res2net_fused import explain
from res2net_fused.models.registry import create_model

EXAMPLES = ROOT / "examples"
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


def test_help_has_examples(tmp_path):
    """It works from any folder; of all in one process, which imports torch once."""
    code = (
        "import contextlib, runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    print('end of', script)\n"
    )
    scripts = [str(EXAMPLES / f"{name}.py") for name in SCRIPTS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(ROOT)])}
    command = [sys.executable, "-c", code, *scripts]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for name, script in zip(SCRIPTS, scripts, strict=True):
        text, _, rest = done.stdout.partition(f"end of {script}\n")
        assert "examples:" in text and f"python examples/{name}.py" in text, (name, text, rest)
        done.stdout = rest


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


@pytest.mark.parametrize("name, module", [("train_digits", "sklearn.datasets"), ("scale_latency", "tqdm")])
def test_what_an_example_needs_is_told_in_one_sentence(name, module, example, monkeypatch):
    loaded = example(name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"pip install 'res2net-fused\[bench\]'"):
        loaded.load_digits() if name == "train_digits" else loaded.milliseconds(1, 32, 1, layers=(1, 1, 1, 1))


# Dense prediction -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(example):
    return example("dense_prediction")


@pytest.mark.parametrize("heads", [pytest.param("torchvision's", marks=pytest.mark.slow), "small ones of this example"])
def test_dense_prediction_is_learnt_alike_by_both_paths(heads, dense, monkeypatch, tmp_path, capsys):
    if heads == "torchvision's":
        pytest.importorskip("torchvision.models.detection.retinanet")
    else:
        monkeypatch.setitem(sys.modules, "torchvision.models.detection.retinanet", None)
    curves, own = {}, dense.plot
    monkeypatch.setattr(dense, "plot", lambda losses, *rest: (curves.update(losses), own(losses, *rest)))
    picture = tmp_path / "new" / "dense.png"
    run_main(dense, monkeypatch, "--quick", "--planes", 16, 16, 16, 32, "--out", picture)
    assert f"heads: {heads}" in capsys.readouterr().out and is_picture(picture)
    assert list(curves) == ["segmentation", "detection"]
    for task, by_path in curves.items():
        plain, fused = by_path["PyTorch"], by_path["fused"]
        assert len(plain) == len(fused) == 12
        assert fused[:4] == pytest.approx(plain[:4], rel=1e-3), task
        assert fused != plain, "both are one and the same path"
        for losses in (plain, fused):
            assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), (task, losses)


def test_frozen_norms_stay_as_they_are(dense):
    (_, fused) = dense.both_paths("detection", (1, 1, 1, 1), (16, 16, 16, 32), 48, "cpu", 0).values()
    before = {key: value.clone() for key, value in fused.backbone.state_dict().items()}
    dense.train(fused, 48, 2, 2, "cpu", 0, "training")
    changed = {key for key, value in fused.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert "layer4.0.convs.0.weight" in changed, "the chains learn"
    assert not [key for key in changed if "bn" in key or "running" in key or "num_batches" in key]


def test_boxes_and_pixels_of_drawings_belong_together(dense):
    seen = dense.drawings(20, 64, torch.Generator().manual_seed(0))
    kinds = set()
    for labels, boxes, classes in zip(seen.pixels, seen.boxes, seen.classes, strict=True):
        covered = torch.zeros_like(labels)
        for (x0, y0, x1, y1), kind in zip(boxes.long().tolist(), classes.tolist(), strict=True):
            part = labels[y0:y1, x0:x1]
            assert set(part.unique().tolist()) <= {0, kind}
            assert (part > 0).any(0).all() and (part > 0).any(1).sum() >= y1 - y0 - 1
            covered[y0:y1, x0:x1] = 1
            kinds.add(kind)
        assert not labels[covered == 0].any()
    assert kinds == {1, 2, 3}


def test_boxes_are_found_where_the_head_says(dense):
    anchors = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [40, 40, 60, 60]])
    boxes = torch.tensor([[2.0, 1, 14, 9], [2, 1, 14, 9], [35, 42, 66, 50]])
    assert_close(dense.decode(dense.encode(boxes, anchors), anchors), boxes, 1e-6)
    assert dense.overlaps(anchors[:1], anchors)[0].tolist() == pytest.approx([1, 81 / 119, 0])
    scores = torch.tensor([[[-9.0, 2, -9], [-9, 1, -9], [3, -9, -9]]])
    out = (scores, dense.encode(boxes, anchors)[None], anchors)
    ((found, classes),) = dense.Detector.found(lambda images: out, torch.zeros(1, 3, 64, 64))
    assert classes.tolist() == [1, 2], "the second of the equal boxes is dropped"
    assert_close(found, boxes[[2, 0]], 1e-6)


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


def test_a_map_leaves_the_image_where_nothing_speaks_for_the_class(maps, tmp_path):
    """Digits of 8x8 pixels are made large and smooth; where a map is 0 the picture is the image's grey, else it has colour."""
    import matplotlib.image

    large = maps.enlarged(torch.rand(2, 1, 8, 8))
    assert large.shape == (2, 1, 240, 240) and 0 <= large.min() and large.max() <= 1
    assert (large[..., 1:] - large[..., :-1]).abs().max() < 0.1, "steps as of pixels"
    heat = torch.zeros(1, 8, 8)
    heat[:, :, 5:] = 1
    maps.draw([("stage", torch.rand(1, 1, 8, 8), heat, torch.tensor([3]))], str(tmp_path / "maps.png"))
    picture = torch.from_numpy(matplotlib.image.imread(tmp_path / "maps.png"))[..., :3]
    lower = picture[picture.shape[0] // 2 :]
    colour = (lower.amax(2) - lower.amin(2)).amax(0)  # by column
    width = int(0.8 * len(colour))  # without the bar
    assert colour[: width // 3].max() < 0.05 < 0.5 < colour[width // 2 : width].max()


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
