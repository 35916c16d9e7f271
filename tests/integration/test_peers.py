"""What `make peers` excuses: a difference that rounding explains, in the one comparison of timm's that is elementwise."""

import importlib.util
from pathlib import Path

import pytest
import torch
from official_models import IMAGES, official, run

from res2net_fused import accelerate

pytest.importorskip("timm")
_PATH = Path(__file__).parent / "timm_suite" / "accelerated.py"
_SPEC = importlib.util.spec_from_file_location("accelerated", _PATH)
plugin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plugin)


def verdict(change, judge=torch.testing.assert_close):
    """What is said of a graph whose outputs are the model's after a change."""

    def test_model_forward_fx():
        inputs, outputs = IMAGES, run(model, IMAGES)
        fx_outputs = change(outputs)
        judge(fx_outputs, outputs, rtol=1e-9, atol=0)
        return inputs

    model = accelerate(official())
    plugin._created[:] = [model]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        test_model_forward_fx()
    return plugin.rounding(caught)


def raise_something(*args, **kwargs):
    raise ValueError("Tensor-likes are not close!")


def test_only_rounding_is_excused():
    assert "as an FX graph" in verdict(lambda outputs: outputs * (1 + 6e-8))
    for change in (lambda outputs: outputs * (1 + 1e-5), lambda outputs: outputs * float("nan"), lambda outputs: outputs[:1]):
        assert verdict(change) is None
    assert verdict(lambda outputs: outputs * (1 + 6e-8), raise_something) is None
