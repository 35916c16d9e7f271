"""What all networks have in common: stages, and on top of them a classifier or the list of their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn


class Network(nn.Module):
    """A backbone in stages; (N, in_chans, H, W) -> logits (N, num_classes), or with `features_only` what `stages` returns.

    A subclass sets `feature_channels` and `feature_strides`, one for each stage, and has `stages` and `classify`.
    """

    __constants__ = ["features_only"]  # torch.jit.script then compiles what runs, and no more
    if TYPE_CHECKING:  # torch.jit.script cannot read these types
        feature_channels: tuple[int, ...]
        feature_strides: tuple[int, ...]  # pixels of the image between neighbouring pixels of a stage's output
        features_only: bool

    def stages(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, (N, feature_channels[i], H / feature_strides[i], W / feature_strides[i]).

        x: (N, in_chans, H, W).
        """
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) of the last stage's output, `features` (N, feature_channels[-1], H', W')."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """x (N, in_chans, H, W) -> logits (N, num_classes), or with features_only the list of every stage's output."""
        features = self.stages(x)
        if self.features_only:
            return features
        return self.classify(features[-1])

    def initialise(self) -> None:
        """Random convolutions, normal by fan-out (arXiv:1502.01852), in place; BatchNorms as PyTorch makes them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def stage_geometry(strides: Sequence[int], output_stride: int | None) -> list[tuple[int, int, int]]:
    """(stride, dilation of the first block, dilation of the others) of each stage, for its input.

    strides: of the stages' outputs in pixels of the image, where nothing is dilated. Stages beyond `output_stride` (None: none)
    are not strided; their convolutions read as far apart as they would on the strided input, the first block's as the stage's
    before. Raises ValueError for an output_stride that no stage has.
    """
    if output_stride is None:
        output_stride = strides[-1]
    if output_stride not in strides[1:]:
        allowed = ", ".join(map(str, strides[1:]))
        raise ValueError(f"output_stride is {output_stride}; allowed are {allowed}")
    geometry = [(1, 1, 1)]
    dilation = 1
    for before, after in zip(strides, strides[1:], strict=False):
        first, stride = dilation, after // before
        if after > output_stride:
            dilation, stride = dilation * stride, 1
        geometry.append((stride, first, dilation))
    return geometry
