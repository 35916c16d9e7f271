"""`load_checkpoint`: files of the official implementation, of timm and of this package, and what does not fit."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, import_timm, randomize
from networks import TIMM_NAMES, few_blocks, images_for, is_dla, quick, small, timm_network
from torch import nn

from res2net_fused import Bottle2neck, accelerate
from res2net_fused.models.checkpoint import load_checkpoint
from res2net_fused.models.registry import create_model
from res2net_fused.models.res2net import Res2Net
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

QUICK = ("res2net50_v1b", "res2next50", "se_res2net50", "dla60_res2net", "se_resnet50", "dla60")
timm_names = pytest.mark.parametrize("name", quick(TIMM_NAMES, *QUICK))
ROUNDING = 1e-4  # of a whole network in fp32; other semantics differ in the first digit


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


def assert_same_weights(model, state):
    own = model.state_dict()
    assert set(own) == set(state)
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())


def tiny(block=Bottle2neck, **keywords):
    return Res2Net((2, 1), 26, 4, block, num_classes=10, planes=(16, 32), **keywords)


def weights(seed=0):
    return randomize(tiny(), seed).state_dict()


# timm -----------------------------------------------------------------------------------------------------------------


@timm_names
def test_timm_files_give_timm_outputs(name, tmp_path):
    images = images_for(name)
    theirs = randomize(timm_network(name, few_blocks(name), num_classes=10))
    path = save(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = load_checkpoint(small(name), path)
    for training in (False, True):
        with torch.no_grad():
            assert_close(ours.train(training)(images), theirs.train(training)(images), ROUNDING)


@pytest.mark.slow
@timm_names
def test_full_timm_networks(name, tmp_path):
    images = images_for(name)
    theirs = timm_network(name)
    ours = load_checkpoint(create_model(name), save(theirs.state_dict(), tmp_path / "timm.pth")).eval()
    with torch.no_grad():
        assert_close(ours(images), theirs(images), ROUNDING)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", quick(("res2net50_v1b", "res2net50_26w_4s", "res2next50"), "res2net50_v1b") + ["resnet50"])
def test_dilated_as_timm(name, output_stride, tmp_path):
    """Every stage's features, of sizes that no stride divides."""
    layers = (1, 1, 2, 2)
    theirs = randomize(timm_network(name, layers, output_stride=output_stride, num_classes=10))
    ours = small(name, layers=layers, output_stride=output_stride).eval()
    load_checkpoint(ours, save(theirs.state_dict(), tmp_path / "timm.pt"))
    images = torch.randn(2, 3, 61, 74)
    with torch.no_grad():
        assert_close(ours(images), theirs(images), ROUNDING)
        own = theirs.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
        for feature, expected in zip(ours.stages(images), own, strict=True):
            assert_close(feature, expected, ROUNDING)


@timm_names
def test_ours_load_into_timm(name):
    """Where keys are published for Res2Net they are ours too; the baselines' are renamed by `load_checkpoint` alone."""
    theirs = timm_network(name, few_blocks(name), num_classes=10)
    state = small(name).state_dict()
    if "res2" in name:
        theirs.load_state_dict(state)
    else:
        assert {k.replace("convs.0.", "conv2.").replace("bns.0.", "bn2.") for k in state} == set(theirs.state_dict())


# Formats --------------------------------------------------------------------------------------------------------------

FORMATS = {
    "plain": lambda state: state,
    "nested": lambda state: {"epoch": 90, "arch": "res2net", "best_acc1": 77.9, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "twice": lambda state: {"model": {"state_dict": state}},
    "parallel": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("suffix", [".pth", ".tar"])
def test_nesting_and_prefixes(form, suffix, tmp_path):
    state = weights(3)
    model = tiny()
    assert load_checkpoint(model, save(FORMATS[form](state), tmp_path / f"file{suffix}")) is model
    assert_same_weights(model, state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(prefix, tmp_path):
    state = weights(3)
    path = save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / "file.safetensors")
    assert_same_weights(load_checkpoint(tiny(), str(path)), state)


def test_files_without_counts_of_batches(tmp_path):
    """A state_dict of PyTorch before 0.4.1, with which the first official checkpoints were written."""
    state = weights(3)
    old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert_same_weights(load_checkpoint(tiny(), save(old, tmp_path / "old.pth")), state)


def test_unused_projections_of_the_official_dla(tmp_path):
    with torch.device("meta"):
        model = create_model("dla60_res2net")
    model.to_empty(device="cpu")
    state = {key: torch.full_like(tensor, i) for i, (key, tensor) in enumerate(model.state_dict().items())}
    official = dict(state)
    for tree, channels in (("level3", (128, 256)), ("level4", (256, 512)), ("level4.tree1", (256, 512))):
        official[f"{tree}.project.0.weight"] = torch.randn(channels[1], channels[0], 1, 1)
        official[f"{tree}.project.1.running_mean"] = torch.randn(channels[1])
    assert_same_weights(load_checkpoint(model, save(official, tmp_path / "dla.pth")), state)
    official["level2.project.2.weight"] = torch.randn(1)
    with pytest.raises(RuntimeError, match="1 unexpected:\n    level2.project.2.weight$"):
        load_checkpoint(model, save(official, tmp_path / "dla.pth"))


def test_a_backbone_takes_files_with_a_classifier(tmp_path):
    state = weights(3)
    backbone = tiny(features_only=True)
    load_checkpoint(backbone, save(state, tmp_path / "whole.pth"))
    assert_same_weights(backbone, {key: tensor for key, tensor in state.items() if not key.startswith("fc.")})


def test_weights_take_the_models_dtype(tmp_path):
    state = weights(3)
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    path = save(halves, tmp_path / "half.pth")
    model = load_checkpoint(tiny(), path)
    assert model.fc.weight.dtype == torch.float32 and torch.equal(model.fc.weight, state["fc.weight"].half().float())


def test_what_was_folded_before_is_folded_again(tmp_path):
    images, path = torch.randn(2, 3, 64, 64), save(weights(3), tmp_path / "file.pth")
    model, plain = tiny().eval(), tiny(ReferenceBottle2neck).eval()
    accelerated = accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        before = model(images)
        for network in (model, plain, accelerated):
            network(images)
            load_checkpoint(network, path)
        assert_close(model(images), plain(images), ROUNDING)
        assert_close(accelerated(images), plain(images), ROUNDING)
        assert (model(images) - before).norm() > 0.1 * before.norm()


# What does not fit ----------------------------------------------------------------------------------------------------


def test_one_error_lists_every_key_and_nothing_is_loaded(tmp_path):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    state = weights(3)
    state["fc.weight"], state["fc.bias"] = torch.zeros(7, 128), torch.zeros(7)
    del state["layer1.0.convs.1.weight"], state["bn1.running_var"]
    state["layer9.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        load_checkpoint(model, save(state, tmp_path / "other.pth"))
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'other.pth'} does not fit the Res2Net:",
        "  2 missing:",
        "    bn1.running_var",
        "    layer1.0.convs.1.weight",
        "  1 unexpected:",
        "    layer9.extra",
        "  2 of another shape:",
        "    fc.weight (7, 128), the model has (10, 128)",
        "    fc.bias (7,), the model has (10,)",
    ]
    assert_same_weights(model, before)


def test_another_network_is_refused(tmp_path):
    path = save(small("dla60_res2net").state_dict(), tmp_path / "dla.pth")
    with pytest.raises(RuntimeError, match="missing.*unexpected"):
        try:
            load_checkpoint(tiny(), path)
        except RuntimeError as error:
            raise RuntimeError(str(error).replace("\n", " ")) from None


class Evil:
    def __reduce__(self):
        return pickle.loads, (b"not reached",)


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {"conv1.weight": torch.zeros(1)}, "hook": Evil()}, nn.Linear(2, 2)],
    ids=["object", "module"],
)
def test_nothing_of_a_file_is_executed(content, tmp_path):
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="evil.pth holds more than tensors and plain values"):
        load_checkpoint(tiny(), tmp_path / "evil.pth")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {}, {"epoch": 3}, {"model": {"a": torch.zeros(1), "b": 2}}], ids=str)
def test_files_without_a_state_dict(content, tmp_path):
    with pytest.raises(RuntimeError, match="file.pth holds no state_dict"):
        load_checkpoint(tiny(), save(content, tmp_path / "file.pth"))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tiny(), tmp_path / "none.pth")


def test_timm_knows_the_names():
    timm = import_timm()
    if timm is None:
        pytest.skip("timm is not installed")
    assert set(TIMM_NAMES.values()) <= set(timm.list_models()) and any(map(is_dla, TIMM_NAMES))
