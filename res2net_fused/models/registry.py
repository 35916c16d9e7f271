"""Every network of the paper by name: the one table of their configurations, `create_model` and `list_models`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..modules.bottle2neck import Bottle2neck, DlaBottle2neck
from ..modules.reference_blocks import ReferenceBottle2neck, ReferenceDlaBottle2neck
from ..patching.accelerate import accelerate
from .dla import DEPTHS_60, Dla
from .layers import SqueezeExcite
from .network import Network
from .res2net import CIFAR_PLANES, LAYERS_50, PLANES, Res2Net

_LAYERS_101, _LAYERS_152 = (3, 4, 23, 3), (3, 8, 36, 3)
_LAYERS_29 = (3, 3, 3)


@dataclass(frozen=True)
class ModelConfig:
    """A network: w for 64 planes, s, groups of the 3x3 convolutions, and what it is built around.

    layers: blocks in each stage, for "dla" the depths of its trees. stem: of `Res2Net`, or "dla".
    pooled_shortcut: see `Res2Net`. se: whether its blocks have channel attention.
    """

    layers: tuple[int, ...]
    base_width: int
    scale: int
    cardinality: int = 1
    stem: str = "imagenet"
    pooled_shortcut: bool = False
    se: bool = False

    @property
    def stage_passthrough(self) -> str:
        """The pass-through of 'stage' blocks: no code is published for CIFAR, but "none" gives the parameters of its table."""
        return "none" if self.stem == "cifar" else "last"

    @property
    def image_size(self) -> int:
        """Rows and columns of the images that it is published for."""
        return 32 if self.stem == "cifar" else 224

    @property
    def num_classes(self) -> int:
        return 100 if self.stem == "cifar" else 1000


def _v1b(layers: tuple[int, ...]) -> ModelConfig:
    return ModelConfig(layers, 26, 4, stem="deep", pooled_shortcut=True)


def _cifar(cardinality: int, width: int, scale: int, se: bool = False) -> ModelConfig:
    return ModelConfig(_LAYERS_29, width, scale, cardinality, stem="cifar", se=se)


CONFIGURATIONS = {
    "res2net50_48w_2s": ModelConfig(LAYERS_50, 48, 2),
    "res2net50_26w_4s": ModelConfig(LAYERS_50, 26, 4),
    "res2net50_14w_8s": ModelConfig(LAYERS_50, 14, 8),
    "res2net50_26w_6s": ModelConfig(LAYERS_50, 26, 6),
    "res2net50_26w_8s": ModelConfig(LAYERS_50, 26, 8),
    "res2net50_18w_4s": ModelConfig(LAYERS_50, 18, 4),
    "res2net101_26w_4s": ModelConfig(_LAYERS_101, 26, 4),
    "res2net50_v1b": _v1b(LAYERS_50),
    "res2net101_v1b": _v1b(_LAYERS_101),
    "res2net152_v1b": _v1b(_LAYERS_152),
    "res2next50": ModelConfig(LAYERS_50, 4, 4, 8),
    "se_res2net50": ModelConfig(LAYERS_50, 26, 4, se=True),
    "dla60_res2net": ModelConfig(DEPTHS_60, 28, 4, stem="dla"),
    "dla60_res2next": ModelConfig(DEPTHS_60, 4, 4, 8, stem="dla"),
    "res2next29_6c_24w_4s": _cifar(6, 24, 4),
    "res2next29_8c_25w_4s": _cifar(8, 25, 4),
    "res2next29_6c_24w_6s": _cifar(6, 24, 6),
    "se_res2next29_6c_24w_4s": _cifar(6, 24, 4, se=True),
    "se_res2next29_8c_25w_4s": _cifar(8, 25, 4, se=True),
    "se_res2next29_6c_24w_6s": _cifar(6, 24, 6, se=True),
    # Baselines: s = 1, one convolution for the whole width.
    "resnet50": ModelConfig(LAYERS_50, 64, 1),
    "resnext50_32x4d": ModelConfig(LAYERS_50, 4, 1, 32),
    "se_resnet50": ModelConfig(LAYERS_50, 64, 1, se=True),
    "dla60": ModelConfig(DEPTHS_60, 64, 1, stem="dla"),
    "resnext29_8c_64w": _cifar(8, 64, 1),
}
ALIASES = {  # timm's and the official names
    "res2net50d": "res2net50_v1b",
    "res2net101d": "res2net101_v1b",
    "res2net50_v1b_26w_4s": "res2net50_v1b",
    "res2net101_v1b_26w_4s": "res2net101_v1b",
    "res2net152_v1b_26w_4s": "res2net152_v1b",
    "res2net50": "res2net50_26w_4s",
    "res2net101": "res2net101_26w_4s",
    "res2next50_4s": "res2next50",
    "resnext50": "resnext50_32x4d",
    "seresnet50": "se_resnet50",
    "resnext29": "resnext29_8c_64w",
}


def list_models() -> list[str]:
    """The names that `create_model` knows, aliases left out."""
    return list(CONFIGURATIONS)


def model_name(name: str) -> str:
    """The name in `list_models()` for a name, an alias, or the paper's spelling such as res2net50_26w4s.

    Raises ValueError for a name that there is not.
    """
    spelt = re.sub(r"(?<=\d[cw])_?(?=\d+[ws])", "_", str(name))  # 6c24w4s as 6c_24w_4s
    spelt = ALIASES.get(spelt, spelt)
    if spelt not in CONFIGURATIONS:
        raise ValueError(f"name is {name!r}; allowed are {', '.join(CONFIGURATIONS)}")
    return spelt


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    features_only: bool = False,
    output_stride: int | None = None,
    layers: Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
    in_chans: int = 3,
    fused: bool = True,
    backend: str = "auto",
) -> Network:
    """A network with random weights, in training mode; (N, in_chans, H, W) -> logits (N, num_classes).

    name: of `list_models()`. num_classes: by default 1000, or 100 for the networks of CIFAR.
    features_only: no classifier; forward returns the list of every stage's output (see `Network.feature_channels`).
    output_stride: of the last stage: 32 (the default), 16 or 8, by dilation; for the networks of CIFAR 4 or 2.
    layers: blocks in each stage (for DLA the depths of its trees) instead of the published ones.
    drop_path_rate: stochastic depth of the last block; earlier ones drop proportionally less.
    fused: whether the blocks are this package's, which run fused; else they are plain PyTorch, as `accelerate` takes them over.
    backend: of `hierarchical_conv2d`, where fused.

    Raises ValueError, naming the argument, for values that are not allowed.
    """
    configuration = CONFIGURATIONS[model_name(name)]
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1, or features_only=True")
    settings: dict[str, Any] = {
        "num_classes": configuration.num_classes if num_classes is None else num_classes,
        "cardinality": configuration.cardinality,
        "drop_path_rate": drop_path_rate,
        "output_stride": output_stride,
        "features_only": features_only,
        "in_chans": in_chans,
    }
    dla = configuration.stem == "dla"
    if fused:
        kind: type[nn.Module] = DlaBottle2neck if dla else Bottle2neck
    else:
        kind = ReferenceDlaBottle2neck if dla else ReferenceBottle2neck
    shape = (configuration.layers if layers is None else layers, configuration.base_width, configuration.scale, kind)
    if dla:
        network: Network = Dla(*shape, **settings)
    else:
        network = Res2Net(
            *shape,
            **settings,
            planes=CIFAR_PLANES if configuration.stem == "cifar" else PLANES,
            stem=configuration.stem,
            pooled_shortcut=configuration.pooled_shortcut,
            stage_passthrough=configuration.stage_passthrough,
            attn_layer=SqueezeExcite if configuration.se else None,
        )
    return accelerate(network, backend) if fused else network
