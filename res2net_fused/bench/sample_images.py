"""Real input for whole networks: two photographs, and BatchNorm statistics that fit them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..patching.accelerate import Model

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the published networks are trained with
_NAMES = ("china.jpg", "flower.jpg")


def sample_images(size: int = 224) -> Tensor:
    """scikit-learn's two sample photographs, resized and cropped to the middle, normalised: (2, 3, size, size), fp32.

    Raises ImportError where scikit-learn or pillow is missing.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(
            f"the photographs need scikit-learn and pillow ({error}): pip install 'res2net-fused[bench]', or leave the "
            "network out with --no-network"
        ) from error
    images = []
    for name in _NAMES:
        image = Image.fromarray(load_sample_image(name))
        factor = size / 0.875 / min(image.size)  # the usual margin around the crop
        image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in image.size)
        image = image.crop((left, top, left + size, top + size))
        images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3))
    x = torch.stack(images).permute(0, 3, 1, 2).float() / 255  # (2, 3, H, W)
    return ((x - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1)).contiguous()


def calibrate(network: Model, images: Tensor) -> Model:
    """Sets every BatchNorm's running statistics to those of `images`, by one forward in train mode; returns it in eval mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become the batch's
    with torch.no_grad():
        network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()
