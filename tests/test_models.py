"""The networks: sizes of the published tables, published keys, and features of every stage."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from res2net_fused.bench.photographs import calibrate
from res2net_fused.models import Res2Net, res2net50, resnet50
from res2net_fused.reference import ReferenceBottle2neck

# Millions of parameters and billions of multiply-adds at 224x224, from the papers' tables.
TABLE = [
    pytest.param(lambda **kw: res2net50(26, 4, **kw), 25.70, 4.28, id="26w4s"),
    pytest.param(lambda **kw: res2net50(48, 2, **kw), 25.29, 4.18, id="48w2s"),
    pytest.param(lambda **kw: res2net50(14, 8, **kw), 25.06, 4.21, id="14w8s"),
    pytest.param(lambda **kw: res2net50(26, 8, **kw), 48.40, 8.37, id="26w8s"),
    pytest.param(lambda **kw: resnet50(**kw), 25.56, 4.09, id="resnet50"),
]


@pytest.mark.parametrize("build, parameters, multiply_adds", TABLE)
def test_sizes_of_the_tables(build, parameters, multiply_adds):
    with torch.device("meta"):
        network = build(block=ReferenceBottle2neck)
        image = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.006)
    with FlopCounterMode(display=False) as counter:
        network(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.01)  # some tables add BatchNorms


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
