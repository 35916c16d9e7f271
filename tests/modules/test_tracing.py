"""Accelerated blocks under FX: leaves that run fused, opened for who asks for their inside."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, randomize
from official_models import IMAGES, blocks_of, official, run
from published_blocks.speakers1d import ESPnetBlock
from torch import fx, nn

from res2net_fused import Bottle2neck, accelerate, explain
from res2net_fused.backends import policy


def leaves(graph):
    return {node.target for node in graph.graph.nodes if node.op == "call_module"}


def test_blocks_are_leaves_and_run_fused():
    model = official()
    expected = run(model, IMAGES)
    accelerate(model)
    for graph in (fx.symbolic_trace(model), fx.symbolic_trace(fx.symbolic_trace(model))):
        assert set(blocks_of(model)) <= leaves(graph)
        for traced in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), fx.Transformer(graph).transform()):
            assert_close(run(traced, IMAGES), expected, 5e-6)
            assert all(r.fused for r in explain(traced)) and len(explain(traced)) == len(blocks_of(model))


def test_rows_too(monkeypatch):
    monkeypatch.setattr(policy, "chain_pays_1d", lambda *_: True)
    model = nn.Sequential(randomize(ESPnetBlock()).eval())
    x = torch.randn(2, 32, 23)
    expected = run(model, x)
    graph = fx.symbolic_trace(accelerate(model))
    assert leaves(graph) == {"0"}
    assert_close(run(graph, x), expected, 5e-6)
    assert all(r.fused for r in explain(graph))


def test_a_leaf_follows_the_mode_and_new_weights():
    model, plain = accelerate(official()), official()
    graph = fx.symbolic_trace(model)
    for m in (graph, plain):
        m.train()
    assert_close(run(graph, IMAGES), run(plain, IMAGES), 1e-5)
    for m in (graph, plain):
        m.eval()
    with torch.no_grad():
        for m in (model, plain):
            m.layer1[0].convs[0].weight.mul_(2)
    assert_close(run(graph, IMAGES), run(plain, IMAGES), 1e-5)


@pytest.mark.parametrize("make", [lambda: accelerate(official().layer1[1]), lambda: randomize(Bottle2neck(64, 16)).eval()])
def test_a_block_by_itself_is_traced_through(make):
    block = make()
    x = torch.randn(2, block.conv1.in_channels, 7, 9)
    graph = fx.symbolic_trace(block)
    assert "convs.0" in leaves(graph)
    assert [node.target for node in graph.graph.nodes if node.op == "placeholder"] == ["x"]
    assert_close(run(graph, x), run(block, x), 5e-6)


def test_a_hook_on_the_block_runs_once():
    model = official()
    model.layer1[1].register_forward_hook(lambda m, i, o: o * 3)
    expected = run(model, IMAGES)
    assert_close(run(fx.symbolic_trace(accelerate(model)), IMAGES), expected, 5e-6)


class Opening(fx.Tracer):
    """Records the functions inside PyTorch's convolutions."""

    def is_leaf_module(self, module, path):
        return not isinstance(module, nn.Conv2d) and super().is_leaf_module(module, path)


class Quantizer(fx.Tracer):
    pass


class Other(fx.Tracer):
    """A tracer with settings of its own."""

    def is_leaf_module(self, module, path):
        return isinstance(module, nn.Sequential) and path == "stem" or super().is_leaf_module(module, path)


@pytest.mark.parametrize(("tracer", "leaf"), [(Opening, False), (Quantizer, False), (Other, True)])
def test_who_asks_for_the_inside(tracer, leaf):
    model = official()
    expected = run(model, IMAGES)
    accelerate(model)
    graph = fx.GraphModule(model, tracer().trace(model))
    assert ("layer1.1" in leaves(graph)) is leaf
    assert_close(run(graph, IMAGES), expected, 5e-6)


def test_static_quantization_through_fx():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    graphs = []
    for model in (official(), accelerate(official())):
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (IMAGES,))
        run(prepared, IMAGES)
        graphs.append(quantize_fx.convert_fx(prepared))
    assert leaves(graphs[0]) == leaves(graphs[1])
    assert_close(run(graphs[1], IMAGES), run(graphs[0], IMAGES), 1e-2)


# torchvision's feature extraction -----------------------------------------------------------------------------------------

REQUESTS = {
    "stages": ["layer1", "layer2.0"],
    "inside": ["layer1.0.convs.1", "layer2.0"],
    "both": ["layer1.0", "layer1.0.bn3", "layer2.0"],
}


@pytest.mark.parametrize("names", REQUESTS.values(), ids=REQUESTS)
def test_feature_extractors(names):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = official()
    inner, nodes = [extraction.get_graph_node_names(model)[1]], {name: name for name in names}
    expected = run(extraction.create_feature_extractor(model, nodes), IMAGES)
    accelerate(model)
    inner.append(extraction.get_graph_node_names(model)[1])
    assert inner[0] == inner[1]
    extractor = extraction.create_feature_extractor(model, nodes)
    for key, value in run(extractor, IMAGES).items():
        assert_close(value, expected[key], 5e-6)
    opened = {name.rsplit(".", 2)[0] if "convs" in name else "layer1.0" for name in names if name.count(".") > 1}
    reports = {r.name: r.fused for r in explain(extractor)}
    assert reports and all(fused is not (name in opened) for name, fused in reports.items())
