"""What is computed: settings, shapes, checks and the mathematics in plain PyTorch. Knows no backend.

A chain is the sequence of convolutions that replaces a bottleneck's 3x3 convolution. Its channels are split in s groups (the
scale) of w channels (the width). A step is one convolution with all that follows it; the pass-through is the group without one.
"""

from .config import Chain1dConfig, ChainConfig
from .problem import Chain1dProblem, ChainProblem

__all__ = ["Chain1dConfig", "Chain1dProblem", "ChainConfig", "ChainProblem"]
