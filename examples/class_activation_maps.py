"""Grad-CAM (arXiv:1610.02391) on fused networks: which pixels speak for a class, as heat maps over the images, in one PNG.

With two checkpoints, scikit-learn's two photographs by Res2Net-50 and by ResNet-50, one above the other. Without, handwritten
digits by the narrow network that train_digits.py trains, which is trained first: random weights would show nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from res2net_fused import Bottle2neck
from res2net_fused.bench.sample_images import sample_images
from res2net_fused.models.checkpoint import load_checkpoint
from res2net_fused.models.registry import create_model

EXAMPLES = """examples:
  python examples/class_activation_maps.py                                     digits
  python examples/class_activation_maps.py --checkpoint res2net50_26w_4s.pth resnet50.pth
"""


def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Heat maps (N, H, W) of the images' size, each between 0 and 1, and the classes (N,) that they are of.

    layer: of the model, whose output (N, C, H', W') is weighted by its gradients' means. classes: the likeliest by default.
    """
    kept = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())  # so that it also works with frozen weights
    finally:
        handle.remove()
    classes = logits.argmax(1) if classes is None else classes
    (activations,) = kept  # (N, C, H', W')
    (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), activations)
    weights = gradients.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
    maps = (weights * activations).sum(1, keepdim=True).relu()  # (N, 1, H', W')
    maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).detach(), classes


def enlarged(x: Tensor, side: int = 240) -> Tensor:
    """(N, C, H, W) smoothly made larger where it is smaller than `side`, and within 0 to 1: digits have 8x8 pixels."""
    factor = max(1.0, side / max(x.shape[2:]))
    size = [round(n * factor) for n in x.shape[2:]]
    return F.interpolate(x, size, mode="bicubic", align_corners=False).clamp(0, 1)


def draw(lines: Sequence[tuple[str, Tensor, Tensor, Tensor]], path: str) -> None:
    """The images in a line, and below them one line for each (name, images (N, C, H, W), maps (N, H, W), classes (N,)).

    A map lies over its image, the more opaque the hotter it is: where nothing speaks for the class the image is seen alone.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = lines[0][1]
    low, high = (t.view(-1, 1, 1, 1) for t in images.flatten(1).aminmax(dim=1))
    pictures = enlarged((images - low) / (high - low)).permute(0, 2, 3, 1)  # (N, H, W, C)
    shape = (1 + len(lines), len(images))
    figure, axes = plt.subplots(*shape, figsize=(2.3 * shape[1], 2.5 * shape[0]), layout="constrained", squeeze=False)
    for axis, picture in zip(axes[0], pictures, strict=True):
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    for row, (name, _, maps, classes) in zip(axes[1:], lines, strict=True):
        for axis, picture, heat, kind in zip(row, pictures, enlarged(maps[:, None])[:, 0], classes.tolist(), strict=True):
            axis.imshow(picture.mean(2).numpy(), cmap="gray", vmin=0, vmax=1.3)
            shown = axis.imshow(heat.numpy(), cmap="turbo", vmin=0, vmax=1, alpha=(0.85 * heat.sqrt()).numpy())
            axis.set_title(f"class {kind}", fontsize=9)
        row[0].set_ylabel(name, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(plt.cm.ScalarMappable(shown.norm, shown.cmap), ax=axes[1:], fraction=0.05, aspect=30)
    bar.set_label("speaks for the class")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def photographs_by(networks: dict[str, nn.Module]) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Lines for `draw`: the two photographs by every network, from its last stage."""
    images = sample_images()
    return [(name, images, *grad_cam(network.eval(), network.layer4, images)) for name, network in networks.items()]


def digits_by_trained_network(epochs: int, count: int = 6) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Lines for `draw`: test digits, each another one, by a network trained for so many epochs, from its first two stages."""
    from train_digits import Res2NeXt29, load_digits, train

    torch.manual_seed(0)
    data = load_digits()
    model = Res2NeXt29(Bottle2neck)
    curves = train(model, data, epochs, seed=0, title="training")
    print(f"test accuracy {100 * curves.accuracy[-1]:.1f} %")
    first = [int((data[3] == digit).nonzero()[0]) for digit in range(count)]
    images = data[2][first]
    return [(f"stage {i + 1}", images, *grad_cam(model.eval(), model.stages[i], images)) for i in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", nargs=2, metavar=("RES2NET50", "RESNET50"), help="files of weights for Res2Net-50 26w4s and ResNet-50"
    )
    parser.add_argument("--epochs", type=int, default=10, help="of the digits network, without checkpoints (default 10)")
    parser.add_argument("--out", default="class_activation_maps.png", help="the PNG (default class_activation_maps.png)")
    arguments = parser.parse_args()
    Path(arguments.out).resolve().parent.mkdir(parents=True, exist_ok=True)  # rather now than after the training
    if arguments.checkpoint:
        names = {"Res2Net-50": "res2net50_26w_4s", "ResNet-50": "resnet50"}
        networks = {
            title: load_checkpoint(create_model(name), path)
            for (title, name), path in zip(names.items(), arguments.checkpoint, strict=True)
        }
        lines = photographs_by(networks)
    else:
        torch.set_num_threads(1)  # the fastest for images of 8x8 pixels
        lines = digits_by_trained_network(arguments.epochs)
    draw(lines, arguments.out)
    print(f"heat maps: {arguments.out}")


if __name__ == "__main__":
    main()
