"""A whole Res2Net block on the `cuda` backend, its chain emulated, against the reference block in float64."""

from __future__ import annotations

import copy

import torch
from torch import nn

from res2net_fused import Bottle2neck
from res2net_fused.backends.cuda import block as cuda_block
from res2net_fused.backends.cuda import plan as cuda_plan
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.modules.block_parts import parts_of
from res2net_fused.modules.folding import fold_block
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

from . import harness

BLOCKS = {
    "w26s4": dict(inplanes=32, planes=64, baseWidth=26, scale=4),
    "w14s3": dict(inplanes=24, planes=56, baseWidth=16, scale=3),
    "first": dict(inplanes=32, planes=64, baseWidth=26, scale=3, passthrough="first"),
    "first_added": dict(inplanes=32, planes=64, baseWidth=26, scale=3, passthrough="first_added"),
    "stage": dict(inplanes=32, planes=64, baseWidth=26, scale=4, stype="stage", stride=2),
}
ODD_BLOCKS = {"w27": dict(inplanes=32, planes=64, baseWidth=27, scale=3)}  # not in half precision


def emulated_launch(problem: ChainProblem, x, out, packed, fill) -> None:
    """`cuda_chain.launch_chain` on the CPU, by the emulator."""
    case = harness.Case(
        problem.width, problem.scale, problem.batch, problem.height, problem.width_pixels, problem.dtype,
        problem.config.as_kwargs(), clusters=True,
    )  # fmt: skip
    passed = cuda_plan.copied_group(problem)
    findings, *_ = harness.launch(case, harness.plan_of(case), x, out, packed, fill, passed, seed=1)
    assert findings == {}


def relative_error_of_block(name: str, dtype: torch.dtype, monkeypatch) -> float:
    monkeypatch.setattr(cuda_block, "launch_chain", emulated_launch)
    torch.manual_seed(3)
    arguments = (BLOCKS | ODD_BLOCKS)[name]
    planes, stride = arguments["planes"] * 4, arguments.get("stride", 1)
    downsample = nn.Conv2d(arguments["inplanes"], planes, 1, stride, bias=False)
    block = Bottle2neck(**arguments, downsample=downsample).eval().to(dtype)
    for key, value in block.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_().mul_(1 / value[0].numel() ** 0.5 if value.dim() > 1 else 0.5)
    x = torch.randn(2, arguments["inplanes"], 5, 7, dtype=dtype)
    with torch.no_grad():
        config = block.chain_config
        problem = ChainProblem(
            config, x.device, dtype, 2, 5, 7, block.width, len(block.convs), False, (arguments["inplanes"], planes)
        )
        out = cuda_block.block_forward(problem, x, block.downsample(x), fold_block(parts_of(block), dtype), True)
        expected = ReferenceBottle2neck.forward(copy.deepcopy(block).double(), x.double())
    assert out.is_contiguous() and out.dtype == dtype
    return float((out.double() - expected).norm() / expected.norm())
