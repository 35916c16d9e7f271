"""A typed program of a user: never run, only read by mypy (tests/integration/test_types.py), which must find these types."""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type, reveal_type

import res2net_fused as rf
from res2net_fused.models.checkpoint import load_checkpoint
from res2net_fused.models.network import Network
from res2net_fused.models.registry import create_model, list_models

block = rf.Bottle2neck(256, 64, baseWidth=26, scale=4, norm_layer=nn.BatchNorm2d)
assert_type(block.chain_config.passthrough, str)
assert_type(block.convs, nn.ModuleList)


class Classifier(nn.Module):
    """A user's own class must come back as itself."""

    def classes(self) -> int:
        return 1000


model = rf.accelerate(Classifier(), backend="cpu", recompute=True)
assert_type(model, Classifier)
assert_type(rf.freeze(model).classes(), int)
assert_type(rf.restore(rf.refresh(model)), Classifier)

x = torch.randn(1, 104, 56, 56)
for report in rf.explain(model, x):
    assert_type(report, rf.BlockReport)
    assert_type(report.fused, bool | None)
    assert_type(report.reason, str)

weights = [torch.randn(26, 26, 3, 3) for _ in range(3)]
biases = [torch.randn(26) for _ in range(3)]
packed = rf.pack_weights(weights, biases, backend="reference")
assert_type(packed, rf.PackedWeights)
assert_type(packed.layout, str)
assert_type(rf.hierarchical_conv2d(x, packed), Tensor)
assert_type(rf.hierarchical_conv2d(x, weights, biases, pool="avg3", hierarchical=False), Tensor)
assert_type(rf.hierarchical_conv1d(torch.randn(1, 512, 200), [torch.randn(64, 64, 3)] * 7, passthrough="first"), Tensor)

assert_type(list_models(), list[str])
network = create_model("res2net50_26w_4s", num_classes=10, features_only=False)
assert_type(network, Network)
assert_type(network.feature_channels, tuple[int, ...])
assert_type(network.stages(x), list[Tensor])
assert_type(load_checkpoint(network, Path("weights.safetensors")), Network)
assert_type(rf.__version__, str)
reveal_type(rf.accelerate(network))  # Revealed type is "res2net_fused.models.network.Network"
