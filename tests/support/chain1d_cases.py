"""Random 1-D chains for several test files."""

import torch

from res2net_fused.chain.config import Chain1dConfig

CHAINS = {
    # settings, convolutions, width, kernel size
    "speechbrain": ({"passthrough": "first", "padding_mode": "reflect", "dilation": 2}, 7, 4, 3),
    "speechbrain_dilated": ({"passthrough": "first", "padding_mode": "reflect", "dilation": 4}, 3, 5, 3),
    "espnet": ({"dilation": 3}, 7, 4, 3),
    "first_added": ({"passthrough": "first_added"}, 3, 3, 3),
    "none": ({"passthrough": "none", "padding_mode": "reflect"}, 4, 3, 3),
    "one_convolution": ({"passthrough": "none"}, 1, 6, 3),
    "wide_kernel": ({"padding_mode": "reflect", "dilation": 2}, 2, 3, 5),
    "pointwise": ({"padding_mode": "reflect"}, 2, 3, 1),
    "silu": ({"activation": "silu", "dilation": 2}, 3, 4, 3),
    "leaky_relu": ({"activation": "leaky_relu:0.3", "passthrough": "first", "padding_mode": "reflect"}, 2, 3, 3),
    "relu6": ({"activation": "relu6", "passthrough": "first_added"}, 2, 4, 5),
}


def arguments(name, shape=(2, 13), dtype=torch.float64, extras=True, seed=1):
    """Settings, then x, weights, biases, affine_scale and affine_shift."""
    settings, steps, width, kernel = CHAINS[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    scale = Chain1dConfig(**settings).chain.scale(steps)
    x = random(shape[0], scale * width, shape[1]).to(dtype)
    weights = [(random(width, width, kernel) * (2 / (width * kernel)) ** 0.5).to(dtype) for _ in range(steps)]
    if not extras:
        return settings, [x, weights, None, None, None]
    lists = [[factor * random(width) for _ in range(steps)] for factor in (0.3, 1, 0.5)]  # scales of either sign
    return settings, [x, weights, *([v.to(dtype) for v in values] for values in lists)]


def to_float64(tensors):
    return [t if t is None else t.double() if isinstance(t, torch.Tensor) else [v.double() for v in t] for t in tensors]


def leaves(tensors):
    return [v for t in tensors if t is not None for v in ([t] if isinstance(t, torch.Tensor) else t)]
