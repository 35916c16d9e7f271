"""Networks small enough for tests, and their timm counterparts."""

import pytest
import torch
from helpers import randomize, timm_or_skip
from torch import nn

from res2net_fused import Bottle2neck
from res2net_fused.bench.sample_images import calibrate
from res2net_fused.models.layers import SqueezeExcite
from res2net_fused.models.network import Network
from res2net_fused.models.registry import CONFIGURATIONS, create_model, list_models
from res2net_fused.models.res2net import Res2Net
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

# One of each shape: stems, shortcuts, groups, attention, trees, a single group, CIFAR.
FAMILIES = (
    "res2net50_26w_4s",
    "res2net50_v1b",
    "res2next50",
    "se_res2net50",
    "dla60_res2net",
    "res2next29_6c_24w_4s",
    "resnet50",
)
assert set(FAMILIES) <= set(list_models())


def quick(names, *chosen: str) -> list:
    """The names as parameters of a test; all but the chosen ones are slow."""
    assert set(chosen) <= set(names)
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in names]


def is_dla(name: str) -> bool:
    return CONFIGURATIONS[name].stem == "dla"


def few_blocks(name: str) -> tuple[int, ...]:
    """A 'stage' block in each stage, and a 'normal' one at least somewhere."""
    return (1,) * 4 if is_dla(name) else (1, 2, 1, 1)[: len(CONFIGURATIONS[name].layers)]


def images_for(name: str, count: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    size = min(64, CONFIGURATIONS[name].image_size)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(4), dtype=dtype)


def small(name: str, **keywords) -> Network:
    return create_model(name, 10, **({"layers": few_blocks(name)} | keywords))


def pair(name: str, **keywords) -> tuple[Network, Network]:
    """(plain PyTorch, fused): of the same weights, with statistics that fit `images_for`, in eval mode."""
    plain, fused = small(name, fused=False, **keywords), small(name, **keywords).eval()
    for module in plain.modules():
        if hasattr(module, "convs"):
            nn.init.constant_(module.bn3.weight, 0.25)  # as small beside the shortcuts as in trained networks
    calibrate(plain, images_for(name))
    fused.load_state_dict(plain.state_dict())
    return plain, fused


TIMM_NAMES = {
    "res2net50_26w_4s": "res2net50_26w_4s",
    "res2net50_14w_8s": "res2net50_14w_8s",
    "res2net50_v1b": "res2net50d",
    "res2next50": "res2next50",
    "se_res2net50": "res2net50_26w_4s",
    "dla60_res2net": "dla60_res2net",
    "dla60_res2next": "dla60_res2next",
    "resnet50": "resnet50",
    "resnext50_32x4d": "resnext50_32x4d",
    "se_resnet50": "seresnet50",
    "dla60": "dla60",
}


def timm_network(name: str, layers: tuple[int, ...] | None = None, **keywords) -> nn.Module:
    """timm's network of that name, in eval mode."""
    timm = timm_or_skip()
    if name == "se_res2net50":
        keywords["block_args"] = {"scale": 4, "attn_layer": timm.layers.SEModule}
    if layers is not None:
        keywords |= {"levels": (1, 1, *layers)} if is_dla(name) else {"layers": layers}
    return timm.create_model(TIMM_NAMES[name], **keywords).eval()


def tiny(name: str, block: type[nn.Module] = Bottle2neck, layers=(2, 1), planes=(16, 32), **keywords) -> Res2Net:
    """The named network of ResNet's shape with narrow stages, by default of two blocks and of one."""
    c = CONFIGURATIONS[name]
    return Res2Net(
        layers, c.base_width, c.scale, block, 10, cardinality=c.cardinality, planes=planes, stem=c.stem,
        pooled_shortcut=c.pooled_shortcut, stage_passthrough=c.stage_passthrough,
        attn_layer=SqueezeExcite if c.se else None, **keywords,
    )  # fmt: skip


def tiny_pair(name: str, dtype: torch.dtype = torch.float64, **keywords) -> tuple[Res2Net, Res2Net]:
    """(plain PyTorch, fused), of the same random weights and statistics, in eval mode."""
    plain = randomize(tiny(name, ReferenceBottle2neck, **keywords)).to(dtype).eval()
    fused = tiny(name, **keywords).to(dtype).eval()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


TINY = tuple(name for name in FAMILIES if not is_dla(name))
