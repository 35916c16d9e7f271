"""Small models that know nothing of this package: hand-written in the published style, and timm's."""

import pytest
import torch
from helpers import SqueezeExcite, randomize, timm_or_skip
from official_style import (
    Bottle2neck,
    FirstPassesBottle2neck,
    IdentityPassBottle2neck,
    Res2Net,
    UncountedPadBottle2neck,
)

BLOCK_KINDS = {
    "official": Bottle2neck,
    "identity_pass": IdentityPassBottle2neck,
    "uncounted_pad": UncountedPadBottle2neck,
    "first_passes": FirstPassesBottle2neck,
}
IMAGES = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(4))


def official(block=Bottle2neck, **keywords):
    return randomize(Res2Net(block, **keywords)).eval()


def timm_model(name, **keywords):
    timm = timm_or_skip()
    sizes = {"layers": (2, 1, 1, 1), "channels": (16, 24, 32, 40), "num_classes": 5}
    return randomize(timm.create_model(name, **sizes, **keywords)).eval()


MODELS = {
    "official": lambda: official(),
    "official_s8": lambda: official(baseWidth=14, scale=8),
    "official_s2": lambda: official(baseWidth=48, scale=2),
    "official_s1": lambda: official(baseWidth=64, scale=1),
    "identity_pass": lambda: official(IdentityPassBottle2neck),
    "uncounted_pad": lambda: official(UncountedPadBottle2neck),
    "timm_26w_4s": lambda: timm_model("res2net50_26w_4s"),
    "timm_14w_8s": lambda: timm_model("res2net50_14w_8s"),
    "timm_next": lambda: timm_model("res2next50"),
    "timm_d": lambda: timm_model("res2net50d"),
    "timm_se": lambda: timm_model("res2net50_26w_4s", block_args={"scale": 4, "attn_layer": SqueezeExcite}),
    "timm_d_dilated": lambda: timm_model("res2net50d", output_stride=8),
    "timm_dilated": lambda: timm_model("res2net50_26w_4s", output_stride=8),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def images_for(model):
    return IMAGES if isinstance(model, Res2Net) else torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def blocks_of(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "convs")}


def run(model, x):
    with torch.no_grad():
        return model(x)
