"""Scale s against latency: Res2Nets of equal FLOPs, from one group (ResNet-50) to eight, fused and by PyTorch's own operators.

All networks and both paths take turns in one run; medians are plotted. `res2net-fused bench` does the same with more peers, and
compares every result with float64 first.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

from res2net_fused import accelerate
from res2net_fused._timing import Contender, measure
from res2net_fused.models.registry import create_model

EXAMPLES = """examples:
  python examples/scale_latency.py
  python examples/scale_latency.py --batch 1 --repeats 50 --out latency.png
  python examples/scale_latency.py --device cuda --dtype bfloat16 --batch 32
"""
NETWORKS = {1: "resnet50", 2: "res2net50_48w_2s", 4: "res2net50_26w_4s", 8: "res2net50_14w_8s"}
PATHS = ("PyTorch", "fused")


def milliseconds(
    batch: int,
    size: int,
    repeats: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: tuple[int, ...] | None = None,
) -> dict[str, dict[int, float]]:
    """The median of one forward pass by path and scale; layers: blocks in each stage instead of ResNet-50's."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'res2net-fused[bench]'") from None

    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    models: dict[tuple[str, int], nn.Module] = {}
    for scale, name in NETWORKS.items():
        plain = create_model(name, fused=False, layers=layers).eval().to(device, dtype, memory_format=torch.channels_last)
        models["PyTorch", scale] = plain
        models["fused", scale] = accelerate(copy.deepcopy(plain))
    contenders = {key: Contender(model, [images]) for key, model in models.items()}
    with tqdm(total=repeats, unit="round") as bar:
        timings = measure(contenders, device, seconds=0, min_repeats=repeats, max_repeats=repeats, advance=bar.update)
    return {path: {scale: timings[path, scale].median_ms for scale in NETWORKS} for path in PATHS}


def plot(medians: dict[str, dict[int, float]], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    styles = {"PyTorch": {"color": "0.5", "marker": "s"}, "fused": {"color": "C0", "marker": "o"}}
    for name, by_scale in medians.items():
        axes.plot(list(by_scale), list(by_scale.values()), label=name, **styles[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(NETWORKS), [f"{s}\n{n.removeprefix('res2net50_').replace('_', '')}" for s, n in NETWORKS.items()])
    axes.set(xlabel="scale s", ylabel="median of one forward pass, ms", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images at once (default 8)")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of the images (default 224)")
    parser.add_argument("--repeats", type=int, default=10, help="of every network and path (default 10)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default float32")
    parser.add_argument("--out", default="scale_latency.png", help="the plot (default scale_latency.png)")
    arguments = parser.parse_args()
    Path(arguments.out).resolve().parent.mkdir(parents=True, exist_ok=True)  # rather now than after the measurements
    dtype = getattr(torch, arguments.dtype)
    medians = milliseconds(arguments.batch, arguments.size, arguments.repeats, arguments.device, dtype)
    print("scale     " + "".join(f"{scale:>10}" for scale in NETWORKS))
    for path, by_scale in medians.items():
        print(f"{path:10}" + "".join(f"{ms:>10.1f}" for ms in by_scale.values()) + "  ms")
    title = f"ResNet-50 and Res2Net-50, batch {arguments.batch}, {arguments.dtype}, {arguments.device}"
    plot(medians, title, arguments.out)
    print(f"plot: {arguments.out}")


if __name__ == "__main__":
    main()
