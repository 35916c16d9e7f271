"""The operators, one file each: schema, kernel, fake, autograd, autocast and FLOPs are registered with PyTorch here alone."""
