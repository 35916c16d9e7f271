"""What networks in training may lose by Winograd, whose rounding adds up over blocks: bounded by eager's own error."""

import copy

import pytest
import torch
from helpers import relative_error
from official_style import Bottle2neck
from published_blocks.speakers import SpeakerNet
from torch import nn

from res2net_fused import accelerate, explain
from res2net_fused.chain.tolerances import TRAINED_OVER_EAGER

NETWORKS = {
    "speaker": (lambda: SpeakerNet((3, 4, 6, 3)), (2, 1, 80, 60)),
    "speaker_shallow": (lambda: SpeakerNet((1, 1, 1, 1)), (2, 1, 80, 60)),
    "speaker_8": (lambda: SpeakerNet((2, 2, 2, 2), scale=8), (2, 1, 80, 60)),
    "official": (lambda: nn.Sequential(*(Bottle2neck(256, 64) for _ in range(8))), (2, 256, 16, 16)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_errors_of_training_stay_within_the_bound(name, layout):
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    model, x = make().train(), torch.randn(shape)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        model = model.to(memory_format=layout)
        eager = relative_error(copy.deepcopy(model)(x), exact)
        fused = accelerate(model, backend="cpu")
        error = relative_error(fused(x), exact)
    assert all(report.fused for report in explain(fused)), explain(fused)
    assert error <= TRAINED_OVER_EAGER.limit * eager, f"{error:.2e} is {error / eager:.2f} times eager's {eager:.2e}"
