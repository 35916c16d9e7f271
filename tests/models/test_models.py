"""The networks: sizes of the published tables, published keys, features of every stage, and fused against plain PyTorch."""

import copy

import pytest
import torch
from helpers import assert_close, relative_error
from networks import FAMILIES, images_for, is_dla, pair, quick, small, tiny_pair
from torch.utils.flop_counter import FlopCounterMode

from res2net_fused import accelerate, explain
from res2net_fused.bench.sample_images import calibrate
from res2net_fused.chain.tolerances import network_bound
from res2net_fused.models.layers import DropPath
from res2net_fused.models.registry import ALIASES, CONFIGURATIONS, create_model, list_models, model_name
from res2net_fused.models.res2net import Res2Net, res2net50, resnet50
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

every_name = pytest.mark.parametrize("name", list_models())
families = pytest.mark.parametrize("name", FAMILIES)

# Millions of parameters and billions of multiply-adds at 224x224, from the papers' tables and timm's; None: not published.
PUBLISHED = {
    "res2net50_48w_2s": (25.29, 4.18),
    "res2net50_26w_4s": (25.70, 4.28),
    "res2net50_14w_8s": (25.06, 4.21),
    "res2net50_26w_6s": (37.05, 6.33),
    "res2net50_26w_8s": (48.40, 8.37),
    "res2net50_18w_4s": (None, 2.9),
    "res2net101_26w_4s": (45.21, 8.10),
    "res2net50_v1b": (25.72, 4.52),
    "res2net101_v1b": (45.23, 8.35),
    "res2next50": (24.67, 4.20),
    "dla60_res2net": (20.85, 4.15),
    "dla60_res2next": (17.03, 3.49),
    "resnet50": (25.56, 4.11),
    "resnext50_32x4d": (25.03, 4.26),
    "se_resnet50": (28.09, 4.13),
    "dla60": (22.04, 4.26),
}
# Of CIFAR's networks with ten classes, to one decimal.
PUBLISHED_CIFAR = {
    "res2next29_6c_24w_4s": 24.3,
    "res2next29_8c_25w_4s": 33.8,
    "res2next29_6c_24w_6s": 36.7,
    "resnext29_8c_64w": 34.4,
}
BLOCKS = {"101": 33, "152": 50, "29": 9, "50": 16, "60": 16}


def on_meta(name, *arguments, **keywords):
    with torch.device("meta"):
        return create_model(name, *arguments, **keywords)


def millions(network):
    return sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_tables(name):
    parameters, multiply_adds = PUBLISHED[name]
    network = on_meta(name, fused=False)
    if parameters is not None:
        assert millions(network) == pytest.approx(parameters, abs=0.006)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.01)  # some tables add BatchNorms


@pytest.mark.parametrize("name", PUBLISHED_CIFAR)
def test_sizes_of_the_table_of_cifar(name):
    assert round(millions(on_meta(name, 10)), 1) == PUBLISHED_CIFAR[name]


def test_every_row_of_the_paper_is_there():
    assert {*PUBLISHED, *PUBLISHED_CIFAR, "res2net152_v1b", "se_res2net50"} <= set(list_models())
    assert {f"se_{name}" for name in PUBLISHED_CIFAR if "2next" in name} <= set(list_models())


def test_attention_adds_its_parameters():
    for name in ("res2next29_6c_24w_4s", "res2net50_26w_4s"):
        plain = on_meta(name)
        attended = on_meta("se_" + name if "29" in name else "se_res2net50")
        added = 0
        for block in (m for m in plain.modules() if hasattr(m, "convs")):
            channels = block.conv3.out_channels
            added += 2 * channels * channels // 16 + channels + channels // 16
        assert round(millions(attended) * 1e6) == round(millions(plain) * 1e6) + added


@every_name
def test_all_blocks_of_a_network_run_fused(name):
    network = on_meta(name)
    blocks = [module for module in network.modules() if hasattr(module, "convs")]
    depth = next(depth for depth in BLOCKS if depth in name.split("_")[name.startswith("se_")])
    assert len(blocks) == len(explain(network)) == BLOCKS[depth]


def test_names():
    assert model_name("res2net50_26w4s") == model_name("res2net50_26w_4s") == "res2net50_26w_4s"
    assert model_name("se_res2next29_6c24w4s") == "se_res2next29_6c_24w_4s"
    assert all(model_name(alias) == name for alias, name in ALIASES.items())
    with pytest.raises(ValueError, match="name is 'res2net34'; allowed are res2net50_48w_2s"):
        create_model("res2net34")


ERRORS = [
    ({"output_stride": 12}, "output_stride is 12; allowed are 8, 16, 32"),
    ({"layers": (3, 4)}, "layers is \\(3, 4\\)"),
    ({"backend": "metal"}, "backend is 'metal'"),
    ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
    ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
    ({"num_classes": 0}, "num_classes is 0"),
]


@pytest.mark.parametrize(("keywords", "message"), ERRORS)
@pytest.mark.parametrize("name", ["res2net50_26w_4s", "dla60_res2net"])
def test_errors_name_the_argument(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        on_meta(name, **keywords)


def test_published_keys_and_first_blocks():
    with torch.device("meta"):
        network = res2net50()
    keys = set(network.state_dict())
    published = {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer1.0.convs.2.weight", "fc.bias"}
    published |= {"layer1.0.bns.2.weight", "layer2.0.downsample.0.weight", "layer4.2.bn3.num_batches_tracked"}
    assert published <= keys
    assert "layer1.0.convs.3.weight" not in keys
    assert "layer1.1.downsample.0.weight" not in keys
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        assert [block.stype for block in layer] == ["stage"] + ["normal"] * (len(layer) - 1)
    assert set(on_meta("res2net50_26w_4s").state_dict()) == keys


def test_published_keys_of_the_other_shapes():
    v1b = {"conv1.0.weight", "conv1.4.bias", "conv1.6.weight", "layer1.0.downsample.1.weight", "layer2.0.downsample.2.bias"}
    assert v1b <= set(on_meta("res2net50_v1b").state_dict())
    dla = {"base_layer.0.weight", "level1.1.bias", "level2.project.0.weight", "level4.tree2.tree1.root.bn.bias"}
    dla |= {"level3.tree1.tree2.convs.2.weight", "level5.root.conv.weight", "fc.weight"}
    keys = on_meta("dla60_res2net").state_dict()
    assert dla <= set(keys) and keys["fc.weight"].shape == (1000, 1024, 1, 1)
    assert "layer1.0.se.fc1.bias" in on_meta("se_resnet50").state_dict()


def check_fused(name, plain, fused):
    """Eval and training forward against float64, within the table of tolerances; running statistics too."""
    images = images_for(name)
    exact = copy.deepcopy(plain).double()
    for training in (False, True):
        for network in (plain, fused, exact):
            network.train(training)
        with torch.no_grad():
            expected = exact(images.double())
            eager_error = relative_error(plain(images), expected)
            assert relative_error(fused(images), expected) <= network_bound(eager_error)
        reports = explain(fused)
        assert len(reports) > 0 and all(report.fused for report in reports), reports
    errors = [
        [relative_error(b, c) for b, c in zip(network.buffers(), exact.buffers(), strict=True) if b.is_floating_point()]
        for network in (plain, fused)
    ]
    assert max(errors[1]) <= network_bound(max(errors[0]))


@pytest.mark.parametrize("name", quick(list_models(), *FAMILIES))
def test_fused_network_agrees_with_plain_pytorch(name):
    check_fused(name, *pair(name))


@pytest.mark.slow
@every_name
def test_full_network_agrees_with_plain_pytorch(name):
    check_fused(name, *pair(name, layers=None))


def test_fused_network_agrees_with_the_reference_one():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    reference = calibrate(Res2Net((1, 2, 1, 1), 14, 4, ReferenceBottle2neck, num_classes=10), images)
    fused = Res2Net((1, 2, 1, 1), 14, 4, num_classes=10).eval()
    fused.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected, features = reference.double()(images.double()), fused.stages(images)
        logits = fused(images)
    assert logits.shape == (2, 10)
    assert [tuple(f.shape) for f in features] == [(2, 256, 16, 16), (2, 512, 8, 8), (2, 1024, 4, 4), (2, 2048, 2, 2)]
    assert torch.equal(fused.classify(features[-1]), logits)
    assert (logits - expected).norm() <= 1e-4 * expected.norm()


def test_number_of_stages_is_checked():
    with pytest.raises(ValueError, match="layers"):
        Res2Net((3, 4, 6))


def test_resnet50_of_the_table_is_the_function_s():
    with torch.device("meta"):
        keys = {key: tensor.shape for key, tensor in resnet50().state_dict().items()}
    assert keys == {key: tensor.shape for key, tensor in on_meta("resnet50").state_dict().items()}


# Features and dilation ------------------------------------------------------------------------------------------------


@families
def test_features(name):
    network = small(name, features_only=True).eval()
    assert not any(key.startswith("fc.") for key in network.state_dict())
    images = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        features = network(images)
    assert isinstance(features, list)
    assert [f.shape[1] for f in features] == list(network.feature_channels)
    strides = [1, 2, 4] if CONFIGURATIONS[name].stem == "cifar" else [4, 8, 16, 32]
    assert list(network.feature_strides) == strides
    assert [tuple(f.shape[2:]) for f in features] == [(-(-45 // s), -(-70 // s)) for s in strides]


def test_features_are_those_that_the_logits_are_made_of():
    whole, backbone = small("res2net50_26w_4s").eval(), small("res2net50_26w_4s", features_only=True).eval()
    backbone.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")})
    with torch.no_grad():
        images = images_for("res2net50_26w_4s")
        assert torch.equal(whole.classify(backbone(images)[-1]), whole(images))


@pytest.mark.parametrize(("output_stride", "strides"), [(8, [4, 8, 8, 8]), (16, [4, 8, 16, 16]), (32, [4, 8, 16, 32])])
@pytest.mark.parametrize("name", ["res2net50_v1b", "res2next50", "dla60_res2net"])
def test_output_strides(name, output_stride, strides):
    plain, fused = pair(name, features_only=True, output_stride=output_stride)
    assert list(fused.feature_strides) == strides
    images = images_for(name)
    with torch.no_grad():
        for ours, own, exact in zip(fused(images), plain(images), plain.double()(images.double()), strict=True):
            assert relative_error(ours, exact) <= network_bound(relative_error(own, exact))
        plain.float()
    assert [f.shape[2] for f in fused(images)] == [64 // s for s in strides]
    assert all(report.fused for report in explain(fused))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_sees_what_the_strided_network_sees(output_stride):
    """Every n-th pixel of a dilated network's last stage is a pixel of the strided one, but for the borders."""
    size, keywords = 32 * 9 + 1, {"layers": (1, 1, 2, 2), "features_only": True, "fused": False}
    strided = small("resnet50", **keywords).double().eval()  # s = 1 has no pool beside the convolution
    dilated = small("resnet50", output_stride=output_stride, **keywords).double().eval()
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected, dense = strided(images)[-1], dilated(images)[-1]
    step = 32 // output_stride
    every = dense[:, :, ::step, ::step]
    assert every.shape == expected.shape
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert_close(every[inner], expected[inner], 1e-10)


# Attention and stochastic depth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(("se_res2net50", "dla60_res2net"), "se_res2net50"))
def test_stochastic_depth_draws_as_in_plain_pytorch(name):
    if is_dla(name):
        plain, fused = (network.double().train() for network in pair(name, drop_path_rate=0.5))
    else:
        plain, fused = (network.train() for network in tiny_pair(name, drop_path_rate=0.5))
    images = images_for(name, 3, torch.float64)
    taken_over = accelerate(copy.deepcopy(plain))
    outputs = []
    for network in (plain, fused, taken_over):
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs.append(network(images))
    assert_close(outputs[2], outputs[0], 1e-10)
    assert_close(outputs[4], outputs[0], 1e-10)
    assert relative_error(outputs[0], outputs[1]) > 1e-3  # it does drop
    assert is_dla(name) or all(report.fused for report in explain(taken_over))
    assert all(report.fused for report in explain(fused))
    plain.eval(), fused.eval()
    with torch.no_grad():
        assert_close(fused(images), plain(images), 1e-10)
        assert torch.equal(fused(images), fused(images))


def test_drop_rates_grow_to_the_last_block():
    network = on_meta("res2net50_26w_4s", drop_path_rate=0.3)
    rates = [module.drop_path.rate for module in network.modules() if hasattr(module, "drop_path")]
    assert len(rates) == 15 and rates == sorted(rates) and rates[-1] == 0.3 and rates[0] == pytest.approx(0.02)


def test_drop_path_keeps_the_mean():
    layer, x = DropPath(0.25), torch.ones(4000, 2, 1, 1)
    out = layer(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(x), x)
