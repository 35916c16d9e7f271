"""Blocks as nn.Modules: the drop-in, the reference blocks, and what makes a block run fused."""
