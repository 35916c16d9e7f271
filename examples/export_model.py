"""A fused network exported: compiled ahead of time into one package, and written as ONNX with plain operators.

The package holds machine code that calls this package's operators; a program that loads it imports `res2net_fused` first. The
ONNX file holds ONNX's own operators only, for any runtime.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import res2net_fused
from res2net_fused.models.checkpoint import load_checkpoint
from res2net_fused.models.registry import create_model, list_models

EXAMPLES = """examples:
  python examples/export_model.py
  python examples/export_model.py --model dla60_res2net --checkpoint dla60.pth --out exported
"""


def write_package(model: nn.Module, images: Tensor, path: Path) -> None:
    """Ahead-of-time compiled, for inputs of this shape; weights are folded and packed once, and are part of the package."""
    with torch.no_grad():
        program = torch.export.export(res2net_fused.freeze(model), (images,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """Writes it for any batch: the fused blocks give PyTorch's own operators to the exporter."""
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(model, (images,), str(path), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="res2net50_26w_4s", choices=list_models(), metavar="NAME", help="of list_models()")
    parser.add_argument("--checkpoint", help="published weights (default: random)")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of the images (default 224)")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="folder (default exported)")
    arguments = parser.parse_args()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'res2net-fused[bench]'") from None
    warnings.simplefilter("ignore")  # the exporters', about themselves
    model = create_model(arguments.model).eval()
    if arguments.checkpoint:
        load_checkpoint(model, arguments.checkpoint)
    images = torch.randn(2, 3, arguments.size, arguments.size)
    with torch.no_grad():
        expected = model(images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        print(f"no ONNX file: {error} (pip install onnx onnxscript onnxruntime)")
        onnxruntime = None
    package, file = arguments.out / f"{arguments.model}.pt2", arguments.out / f"{arguments.model}.onnx"
    results: dict[Path, Tensor] = {}
    with tqdm(total=2 if onnxruntime is None else 4, unit="step") as bar:
        bar.set_description("compiling, for a minute or more")
        write_package(model, images, package)
        bar.update()
        bar.set_description("running the package")
        results[package] = torch._inductor.aoti_load_package(str(package))(images)
        bar.update()
        if onnxruntime is not None:
            bar.set_description("writing ONNX")
            write_onnx(model, images, file)
            bar.update()
            bar.set_description("running ONNX")
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            results[file] = torch.from_numpy(logits)
            bar.update()
    for path, logits in results.items():
        print(f"{path}: relative difference {float((logits - expected).norm() / expected.norm()):.1e}")


if __name__ == "__main__":
    main()
