"""Res2Nets below the heads of dense prediction, trained by both paths: fused, and by PyTorch's own operators.

Two networks learn coloured shapes that are drawn as they are needed: a dilated Res2Net v1b below DeepLabV3's head names the
class of every pixel, and a dilated Res2Net below a feature pyramid and RetinaNet's head finds boxes. Backbones are short and
narrow, so that minutes on a CPU suffice, and their BatchNorms frozen, as in fine-tuning: forward and backward of every chain
run as one operator. Both paths see the same weights and the same drawings. Their losses are plotted over each other, beside
what both find on drawings they never saw.

Heads are torchvision's where it can be imported, else small ones of this file.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from res2net_fused import accelerate, explain
from res2net_fused.models import Network, Res2Net
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

EXAMPLES = """examples:
  python examples/dense_prediction.py
  python examples/dense_prediction.py --quick --out quick.png
  python examples/dense_prediction.py --layers 3 4 6 3 --planes 64 128 256 512 --size 128
  python examples/dense_prediction.py --device cuda
"""
SHAPES = ("background", "disc", "square", "triangle")
COLOURS = ("black", "tab:orange", "tab:cyan", "tab:pink")  # in the picture
ANCHORS = (0.15, 0.2, 0.3, 0.4)  # sides of a level's anchors, in sides of the image
PATHS = ("PyTorch", "fused")


# Drawings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawings:
    """images (N, 3, S, S), the class of each pixel (N, S, S), and by image boxes (K, 4), x0 y0 x1 y1, and classes (K,)."""

    images: Tensor
    pixels: Tensor
    boxes: list[Tensor]
    classes: list[Tensor]

    def to(self, device: str) -> Drawings:
        boxes, classes = ([t.to(device) for t in ts] for ts in (self.boxes, self.classes))
        images = self.images.to(device).contiguous(memory_format=torch.channels_last)
        return Drawings(images, self.pixels.to(device), boxes, classes)


def drawings(count: int, size: int, generator: torch.Generator) -> Drawings:
    """One to three shapes each, no two in one quarter of the image, in random colours on noise."""
    images = 0.15 * torch.randn(count, 3, size, size, generator=generator)
    pixels = torch.zeros(count, size, size, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    boxes, classes = [], []
    for image, labels in zip(images, pixels, strict=True):
        drawn = int(torch.randint(1, 4, (), generator=generator))
        kinds, own = torch.randint(1, 4, (drawn,), generator=generator), []
        for kind, quarter in zip(kinds.tolist(), torch.randperm(4, generator=generator)[:drawn].tolist(), strict=True):
            half = int(torch.randint(size // 12, size // 6 + 1, (), generator=generator))
            at = torch.randint(half + 1, size // 2 - half, (2,), generator=generator)
            y, x = int(at[0]) + size // 2 * (quarter // 2), int(at[1]) + size // 2 * (quarter % 2)
            down, right = rows - y, columns - x
            inside = (down.abs() <= half) & (right.abs() <= half)
            if kind == 1:
                inside = down**2 + right**2 <= half**2
            elif kind == 3:
                inside &= 2 * right.abs() <= down + half
            colour = 0.7 + 0.8 * torch.rand(3, generator=generator)
            image += inside * (colour * (1 - 2 * torch.randint(0, 2, (3,), generator=generator)))[:, None, None]
            labels[inside] = kind
            own.append([x - half, y - half, x + half + 1, y + half + 1])
        boxes.append(torch.tensor(own, dtype=torch.float32))
        classes.append(kinds)
    return Drawings(images, pixels, boxes, classes)


# Heads ----------------------------------------------------------------------------------------------------------------


class PlainPixelHead(nn.Sequential):
    """Stands for DeepLabV3's: two dilated convolutions and a classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        def dilated(inputs: int, rate: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, 64, 3, padding=rate, dilation=rate), nn.ReLU(inplace=True)]

        super().__init__(*dilated(channels, 1), *dilated(64, 2), nn.Conv2d(64, classes, 1))


class PlainPyramid(nn.Module):
    """Stands for torchvision's: every level, from the coarsest on, is added to the next finer one."""

    def __init__(self, channels: list[int], out: int) -> None:
        super().__init__()
        self.across = nn.ModuleList(nn.Conv2d(c, out, 1) for c in channels)
        self.after = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in channels)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        levels = [across(f) for across, f in zip(self.across, features.values(), strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], levels[i - 1].shape[2:])
        return {key: after(level) for key, after, level in zip(features, self.after, levels, strict=True)}


class PlainBoxHead(nn.Module):
    """Stands for RetinaNet's: a class and a box for each pixel of each level."""

    def __init__(self, channels: int, anchors: int, classes: int) -> None:
        super().__init__()
        self.sizes = (classes, 4)

        def tower(out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, out, 3, padding=1))

        self.towers = nn.ModuleList(tower(anchors * n) for n in self.sizes)
        nn.init.constant_(self.towers[0][-1].bias, -4.6)  # a probability of 1 %, as nearly everything is background

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        scores, boxes = (
            torch.cat([tower(level).permute(0, 2, 3, 1).reshape(len(level), -1, n) for level in levels], 1)
            for tower, n in zip(self.towers, self.sizes, strict=True)
        )
        return {"cls_logits": scores, "bbox_regression": boxes}


def heads() -> tuple[Any, Any, Any, str]:
    """(pixel head, pyramid, box head, whose they are): torchvision's, or this file's where it cannot be imported."""
    try:
        from torchvision.models.detection.retinanet import RetinaNetHead
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.ops import FeaturePyramidNetwork
    except (ImportError, RuntimeError):  # the latter from a torchvision of another build than torch
        return PlainPixelHead, PlainPyramid, PlainBoxHead, "small ones of this example"

    def pixel_head(channels: int, classes: int) -> nn.Module:
        return DeepLabHead(channels, classes, atrous_rates=(2, 3, 4))  # fit for maps of 8x8 to 16x16 pixels

    return pixel_head, FeaturePyramidNetwork, RetinaNetHead, "torchvision's"


class Segmenter(nn.Module):
    """A class for every pixel, from the last stage of a dilated backbone."""

    def __init__(self, backbone: Network) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = heads()[0](backbone.feature_channels[-1], len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        out = self.head(self.backbone(images)[-1])
        return F.interpolate(out, images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, seen: Drawings) -> Tensor:
        return F.cross_entropy(self(seen.images), seen.pixels)


class Detector(nn.Module):
    """A box and the scores of all shapes for each pixel of each level of a feature pyramid."""

    def __init__(self, backbone: Network, channels: int = 64) -> None:
        super().__init__()
        _, pyramid, box_head, _ = heads()
        self.backbone = backbone
        self.pyramid = pyramid(list(backbone.feature_channels), channels)
        self.head = box_head(channels, 1, len(SHAPES) - 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N, A, classes) before the sigmoid, boxes (N, A, 4) relative to the anchors, and the anchors (A, 4)."""
        features = {str(i): f for i, f in enumerate(self.backbone(images))}
        out = self.head(list(self.pyramid(features).values()))
        anchors = []
        for f, stride, side in zip(features.values(), self.backbone.feature_strides, ANCHORS, strict=True):
            y, x = (stride * (torch.arange(n, device=f.device) + 0.5) for n in f.shape[2:])
            y, x = (t.flatten() for t in torch.meshgrid(y, x, indexing="ij"))
            half = side * images.shape[-1] / 2
            anchors.append(torch.stack([x - half, y - half, x + half, y + half], 1))
        return out["cls_logits"], out["bbox_regression"], torch.cat(anchors)

    def loss(self, seen: Drawings) -> Tensor:
        """RetinaNet's: focal loss (arXiv:1708.02002) of the scores, smooth L1 of the boxes of anchors that lie on a shape."""
        scores, offsets, anchors = self(seen.images)
        total = scores.new_zeros(())
        for score, offset, boxes, classes in zip(scores, offsets, seen.boxes, seen.classes, strict=True):
            each = overlaps(anchors, boxes)
            overlap, nearest = each.max(1)
            on = overlap >= 0.5
            on[each.argmax(0)] = True  # no box without an anchor
            wanted = torch.zeros_like(score)
            wanted[on, classes[nearest[on]] - 1] = 1
            counts = on | (overlap < 0.4)  # what lies between belongs to neither side
            entropy = F.binary_cross_entropy_with_logits(score, wanted, reduction="none")
            focus = (score.sigmoid() - wanted).abs() ** 2 * (0.25 * wanted + 0.75 * (1 - wanted))
            regression = F.smooth_l1_loss(offset[on], encode(boxes[nearest[on]], anchors[on]), reduction="sum", beta=0.1)
            total = total + ((focus * entropy)[counts].sum() + regression) / on.sum()
        return total / len(scores)

    def found(self, images: Tensor, threshold: float = 0.3) -> list[tuple[Tensor, Tensor]]:
        """Boxes (K, 4) and classes (K,) of each image; none overlaps a better one by more than half."""
        results = []
        scores, offsets, anchors = self(images)
        for score, offset in zip(scores, offsets, strict=True):
            score, classes = score.sigmoid().max(1)
            order = score.argsort(descending=True)[: int((score > threshold).sum())]
            boxes, kept = decode(offset[order], anchors[order]), []
            for i in range(len(order)):
                if not kept or overlaps(boxes[i : i + 1], boxes[kept]).max() < 0.5:
                    kept.append(i)
            results.append((boxes[kept], classes[order][kept] + 1))
        return results


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (A, 4) with boxes (B, 4): (A, B)."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clamp_min(0).prod(2)
    first, second = ((t[:, 2:] - t[:, :2]).prod(1) for t in (a, b))
    return common / (first[:, None] + second[None] - common)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Centre and side of boxes relative to their anchors', (K, 4)."""
    sides, own = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    return torch.cat([(boxes[:, :2] + sides / 2 - anchors[:, :2] - own / 2) / own, (sides / own).log()], 1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """The boxes that `encode` gives these offsets for."""
    own = anchors[:, 2:] - anchors[:, :2]
    centre, sides = anchors[:, :2] + own / 2 + offsets[:, :2] * own, own * offsets[:, 2:].exp()
    return torch.cat([centre - sides / 2, centre + sides / 2], 1)


# Training -------------------------------------------------------------------------------------------------------------

V1B = {"stem": "deep", "pooled_shortcut": True}
TASKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "segmentation": (Segmenter, {"output_stride": 8, **V1B}),
    "detection": (Detector, {"output_stride": 16}),
}


def frozen(backbone: Network, images: Tensor) -> Network:
    """The backbone with statistics of these images, as pretrained weights would have, and BatchNorms that do not learn."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become those of one pass
        norm.requires_grad_(False)
    with torch.no_grad():
        backbone.train()(images)
    return backbone.eval()


def both_paths(
    task: str, layers: tuple[int, ...], planes: tuple[int, ...], size: int, device: str, seed: int
) -> dict[str, nn.Module]:
    """The network of a task by path, of equal weights. Raises RuntimeError where a block would not run fused."""
    torch.manual_seed(seed)
    kind, settings = TASKS[task]
    # Of plain PyTorch, for the comparison; create_model("res2net50_v1b", features_only=True, output_stride=8) has the published
    # depth and width and runs fused as it is.
    backbone = Res2Net(layers, 26, 4, ReferenceBottle2neck, planes=planes, features_only=True, **settings)
    first = drawings(16, size, torch.Generator().manual_seed(seed)).images
    plain = kind(frozen(backbone, first)).to(device, memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    accelerate(fused.backbone)
    report = explain(fused.backbone, first[:2].to(device).contiguous(memory_format=torch.channels_last))
    if not all(block.fused for block in report):
        raise RuntimeError(f"not every block runs fused:\n{report}")
    return dict(zip(PATHS, (plain, fused), strict=True))


def train(model: Any, size: int, steps: int, batch: int, device: str, seed: int, title: str) -> list[float]:
    """The loss of every step; drawings and dropout are of `seed` alone."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'res2net-fused[bench]'") from None

    torch.manual_seed(seed)
    generator, losses = torch.Generator().manual_seed(seed + 1), []
    model.head.train()  # and not the backbone, whose norms are frozen
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in (bar := tqdm(range(steps), desc=title, unit="step")):
        loss = model.loss(drawings(batch, size, generator).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


def plot(losses: dict[str, dict[str, list[float]]], models: dict[str, dict[str, Any]], seen: Drawings, path: str) -> None:
    """Left the losses of both paths, right the drawings as they are and as both paths see them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    figure = plt.figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    styles = {"PyTorch": {"color": "0.7", "linewidth": 4}, "fused": {"color": "tab:blue", "linewidth": 1.2}}
    for axis, (task, by_path) in zip(left.subplots(len(losses), 1), losses.items(), strict=True):
        for name in PATHS:
            axis.plot(by_path[name], label=name, **styles[name])
        axis.set(title=task, xlabel="step", ylabel="training loss", ylim=(0, None))
        axis.legend()
    truth = (seen.pixels, list(zip(seen.boxes, seen.classes, strict=True)))
    with torch.no_grad():
        rows = {"drawn": truth} | {
            name: (models["segmentation"][name](seen.images).argmax(1), models["detection"][name].found(seen.images))
            for name in PATHS
        }
    grid = right.subplots(len(rows), len(seen.images), squeeze=False)
    for line, (name, (pixels, boxes)) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=12)
        for axis, image, labels, (corners, classes) in zip(line, seen.images, pixels, boxes, strict=True):
            picture = ((image - image.min()) / (image.max() - image.min())).permute(1, 2, 0).cpu().numpy()
            if name == "drawn":
                axis.imshow(picture)
            else:  # in grey, so that the only colours are those of the classes
                axis.imshow(picture.mean(2), cmap="gray", vmin=-0.5, vmax=1.5)
                shown = labels.cpu().float().masked_fill(labels.cpu() == 0, float("nan")).numpy()
                axis.imshow(shown, cmap=ListedColormap(COLOURS[1:]), vmin=1, vmax=3, alpha=0.5)
            for (x0, y0, x1, y1), kind in zip(corners.tolist(), classes.tolist(), strict=True):
                outline = {"fill": False, "edgecolor": COLOURS[kind], "linewidth": 2}
                axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, **outline))
            axis.set(xticks=[], yticks=[])
    names = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS[1:]]
    right.legend(names, SHAPES[1:], loc="outside lower center", ncols=3, title="pixels of each class, and boxes")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training, for each network and path (default 200)")
    parser.add_argument("--batch", type=int, default=8, help="drawings in a step (default 8)")
    parser.add_argument("--size", type=int, default=64, help="rows and columns of a drawing (default 64)")
    parser.add_argument("--layers", type=int, nargs=4, default=(1, 1, 1, 1), help="blocks in each stage (default 1 1 1 1)")
    parser.add_argument("--planes", type=int, nargs=4, default=(16, 32, 48, 64), help="of each stage (default 16 32 48 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and drawings (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--quick", action="store_true", help="12 steps of 4 drawings of 48x48 pixels: to see that it runs")
    parser.add_argument("--out", default="dense_prediction.png", help="the picture (default dense_prediction.png)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.batch, arguments.size = 12, 4, 48
    Path(arguments.out).resolve().parent.mkdir(parents=True, exist_ok=True)  # rather now than after the training
    print(f"heads: {heads()[3]}")
    shape = (tuple(arguments.layers), tuple(arguments.planes), arguments.size, arguments.device, arguments.seed)
    models = {task: both_paths(task, *shape) for task in TASKS}
    settings = (arguments.size, arguments.steps, arguments.batch, arguments.device, arguments.seed)
    losses = {
        task: {name: train(model, *settings, title=f"{task}, {name}") for name, model in by_path.items()}
        for task, by_path in models.items()
    }
    for task, by_path in losses.items():
        for name, curve in by_path.items():
            last = curve[-max(1, len(curve) // 10) :]
            print(f"{task:13} {name:8} loss {curve[0]:.3f} at first, {sum(last) / len(last):.3f} at last")
    seen = drawings(4, arguments.size, torch.Generator().manual_seed(arguments.seed + 2)).to(arguments.device)
    plot(losses, models, seen, arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
