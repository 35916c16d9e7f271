"""Networks built of the package's blocks."""

from .checkpoint import load_checkpoint
from .dla import Dla
from .layers import DropPath, SqueezeExcite
from .network import Network
from .registry import create_model, list_models
from .res2net import Res2Net, res2net50, resnet50

__all__ = [
    "Dla",
    "DropPath",
    "Network",
    "Res2Net",
    "SqueezeExcite",
    "create_model",
    "list_models",
    "load_checkpoint",
    "res2net50",
    "resnet50",
]
