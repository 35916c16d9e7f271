"""Grad-CAM (arXiv:1610.02391) on fused networks: which pixels speak for a class, as heat maps over the images, in one PNG.

With two checkpoints, scikit-learn's two photographs by Res2Net-50 and by ResNet-50, side by side. Without, handwritten digits
by the narrow network that train_digits.py trains, which is trained first: random weights would show nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from res2net_fused import Bottle2neck
from res2net_fused.bench.sample_images import photographs
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


def draw(columns: Sequence[tuple[str, Tensor, Tensor, Tensor]], path: str) -> None:
    """The images, and beside them one column for each (name, images (N, C, H, W), maps (N, H, W), classes (N,))."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = len(columns[0][1])
    size = (2.4 * (len(columns) + 1), 2.6 * rows)
    figure, axes = plt.subplots(rows, len(columns) + 1, figsize=size, layout="constrained", squeeze=False)
    for i, (name, images, maps, classes) in enumerate(columns, start=1):
        for j, image in enumerate(images):
            low, high = image.min(), image.max()
            picture = ((image - low) / (high - low)).permute(1, 2, 0).numpy()  # (H, W, C)
            for axis in (axes[j, 0], axes[j, i]):
                axis.imshow(picture, cmap="gray")
                axis.set_axis_off()
            axes[j, i].imshow(maps[j].numpy(), cmap="jet", alpha=0.45, vmin=0, vmax=1)
            axes[j, i].set_title(f"{name}: class {int(classes[j])}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def photographs_by(networks: dict[str, nn.Module]) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Columns for `draw`: the two photographs by every network, from its last stage."""
    images = photographs()
    return [(name, images, *grad_cam(network.eval(), network.layer4, images)) for name, network in networks.items()]


def digits_by_trained_network(epochs: int, count: int = 5) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Columns for `draw`: test digits by a network trained for so many epochs, from its first two stages."""
    from train_digits import Res2NeXt29, load_digits, train

    torch.manual_seed(0)
    data = load_digits()
    model = Res2NeXt29(Bottle2neck)
    curves = train(model, data, epochs, seed=0, title="training")
    print(f"test accuracy {100 * curves.accuracy[-1]:.1f} %")
    images = data[2][:count]
    return [(f"stage {i + 1}", images, *grad_cam(model.eval(), model.stages[i], images)) for i in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", nargs=2, metavar=("RES2NET50", "RESNET50"), help="files of weights for Res2Net-50 26w4s and ResNet-50"
    )
    parser.add_argument("--epochs", type=int, default=10, help="of the digits network, without checkpoints (default 10)")
    parser.add_argument("--out", default="class_activation_maps.png", help="the PNG (default class_activation_maps.png)")
    arguments = parser.parse_args()
    if arguments.checkpoint:
        names = {"Res2Net-50": "res2net50_26w_4s", "ResNet-50": "resnet50"}
        networks = {
            title: load_checkpoint(create_model(name), path)
            for (title, name), path in zip(names.items(), arguments.checkpoint, strict=True)
        }
        columns = photographs_by(networks)
    else:
        torch.set_num_threads(1)  # the fastest for images of 8x8 pixels
        columns = digits_by_trained_network(arguments.epochs)
    draw(columns, arguments.out)
    print(f"heat maps: {arguments.out}")


if __name__ == "__main__":
    main()
