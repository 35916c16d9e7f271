"""Networks built of the package's blocks."""

from .res2net import Res2Net, res2net50, resnet50

__all__ = ["Res2Net", "res2net50", "resnet50"]
