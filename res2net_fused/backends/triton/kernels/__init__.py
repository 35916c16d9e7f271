"""Triton kernels, one file each, with their launch plans beside them."""
