"""Networks whose stem `accelerate` takes over, and what is asked of each of their calls."""

import copy

import pytest
import torch
from helpers import assert_close, randomize, relative_error
from networks import small
from official_models import official, timm_model
from official_style import Bottle2neck
from official_style import Res2Net as Official
from torch import nn

from res2net_fused import accelerate, explain, restore
from res2net_fused._native import library

needs_library = pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason)
X = torch.randn(2, 3, 38, 45, generator=torch.Generator().manual_seed(4))


class Published(Official):
    """The published layout: 7x7 and max pooling in front."""

    def __init__(self, **keywords):
        super().__init__(Bottle2neck, (2, 1, 1), **keywords)
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.rest(x)

    def rest(self, x):
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def published():
    return randomize(Published()).eval()


def ours(name):
    return lambda: randomize(small(name)).eval()


NETWORKS = {
    "published": published,
    "official_style": official,
    "timm": lambda: timm_model("res2net50_26w_4s"),
    "timm_d": lambda: timm_model("res2net50d"),
    "ours": ours("res2net50_26w_4s"),
    "ours_v1b": ours("res2net50_v1b"),
    "ours_dla": ours("dla60_res2net"),
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
both = pytest.mark.parametrize("make", [published, NETWORKS["timm_d"]], ids=["published", "timm_d"])


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def plain(model):
    """A copy that knows nothing of this package."""
    return restore(copy.deepcopy(model))


def assert_right(model, x=X):
    """Within what PyTorch's own rounding does to such a network, in float64 of its weights as they are now."""
    own = plain(model)
    exact = run(own.double(), x.double())
    assert_close(run(model, x), exact, 4 * relative_error(run(own.to(x.dtype), x), exact) + 1e-6)


def fused(model, calls, x=X):
    """Whether this call of the network takes the native stem, with the right result either way."""
    before = len(calls)
    assert_right(model, x)
    assert len(calls) - before <= 1
    assert explain(model).stems[0].fused == (len(calls) > before)
    return len(calls) > before


def accelerated(make, calls):
    model = accelerate(make())
    assert fused(model, calls)
    return model
