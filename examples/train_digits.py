"""Trains a narrowed Res2NeXt-29 on scikit-learn's handwritten digits, fused and by PyTorch's own operators, from one seed.

The network is the CIFAR form of Res2NeXt-29 (6c x 24w x 4s), narrowed: three stages of 'normal' bottlenecks whose 3x3
convolutions have six groups. Both paths see the same weights, the same batches in the same order and the same augmentation;
their loss curves and test accuracies are plotted over each other.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from res2net_fused import Bottle2neck, accelerate, explain
from res2net_fused._native.library import cpu_library
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

EXAMPLES = """examples:
  python examples/train_digits.py                            20 epochs of both paths, plot to digits.png
  python examples/train_digits.py --epochs 3 --plot ''       a short run without a plot
  python examples/train_digits.py --recompute                less memory: convolve again in backward
  python examples/train_digits.py --device cuda --autocast bfloat16
"""


class Res2NeXt29(nn.Module):
    """(N, 1, 8, 8) -> logits (N, 10): a 3x3 stem, three stages at 8x8, 4x4 and 2x2 pixels, mean, classifier.

    cardinality, width, scale: c, w and s of 6c x 24w x 4s, w as for 64 planes. planes: of the stages, 64, 128 and 256 in the
    published network; blocks: in each of them, there 3.
    """

    def __init__(self, block=Bottle2neck, cardinality=6, width=24, scale=4, planes=(8, 16, 32), blocks=1) -> None:
        super().__init__()
        channels = 32
        stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        stages: list[nn.Module] = []
        for i, p in enumerate(planes):
            for j in range(blocks):
                stride, last = (2 if i and not j else 1), channels
                channels = p * block.expansion
                shortcut = None
                if not j:
                    shortcut = nn.Sequential(nn.Conv2d(last, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
                stype = "stage" if stride > 1 else "normal"
                stages.append(
                    block(last, p, stride, shortcut, baseWidth=width, scale=scale, stype=stype, cardinality=cardinality)
                )
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(images)).mean((2, 3)))


@dataclass
class Curves:
    """loss: of every step. accuracy: on the test images after every epoch, 0 to 1."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def load_digits(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1437, 1, 8, 8) and labels, test images (360, 1, 8, 8) and labels; zero mean, unit deviation."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'res2net-fused[bench]'") from None

    digits = sklearn_digits()
    parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train, test, train_labels, test_labels = (torch.as_tensor(part, device=device) for part in parts)
    mean, deviation = train.mean(), train.std()
    train, test = (((t - mean) / deviation).float().unsqueeze(1) for t in (train, test))
    return train, train_labels.long(), test, test_labels.long()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to one pixel each way, the same for all its images: enough against learning by heart."""
    down, right = (int(n) for n in torch.randint(-1, 2, (2,), generator=generator))
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    return padded[:, :, 1 + down : 9 + down, 1 + right : 9 + right]


def train(
    model: nn.Module, data, epochs: int, seed: int, batch: int = 64, autocast: torch.dtype | None = None, title: str = ""
) -> Curves:
    """SGD with momentum and a one-cycle rate; draws batches and augmentation from `seed` alone."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'res2net-fused[bench]'") from None

    images, labels, test_images, test_labels = data
    device = images.device.type
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
    curves = Curves()
    with tqdm(total=epochs * steps, desc=title, unit="step") as bar:
        for _ in range(epochs):
            model.train()
            for chosen in torch.randperm(len(images), generator=generator)[: steps * batch].to(images.device).split(batch):
                with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
                    logits = model(shifted(images[chosen], generator))
                    loss = nn.functional.cross_entropy(logits, labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                curves.loss.append(loss.item())
                bar.update()
            model.eval()
            with torch.no_grad():
                right = model(test_images).argmax(1) == test_labels
            curves.accuracy.append(right.float().mean().item())
            bar.set_postfix(loss=f"{curves.loss[-1]:.3f}", accuracy=f"{curves.accuracy[-1]:.4f}")
    return curves


def train_both(epochs: int, seed: int = 0, device: str = "cpu", autocast=None, recompute: bool = False) -> dict[str, Curves]:
    """{'fused': ..., 'reference': ...}, from the same initial weights. Raises RuntimeError if a block would not run fused."""
    torch.manual_seed(seed)
    reference = Res2NeXt29(ReferenceBottle2neck).to(device)
    fused = Res2NeXt29(Bottle2neck).to(device)
    fused.load_state_dict(copy.deepcopy(reference.state_dict()))
    # By name: left to itself, the package trains such small images by PyTorch's own operators, which are as fast.
    native = "triton" if device.startswith("cuda") else "cpu" if cpu_library().loaded else "reference"
    accelerate(fused, native, recompute=recompute)
    data = load_digits(device)
    report = explain(fused.train(), data[0][:8])
    if not all(block.fused for block in report):
        raise RuntimeError(f"not every block runs fused:\n{report}")
    models = {"fused": fused, "reference": reference}
    return {name: train(model, data, epochs, seed, autocast=autocast, title=name) for name, model in models.items()}


def plot(curves: dict[str, Curves], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = {"reference": {"color": "0.6", "linewidth": 4}, "fused": {"color": "tab:blue", "linewidth": 1.2}}
    for name in ("reference", "fused"):
        left.plot(curves[name].loss, label=name, **styles[name])
        percent = [100 * accuracy for accuracy in curves[name].accuracy]
        right.plot(range(1, len(percent) + 1), percent, label=name, **styles[name])
    left.set(xlabel="step", ylabel="training loss", yscale="log", title="Handwritten digits, Res2NeXt-29 narrowed")
    right.set(xlabel="epoch", ylabel="test accuracy, %", title="Same seed, same batches")
    right.axhline(97, color="0.8", linestyle=":")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="through the 1437 training images (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="mixed precision (default: none)")
    parser.add_argument("--recompute", action="store_true", help="convolve again in backward instead of keeping the outputs")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1, the fastest for images of 8x8 pixels)")
    parser.add_argument("--plot", default="digits.png", help="where the curves go; '' for no plot (default digits.png)")
    arguments = parser.parse_args()
    if arguments.plot:
        Path(arguments.plot).resolve().parent.mkdir(parents=True, exist_ok=True)  # rather now than after the training
    torch.set_num_threads(arguments.threads)
    autocast = getattr(torch, arguments.autocast) if arguments.autocast else None
    curves = train_both(arguments.epochs, arguments.seed, arguments.device, autocast, arguments.recompute)
    for name, curve in curves.items():
        print(f"{name:10} final loss {curve.loss[-1]:.4f}  test accuracy {100 * curve.accuracy[-1]:.2f} %")
    if arguments.plot:
        plot(curves, arguments.plot)
        print(f"curves: {arguments.plot}")


if __name__ == "__main__":
    main()
