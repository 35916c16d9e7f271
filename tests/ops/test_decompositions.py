"""Exported programs keep the fused operators, save and load, and decompose into PyTorch's for who asks."""

import copy
import io

import pytest
import torch
from helpers import assert_close, randomize
from torch import nn

from res2net_fused import Bottle2neck, accelerate, decompositions, hierarchical_conv1d, hierarchical_conv2d
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck


class Operators(nn.Module):
    """Both chains as a user calls them."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(8, 8, 3, 3) for _ in range(3))
        self.rows = nn.ParameterList(torch.randn(8, 8, 3) for _ in range(3))

    def forward(self, x):
        return hierarchical_conv2d(x, list(self.weights)), hierarchical_conv1d(x[:, :, 0], list(self.rows))


def projected(stage):
    downsample = nn.Sequential(nn.Conv2d(32, 64, 1, 2 if stage else 1, bias=False), nn.BatchNorm2d(64))
    return Bottle2neck(32, 16, 2 if stage else 1, downsample, stype="stage" if stage else "normal")


MODELS = {
    "block": lambda: Bottle2neck(32, 8),
    "projected": lambda: projected(False),
    "stage": lambda: projected(True),
    "accelerated": lambda: accelerate(ReferenceBottle2neck(32, 8)),
    "operators": Operators,
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
X = torch.randn(2, 32, 7, 9, generator=torch.Generator().manual_seed(5))
grads = pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])


def fused_operators(program):
    return [str(node.target) for node in program.graph.nodes if "res2net_fused" in str(node.target)]


def check_same(a, b, bound=5e-6):
    for ours, theirs in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        assert_close(ours, theirs, bound)


@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "grad"])
@models
def test_decomposed_for_who_asks(make, grad):
    model = randomize(make()).eval()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (X,))
    table = torch.export.default_decompositions()
    table.update(decompositions())
    assert fused_operators(program) and fused_operators(program.run_decompositions())
    for asked in (decompositions(), table):
        decomposed = program.run_decompositions(asked)
        assert not fused_operators(decomposed)
        check_same(decomposed.module()(X), model(X))


@pytest.mark.parametrize("side", [7, 9], ids=["", "square"])
def test_decomposed_with_sizes_left_open(side):
    model = randomize(Bottle2neck(32, 8)).eval()
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 32, side, 9),), dynamic_shapes=(sizes,))
        x = torch.randn(3, 32, 12, 9)
        check_same(program.run_decompositions(decompositions()).module()(x), model(x))


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("momentum", [0.1, None])
@grads
def test_a_training_block_is_saved_loaded_and_decomposed(grad, momentum, recompute):
    model = accelerate(randomize(ReferenceBottle2neck(32, 8)), backend="cpu", recompute=recompute).train()
    for bn in model.bns:
        bn.momentum = momentum
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (X,))
    assert fused_operators(program) == ["res2net_fused.hierarchical_conv_bn.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    plain = copy.deepcopy(model)
    expected = plain(X)
    for call in (torch.export.load(file).module(), program.run_decompositions(decompositions()).module()):
        check_same(call(X), expected)
        for name, buffer in call.named_buffers():
            assert_close(buffer.double(), plain.get_buffer(name).double(), 1e-5)


@grads
@models
def test_an_exported_program_becomes_onnx(make, grad):
    pytest.importorskip("onnxscript")
    with torch.set_grad_enabled(grad):
        program = torch.export.export(randomize(make()).eval(), (X,))
    graph = torch.onnx.export(program, dynamo=True, verbose=False).model.graph
    assert {node.domain for node in graph} <= {"", "ai.onnx"} and "Conv" in {node.op_type for node in graph}
