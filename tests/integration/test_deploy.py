"""Networks compiled, exported, packaged ahead of time and written as ONNX: whole graphs with the results of plain PyTorch."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import assert_close, relative_error
from networks import FAMILIES, TINY, images_for, is_dla, pair, quick, small, tiny_pair
from official_models import official
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain, freeze, hierarchical_conv2d, pack_weights
from res2net_fused.chain.tolerances import network_bound
from res2net_fused.models.registry import list_models

OPERATORS = ("hierarchical_conv2d.default", "bottle2neck.default", "hierarchical_conv_bn.default")
IMAGES = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operators_in(graph):
    """How often each of the package's operators is called in a graph."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return {name: names.count(f"res2net_fused.{name}") for name in OPERATORS}


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(TINY, "res2net50_v1b", "se_res2net50"))
def test_whole_graph_in_eval_and_train(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    plain, fused = tiny_pair(name)
    compiled, images = torch.compile(fused, fullgraph=True, backend=backend), IMAGES.double()
    with torch.no_grad():
        assert_close(compiled(images), plain(images), 1e-10)
    assert sum(operators_in(graphs[-1]).values()) == 3
    plain.train(), fused.train()
    compiled(images)
    assert operators_in(graphs[-1])["hierarchical_conv_bn.default"] == 3


@pytest.mark.parametrize("name", quick(TINY, "res2next50"))
def test_training_step_of_a_whole_graph(name):
    plain, fused = (network.train() for network in tiny_pair(name))
    images = IMAGES.double()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for call in (plain, compiled):
        call(images).square().sum().backward()
    for (key, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-8, key
    for (key, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert_close(ours.double(), theirs.double(), 1e-12), key


def check_compiled(name, backend):
    """Eval and a training step of a network with few blocks, within the table of tolerances."""
    plain, fused = pair(name)
    exact, images = copy.deepcopy(plain).double(), images_for(name)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    for training in (False, True):
        for network in (plain, fused, exact):
            network.train(training)
        with torch.set_grad_enabled(training):
            expected = exact(images.double())
            out = compiled(images)
            assert relative_error(out, expected) <= network_bound(relative_error(plain(images), expected))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_network_compiles(name):
    check_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_through_inductor(name):
    check_compiled(name, "inductor")


def test_dla_is_one_graph():
    plain, fused = pair("dla60_res2net")
    images = images_for("dla60_res2net")
    with torch.no_grad():
        out = torch.compile(fused, fullgraph=True, backend="eager")(images)
        assert_close(out, plain(images), 1e-4)


def test_through_inductor(monkeypatch):
    monkeypatch.setenv("CI", "1")  # with which Inductor refuses an operator of which it knows a decomposition
    plain, fused = tiny_pair("se_res2net50", torch.float32)
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        expected = exact(IMAGES.double())
        out = torch.compile(freeze(fused), fullgraph=True)(IMAGES)
        assert relative_error(out, expected) <= network_bound(relative_error(plain(IMAGES), expected))


# Ahead of time --------------------------------------------------------------------------------------------------------

RELOAD = """
import sys, torch, res2net_fused
folder = sys.argv[1]
model = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
torch.save(model(torch.load(f"{folder}/images.pt")), f"{folder}/logits.pt")
"""


def package(network, images, folder):
    """Exported, compiled ahead of time and packaged; returns the exported program."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about its packages
        exported = torch.export.export(network, (images,))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
    return exported


def check_package(network, images, expected, folder):
    """The package in another process, which knows the package's operators and not the network."""
    exported = package(network, images, folder)
    blocks = sum(hasattr(module, "convs") for module in network.modules())
    assert sum(operators_in(exported.graph).values()) == blocks
    torch.save(images, folder / "images.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(folder)], check=True, timeout=600)
    logits = torch.load(folder / "logits.pt", weights_only=True)
    with torch.no_grad():
        assert_close(logits, network(images), 1e-5)
        assert_close(logits, expected, 1e-4)


@pytest.mark.slow
def test_package_reloaded_in_another_process(tmp_path):
    plain, fused = tiny_pair("res2net50_26w_4s", torch.float32)
    with torch.no_grad():
        check_package(freeze(fused), IMAGES, plain(IMAGES), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_package_of_every_family(name, frozen, tmp_path):
    plain, fused = pair(name)
    images = images_for(name)
    with torch.no_grad():
        check_package(freeze(fused) if frozen else fused, images, plain(images), tmp_path)


def test_exported_for_any_batch_and_size():
    plain, fused = tiny_pair("res2net50_26w_4s")
    sizes = {0: torch.export.Dim("n", min=1), 2: torch.export.Dim("h", min=9), 3: torch.export.Dim("w", min=9)}
    with torch.no_grad():
        program = torch.export.export(fused, (IMAGES.double(),), dynamic_shapes={"x": sizes}).module()
        for shape in ((1, 3, 40, 21), (3, 3, 64, 64)):
            images = torch.randn(shape, dtype=torch.float64)
            assert_close(program(images), plain(images), 1e-10)


# ONNX -----------------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """The operator as a user calls it."""

    def __init__(self, packed):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(4, 4, 3, 3) for _ in range(3))
        self.packed = pack_weights([w.detach() for w in self.weights]) if packed else None

    def forward(self, x):
        return hierarchical_conv2d(x, self.packed or list(self.weights))


def accelerated(name):
    return accelerate(pair(name)[0])


ONNX = {
    "accelerated": lambda: (accelerate(official()), IMAGES),
    "se_res2net50": lambda: (tiny_pair("se_res2net50", torch.float32)[1], IMAGES),
    "frozen": lambda: (freeze(tiny_pair("res2next50", torch.float32)[1]), IMAGES),
    "block": lambda: (Bottle2neck(64, 16).eval(), torch.randn(1, 64, 9, 11)),
    "chain": lambda: (Chain(False), torch.randn(1, 16, 9, 11)),
    "packed chain": lambda: (Chain(True), torch.randn(1, 16, 9, 11)),
}


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


def check_onnx(onnx, network, images, path, dynamo):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters', about themselves
        expected = network(images)
        torch.onnx.export(network, (images,), str(path), dynamo=dynamo, verbose=False)
    written = onnx.load(str(path))
    nodes = [*written.graph.node, *(node for function in written.functions for node in function.node)]
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert {"Conv"} <= {node.op_type for node in nodes}
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert_close(torch.from_numpy(out), expected, 1e-4)
    reports = explain(network)
    with torch.no_grad():
        network(images)
    assert all(report.fused for report in explain(network)) and len(reports) == len(explain(network))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ONNX)
def test_onnx_has_plain_operators(onnx, name, dynamo, tmp_path):
    check_onnx(onnx, *ONNX[name](), tmp_path / "model.onnx", dynamo)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_of_every_family(onnx, name, tmp_path):
    network = small(name).eval() if is_dla(name) else accelerated(name)
    check_onnx(onnx, network, images_for(name), tmp_path / "model.onnx", dynamo=True)


def test_exporters_get_pytorchs_own_operators(monkeypatch):
    """What the exporters are given, checked without them."""
    network = accelerate(official()).eval()
    monkeypatch.setattr("res2net_fused.ops.recording.is_in_onnx_export", lambda: True)
    with torch.no_grad():
        for model, x in ((network, IMAGES), (Chain(True), torch.randn(1, 16, 9, 11))):
            graph = torch.export.export(model, (x,)).graph
            assert not any(operators_in(graph).values())
    monkeypatch.undo()
    assert all(report.fused for report in explain(network, IMAGES))
