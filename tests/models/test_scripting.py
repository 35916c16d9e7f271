"""Networks and blocks as TorchScript: it computes what eager does, in PyTorch's operators alone."""

import io

import pytest
import torch
from helpers import assert_close, randomize
from networks import quick

from res2net_fused import Bottle2neck, accelerate
from res2net_fused.models import create_model
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
SMALL = {"layers": (1, 2, 1, 1), "num_classes": 5}
NETWORKS = {
    "res2net50_26w_4s": SMALL,
    "res2net50_48w_2s": SMALL | {"drop_path_rate": 0.3},
    "res2net50_v1b": SMALL | {"output_stride": 8},
    "se_res2net50": SMALL,
    "res2next50": SMALL,
    "resnet50": SMALL,
    "res2next29_6c_24w_4s": {"layers": (1, 1, 1), "num_classes": 5},
    "dla60_res2net": {"num_classes": 5},
}


def loaded(module):
    """The module as script, saved and loaded again; of PyTorch's operators only."""
    file = io.BytesIO()
    script = torch.jit.script(module)
    torch.jit.save(script, file)
    assert "res2net_fused::" not in str(script.inlined_graph)
    file.seek(0)
    return torch.jit.load(file)


QUICK = ("res2net50_v1b", "se_res2net50", "dla60_res2net")


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fused", "plain"])
@pytest.mark.parametrize("name", quick(NETWORKS, *QUICK))
def test_a_network(name, fused):
    network = randomize(create_model(name, fused=fused, **NETWORKS[name])).double().eval()
    x = torch.randn(2, 3, 41, 50, dtype=torch.float64)
    script = loaded(network)
    assert script.state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        assert_close(script(x), network(x), 1e-12)


def test_features():
    network = create_model("res2net50_26w_4s", features_only=True, layers=(1, 1, 1, 1)).double().eval()
    x = torch.randn(1, 3, 33, 40, dtype=torch.float64)
    found, expected = loaded(network)(x), network(x)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-12)


BLOCKS = {
    "normal": {},
    "stage": {"stype": "stage", "stride": 2},
    "stage_none": {"stype": "stage", "passthrough": "none"},
    "first": {"passthrough": "first"},
    "first_added": {"passthrough": "first_added"},
    "none": {"passthrough": "none"},
    "one_group": {"scale": 1},
    "two_groups": {"scale": 2},
    "dilated": {"dilation": 2, "cardinality": 2},
}


@pytest.mark.parametrize("kind", [Bottle2neck, ReferenceBottle2neck])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(name, kind):
    shortcut = torch.nn.Conv2d(16, 32, 1, BLOCKS[name].get("stride", 1)) if "stage" in name else None
    block = randomize(kind(16 if shortcut else 32, 8, downsample=shortcut, baseWidth=52, **BLOCKS[name])).double()
    x = torch.randn(3, 16 if shortcut else 32, 7, 9, dtype=torch.float64)
    script = loaded(block)
    for training in (True, False):
        assert_close(script.train(training)(x), block.train(training)(x), 1e-12)
    for a, b in zip(script.buffers(), block.buffers(), strict=True):
        assert_close(a.double(), b.double(), 1e-12)


def test_an_accelerated_plain_network():
    network = randomize(create_model("res2net50_26w_4s", fused=False, layers=(1, 1, 1, 1))).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        assert_close(loaded(accelerate(network))(x), expected, 1e-12)
        assert_close(network(x), expected, 1e-9)
