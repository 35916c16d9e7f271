"""A timm Res2Net made to run fused, in two ways: its blocks taken over where they stand, and built with this package's block.

Prints how far both are from timm's own output, and for every block whether it runs fused and on which backend.
"""

from __future__ import annotations

import argparse
from types import ModuleType

import torch
from torch import Tensor, nn

import res2net_fused

EXAMPLES = """examples:
  python examples/accelerate_timm.py
  python examples/accelerate_timm.py --model res2next50 --size 160
  python examples/accelerate_timm.py --pretrained            fetches timm's weights
"""


def import_timm() -> ModuleType:
    """timm; where it cannot be imported the program ends and says why."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter from torchvision, which timm imports
        raise SystemExit(
            f"timm cannot be imported: {error}\n"
            "pip install --no-deps timm torchvision && pip install huggingface_hub safetensors pyyaml; torchvision must be of "
            "torch's own release and build, CPU or CUDA: python .ci/fit_torchvision.py sees to that."
        ) from error
    return timm


def taken_over(model: nn.Module) -> nn.Module:
    """The same model: keys, hooks and classes stay, every block that is recognised runs fused."""
    return res2net_fused.accelerate(model)


def rebuilt(name: str, model: nn.Module) -> nn.Module:
    """timm's network built with this package's block in the place of timm's, with the weights of `model`."""
    timm = import_timm()
    own = timm.models.res2net.Bottle2neck
    try:
        timm.models.res2net.Bottle2neck = res2net_fused.Bottle2neck
        built = timm.create_model(name)
    finally:
        timm.models.res2net.Bottle2neck = own
    built.load_state_dict(model.state_dict())
    return built


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((ours - theirs).norm() / theirs.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="res2net50_26w_4s", help="of timm's res2net.py (default res2net50_26w_4s)")
    parser.add_argument("--pretrained", action="store_true", help="with timm's weights, which are fetched (default: random)")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of the image (default 224)")
    arguments = parser.parse_args()
    model = import_timm().create_model(arguments.model, pretrained=arguments.pretrained).eval()
    images = torch.randn(1, 3, arguments.size, arguments.size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model(images)
        second = rebuilt(arguments.model, model).eval()
        first = taken_over(model)
        for how, network in (("taken over", first), ("rebuilt", second)):
            print(f"{how}: relative difference {difference(network(images), expected):.1e} from timm's own output")
    print(res2net_fused.patching.explain(first, images))


if __name__ == "__main__":
    main()
