"""Every kernel configuration for the published shapes, compiled for five architectures with no GPU.

Read from the results: shared memory, register spills (from the binary, since Triton's own count needs a driver),
tensor-core instructions and 16-byte copies. A default run compiles a rotation, one dtype, batch and architecture per shape;
`-m ''` the full product.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_calls import (  # noqa: E402
    BATCHES,
    CAPABILITIES,
    PRECISIONS,
    SHAPES,
    SHARED_LIMIT,
    SPEECHBRAIN,
    Shape,
    calls,
    calls_of_block,
    calls_of_rows,
    calls_of_training,
    source,
    triton_key,
)

from res2net_fused.backends.triton.kernels.conv1d_fwd import conv1d_fwd  # noqa: E402
from res2net_fused.backends.triton.kernels.conv3x3_bn_fwd import conv3x3_bn_fwd  # noqa: E402
from res2net_fused.backends.triton.kernels.conv3x3_dgrad import conv3x3_dgrad  # noqa: E402
from res2net_fused.backends.triton.kernels.conv3x3_fwd import conv3x3_fwd, interpreted  # noqa: E402
from res2net_fused.backends.triton.launch import KernelCall  # noqa: E402
from res2net_fused.backends.triton.step_plan import has_wide_products  # noqa: E402
from res2net_fused.chain.config import (  # noqa: E402
    Chain1dConfig,  # noqa: E402
)

pytestmark = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: nothing is compiled")


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Stack frame of a thread, where registers are spilled to; the kernels have nothing else to keep there."""
    (folder / "kernel.cubin").write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "-res-usage", folder / "kernel.cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


def compile_for(call: KernelCall, capability: tuple[int, int]):
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source(call), target=target, options=call.options)


def check_compiled(call: KernelCall, capability: tuple[int, int], folder: Path) -> None:
    compiled = compile_for(call, capability)
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    assert stack_bytes(compiled.asm["cubin"], folder) == 0, "registers are spilled"
    masks = re.findall(r"and\.b32 .*, -8192;", compiled.asm["ptx"])  # that leave the bits of TF32
    assert bool(masks) == rounds(call), masks
    check_waits(call, compiled.asm["ptx"], capability)
    if "BLOCK_K" in call.arguments:
        check_tensor_cores(call, compiled.asm["ptx"], capability)
    if call.kernel in (conv3x3_fwd, conv3x3_bn_fwd, conv3x3_dgrad):
        check_wide_copies(call, compiled.asm["ptx"])


def check_waits(call: KernelCall, ptx: str, capability: tuple[int, int]) -> None:
    """What overlaps the launch before it waits ahead of all accesses to memory, and only then lets the next one begin."""
    overlaps = call.options.get("launch_pdl", False)
    assert overlaps == call.arguments.get("OVERLAPS", False)
    assert overlaps == (capability >= (9, 0) and "OVERLAPS" in call.arguments)
    waits = [ptx.find(f"griddepcontrol.{what};") for what in ("wait", "launch_dependents")]
    touches = re.search(r"\b(ld|st|atom|red)\.(volatile\.)?global|\bcp\.(async|reduce)", ptx)
    assert touches is not None
    assert 0 <= waits[0] < waits[1] < touches.start() if overlaps else max(waits) < 0


def rounds(call: KernelCall) -> bool:
    """Whether a kernel rounds factors: what it reads of x, or what it leaves for another product."""
    arguments = call.arguments
    if arguments.get("PRECISION") != "tf32":
        return False
    if "ROUNDS" in arguments:
        return arguments["ROUNDS"] or arguments.get("FORMS_NEXT", False)
    if "NORM" in arguments:  # with batch statistics bn_bwd does it
        return arguments.get("FEEDS", True) and not arguments["NORM"]
    return arguments.get("FORMS_NEXT", True)


def check_tensor_cores(call: KernelCall, ptx: str, capability: tuple[int, int]) -> None:
    found = {name: name in ptx for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma")}
    arguments, warps = call.arguments, call.options["num_warps"]
    dtype = arguments["weight" if "weight" in arguments else "weights"].dtype
    if dtype == torch.float32 and arguments["PRECISION"] == "ieee":
        assert not any(found.values()), "an exact float32 product cannot come from tensor cores"
    elif has_wide_products(capability) and arguments.get("BLOCK_M", arguments.get("BLOCK_C")) >= 64 <= 16 * warps:
        assert found["wgmma.mma_async" if capability == (9, 0) else "tcgen05.mma"], found
    else:
        assert found["mma.sync"], found


def check_wide_copies(call: KernelCall, ptx: str) -> None:
    """Scratch (or an aligned x) and the weights travel 16 bytes at a time, in every stage of the pipeline."""
    arguments = call.arguments
    bytes_per_element = arguments["weights"].element_size()
    vec, group = ("DZ_VEC", "PADDED") if call.kernel is conv3x3_dgrad else ("SOURCE_VEC", "SOURCE_GROUP")
    if arguments[vec] * bytes_per_element < 16 or arguments[group] * bytes_per_element % 16:
        return
    threads = 32 * call.options["num_warps"]
    copies = 0
    for rows in (arguments["BLOCK_M"], arguments["BLOCK_N"]):
        # A tile with less than 16 bytes per thread is spread over all threads in narrower copies.
        copies += rows * arguments["BLOCK_K"] * bytes_per_element // (16 * threads)
    wide = len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx))
    assert copies > 0 and wide >= copies * call.options["num_stages"], (wide, copies)


def _rotation() -> list[tuple]:
    """One combination per shape, such that neighbours differ in all of dtype, architecture and batch."""
    turns = zip(itertools.cycle(PRECISIONS), itertools.cycle(CAPABILITIES), itertools.cycle(BATCHES[:2]), strict=False)
    return [(shape, *precision, capability, batch) for shape, (precision, capability, batch) in zip(SHAPES, turns)]  # noqa: B905


def _name(value: object) -> str:
    return f"sm_{value[0]}{value[1]}" if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("shape, dtype, tf32, capability, batch", _rotation(), ids=_name)
def test_rotation(shape, dtype, tf32, capability, batch, tmp_path) -> None:
    for call in calls(shape, dtype, tf32, capability, batch):
        check_compiled(call, capability, tmp_path)


BLOCKS = [shape for shape in SHAPES if shape.pitch is None]


def check_block(shape: Shape, dtype: torch.dtype, capability: tuple[int, int], batch: int, folder: Path) -> None:
    compiled = calls_of_block(shape, dtype, capability, batch)
    assert {call.kernel.__name__ for call in compiled} == {"pointwise", "conv3x3_fwd"}
    for call in compiled:
        check_compiled(call, capability, folder)
        if call.kernel is conv3x3_fwd:
            assert call.arguments["SOURCE_VEC"] * dtype.itemsize == 16 or shape.groups > 1, "the padded layout is aligned"


SOME_BLOCKS = [
    (BLOCKS[0], torch.bfloat16, (12, 0)),  # of all pointwise tiles the widest
    (BLOCKS[3], torch.bfloat16, (9, 0)),
    (BLOCKS[12], torch.float32, (9, 0)),  # in TF32, PyTorch's default for convolutions
]


@pytest.mark.parametrize("shape, dtype, capability", SOME_BLOCKS, ids=_name)
def test_block(shape, dtype, capability, tmp_path) -> None:
    check_block(shape, dtype, capability, 32, tmp_path)


TRAINED = [shape for shape in SHAPES if shape.pitch is None]
SOME_TRAINED = [
    (TRAINED[0], torch.bfloat16, False, (9, 0)),
    (TRAINED[11], torch.float32, True, (8, 0)),
    (TRAINED[6], torch.float16, False, (10, 0)),
]


@pytest.mark.parametrize("shape, dtype, tf32, capability", SOME_TRAINED, ids=_name)
def test_training(shape, dtype, tf32, capability, tmp_path) -> None:
    for call in calls_of_training(shape, dtype, tf32, capability):
        check_compiled(call, capability, tmp_path)


SOME_ROWS = [(128, torch.bfloat16, False, (9, 0)), (64, torch.float16, False, (8, 0)), (64, torch.float32, True, (9, 0))]


@pytest.mark.parametrize("width, dtype, tf32, capability", SOME_ROWS, ids=_name)
def test_rows(width, dtype, tf32, capability, tmp_path) -> None:
    compiled = calls_of_rows(width, dtype, tf32)
    assert len(compiled) == 2 + tf32, "with and without a next convolution, and the first, which rounds x"
    for call in compiled:
        check_compiled(call, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=_name)
@pytest.mark.parametrize("dtype, tf32", PRECISIONS, ids=_name)
def test_all_rows(dtype, tf32, capability, tmp_path) -> None:
    for width, config, keep in itertools.product((16, 64, 128), (SPEECHBRAIN, Chain1dConfig(dilation=4)), (False, True)):
        for call in calls_of_rows(width, dtype, tf32, config, keep):
            check_compiled(call, capability, tmp_path)


def test_new_lengths_compile_nothing_in_rows() -> None:
    first, second = (calls_of_rows(64, torch.bfloat16, False, length=length) for length in (300, 301))
    assert [triton_key(call) for call in first] == [triton_key(call) for call in second]
    integers = [p for p in conv1d_fwd.params if not p.is_constexpr and isinstance(first[-1].arguments[p.name], int)]
    assert len(integers) == 10 and all(p.do_not_specialize for p in integers)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=_name)
@pytest.mark.parametrize("dtype, tf32", PRECISIONS, ids=_name)
def test_all_training(dtype, tf32, capability, tmp_path) -> None:
    seen = {}
    for shape in TRAINED:
        for call in calls_of_training(shape, dtype, tf32, capability):
            seen.setdefault(triton_key(call), (call, shape))
    for call, shape in seen.values():
        try:
            check_compiled(call, capability, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{call.kernel.__name__} of {shape}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=_name)
def test_every_block(dtype, capability, tmp_path) -> None:
    for shape, batch in itertools.product(BLOCKS, BATCHES):
        check_block(shape, dtype, capability, batch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=_name)
@pytest.mark.parametrize("dtype, tf32", PRECISIONS, ids=_name)
def test_every_configuration(dtype, tf32, capability, tmp_path) -> None:
    seen = {}
    for shape, batch in itertools.product(SHAPES, BATCHES):
        for call in calls(shape, dtype, tf32, capability, batch):
            seen.setdefault(triton_key(call), (call, shape, batch))
    assert len(seen) > len(SHAPES)
    for call, shape, batch in seen.values():
        try:
            check_compiled(call, capability, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{call.kernel.__name__} of {shape} at batch {batch}: {error}") from error


def test_new_sizes_compile_nothing() -> None:
    """H, W and batch are opaque to the compiler: only the tile, chosen by the plan, may differ."""
    first = calls(Shape("26w4s", 26, 4, 56), torch.bfloat16, False, (9, 0), 16)
    second = calls(Shape("26w4s", 26, 4, 57), torch.bfloat16, False, (9, 0), 17)
    assert [triton_key(call) for call in first] == [triton_key(call) for call in second]
    integers = [p for p in conv3x3_fwd.params if not p.is_constexpr and isinstance(first[-1].arguments[p.name], int)]
    assert len(integers) > 15 and all(p.do_not_specialize for p in integers)


def test_a_spill_would_be_seen(tmp_path) -> None:
    call = calls(Shape("26w4s", 26, 4, 56), torch.bfloat16, False, (8, 0), 32)[-1]
    arguments = {**call.arguments, "BLOCK_M": 256, "BLOCK_N": 128}
    large = replace(call, arguments=arguments, options={**call.options, "num_warps": 4, "num_stages": 2})
    assert stack_bytes(compile_for(large, (8, 0)).asm["cubin"], tmp_path) > 0
