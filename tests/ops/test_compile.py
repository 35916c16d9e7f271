"""torch.compile and torch.export: whole graphs, sizes that vary without recompiling, no weights baked in."""

import copy
import pickle

import pytest
import torch
from helpers import CHAINS, assert_close, randomize
from torch import nn

from res2net_fused import Bottle2neck, freeze, hierarchical_conv2d, pack_weights, refresh
from res2net_fused.modules import eligibility
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **keywords):
    return torch.compile(function, fullgraph=True, backend=backend, **keywords)


def counting():
    """A backend that counts compilations, and runs the graph as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


SIZES = [(2, 7, 9), (3, 12, 5), (5, 6, 14), (4, 30, 31)]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
MORE_CHAINS = [pytest.param(name, marks=pytest.mark.slow) for name in ("first_added", "none", "dilated3_groups", "s1")]
dynamic_chains = pytest.mark.parametrize("name", ["last", "stage_stride2", *MORE_CHAINS])


def mark(x):
    for dimension in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, dimension)
    return x


# The operator ---------------------------------------------------------------------------------------------------------


@layouts
@dynamic_chains
def test_operator_with_dynamic_sizes_compiles_once(name, layout):
    chain = CHAINS[name]
    graphs, backend = counting()

    def call(x, weights, biases):
        return hierarchical_conv2d(x * 2, weights, biases, **chain.settings) + 1

    function = compiled(call, backend)
    for size in SIZES:
        x, weights, biases = chain.tensors(size)
        x = x.contiguous(memory_format=layout)
        out = function(mark(x), weights, biases)
        assert torch.equal(out, call(x, weights, biases))
        assert out.is_contiguous(memory_format=layout)
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.res2net_fused.hierarchical_conv2d.default in targets


@dynamic_chains
def test_operator_with_gradients_and_dynamic_sizes(name):
    chain = CHAINS[name]

    def call(x, weights, biases):
        return hierarchical_conv2d(x, weights, biases, **chain.settings).square()

    function = compiled(call)
    for size in SIZES[:3]:
        x, weights, biases = chain.tensors(size)
        tensors = [x, *weights, *biases]
        for tensor in tensors:
            tensor.requires_grad_()
        got = torch.autograd.grad(function(mark(x), weights, biases).sum(), tensors)
        for a, b in zip(got, torch.autograd.grad(call(x, weights, biases).sum(), tensors), strict=True):
            assert_close(a, b, 1e-12)


@pytest.mark.slow
def test_operator_through_inductor():
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors((2, 7, 9), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    tensors = [x, *weights, *biases]
    for tensor in tensors:
        tensor.requires_grad_()

    def call(x, weights, biases):
        return hierarchical_conv2d((x + 1).relu(), weights, biases).sigmoid()

    function = compiled(call, "inductor")
    out, expected = function(x, weights, biases), call(x, weights, biases)
    assert_close(out, expected, 5e-6)
    got = torch.autograd.grad(out.square().sum(), tensors)
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
        assert_close(a, b, 5e-6)


@pytest.mark.parametrize("shape", [(0, 7, 9), (2, 1, 1), (1, 1, 5)], ids=str)
def test_operator_compiled_at_edge_sizes(shape):
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors(shape)
    for layout in LAYOUTS.values():
        torch._dynamo.reset()
        y = torch.empty_like(x, memory_format=layout).copy_(x)
        out = compiled(lambda x: hierarchical_conv2d(x, weights, biases) + 1)(y)
        assert torch.equal(out, hierarchical_conv2d(y, weights, biases) + 1)


def test_pack_inside_and_outside_of_the_graph():
    x, weights, biases = CHAINS["dilated"].tensors(dtype=torch.float32)
    expected = hierarchical_conv2d(x, weights, biases, dilation=2)
    outside = pack_weights(weights, biases, dilation=2)
    assert torch.equal(compiled(lambda x, p: hierarchical_conv2d(x, p))(x, outside), expected)

    def inside(x, weights, biases):
        return hierarchical_conv2d(x, pack_weights(weights, biases, dilation=2))

    assert torch.equal(compiled(inside)(x, weights, biases), expected)


def test_the_backend_is_chosen_when_the_graph_runs(monkeypatch):
    chain = CHAINS["last"]
    graphs, backend = counting()
    function = compiled(lambda x, w: hierarchical_conv2d(x, w), backend)
    x, weights, _ = chain.tensors()
    function(x, weights)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="RES2NET_FUSED_BACKEND=triton cannot run"):
        function(x, weights)
    assert len(graphs) == 1


def test_autocast_in_a_graph():
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors(dtype=torch.float32)

    def call(x, weights, biases):
        with torch.autocast("cpu", torch.bfloat16):
            return hierarchical_conv2d(x, weights, biases)

    out = compiled(call)(x, weights, biases)
    assert out.dtype == torch.bfloat16 and torch.equal(out, call(x, weights, biases))


class Chain(nn.Module):
    def __init__(self, weights, biases, settings):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self.settings = settings

    def forward(self, x):
        return hierarchical_conv2d(x, list(self.weights), list(self.biases), **self.settings)


@dynamic_chains
def test_export_of_the_operator_with_dynamic_shapes(name):
    chain = CHAINS[name]
    x, weights, biases = chain.tensors(SIZES[0])
    module = Chain(weights, biases, chain.settings)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    program = torch.export.export(module, (x,), dynamic_shapes={"x": dims})
    for size in SIZES:
        x = chain.tensors(size)[0]
        assert torch.equal(program.module()(x), module(x))


# The block ------------------------------------------------------------------------------------------------------------


def make(stype="normal", **keywords):
    stage = stype == "stage"
    downsample = nn.Sequential(nn.Conv2d(32, 32, 1, 2, bias=False), nn.BatchNorm2d(32)) if stage else None
    block = Bottle2neck(32, 8, 2 if stage else 1, downsample, stype=stype, **keywords)
    return randomize(block.double()).eval()


def sample(n, h, w):
    return torch.randn(n, 32, h, w, dtype=torch.float64)


def own_forward(block, x):
    return ReferenceBottle2neck.forward(block, x)


blocks = pytest.mark.parametrize("stype", ["normal", "stage"])


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@blocks
def test_block_with_dynamic_sizes_compiles_once(stype, frozen):
    block = make(stype)
    if frozen:
        freeze(block)
    graphs, backend = counting()
    function = compiled(block, backend)
    with torch.no_grad():
        for size in SIZES:
            x = sample(*size)
            assert_close(function(mark(x)), own_forward(block, x), 1e-12)
    assert len(graphs) == 1


@blocks
def test_block_with_gradients(stype):
    block = make(stype)
    twin = copy.deepcopy(block)
    x = sample(2, 7, 9).requires_grad_()
    got = torch.autograd.grad(compiled(block)(x).square().sum(), [x, *block.parameters()])
    expected = torch.autograd.grad(own_forward(twin, x).square().sum(), [x, *twin.parameters()])
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("stype", ["stage", pytest.param("normal", marks=pytest.mark.slow)])
def test_block_in_training_mode(stype):
    block = make(stype).train()
    twin = copy.deepcopy(block)
    x = sample(3, 7, 9)
    function = compiled(block)
    for _ in range(2):
        out, expected = function(x), own_forward(twin, x)
        assert_close(out, expected, 1e-12)
        out.square().sum().backward()
        expected.square().sum().backward()
    for (name, a), b in zip(block.state_dict().items(), twin.state_dict().values(), strict=True):
        assert_close(a.double(), b.double(), 1e-12), name
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-11)


def test_compiled_block_sees_new_weights():
    block = make()
    x = sample(2, 7, 9)
    function = compiled(block)
    with torch.no_grad():
        for _ in range(3):
            assert_close(function(x), own_forward(block, x), 1e-12)
            block.convs[0].weight.mul_(1.5)
            block.bn1.running_mean.add_(0.5)
    optimizer = torch.optim.Adam(block.parameters(), 0.1, fused=True)
    function(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert_close(function(x), own_forward(block, x), 1e-12)


@pytest.mark.slow
def test_compiled_block_moves_between_modes():
    block = make()
    x = sample(3, 7, 9)
    function = compiled(block)
    for _ in range(2):
        with torch.no_grad():
            assert_close(function(x), own_forward(block, x), 1e-12)
        block.train()
        expected = own_forward(copy.deepcopy(block), x)
        assert_close(function(x), expected, 1e-12)
        block.eval()


def test_eager_and_compiled_calls_in_turn():
    """What the eager call keeps, a training step of the compiled block must not leave stale."""
    block = make()
    x = sample(3, 7, 9)
    function = compiled(block)
    for _ in range(2):
        with torch.no_grad():
            assert_close(block(x), own_forward(block, x), 1e-12)
        for bn in (block.bn1, *block.bns, block.bn3):
            bn.train()
        function(x)
        for bn in (block.bn1, *block.bns, block.bn3):
            bn.eval()
        with torch.no_grad():
            assert_close(block(x), own_forward(block, x), 1e-12)


def test_frozen_block_then_refreshed():
    block = freeze(make())
    x = sample(2, 7, 9)
    function = compiled(block)
    with torch.no_grad():
        frozen = function(x)
        block.conv1.weight.mul_(2)
        assert_close(function(x), frozen, 1e-14)
        refresh(block)
        assert_close(function(x), own_forward(block, x), 1e-12)


def test_an_eager_call_makes_no_graph_anew():
    block, x = freeze(make()), sample(2, 7, 9)
    graphs, backend = counting()
    function = compiled(block, backend)
    with torch.no_grad():
        for call in (function, block, function):
            assert_close(call(x), own_forward(block, x), 1e-12)
    assert len(graphs) == 1


def hooked(block):
    block.convs[1].register_forward_hook(lambda module, args, out: 2 * out)


def patched(block):
    conv = block.convs[1]
    conv.forward = lambda x: 2 * type(conv).forward(conv, x)


def dilated(block):
    for conv in block.convs:
        conv.dilation = conv.padding = (2, 2)


def circular(block):
    block.convs[0].padding_mode = "circular"
    block.convs[0]._reversed_padding_repeated_twice = [1] * 4


def renormed(block):
    block.bn1 = nn.Identity()


def frozen_anew(block):
    refresh(block)
    block.conv1.weight.mul_(2)
    freeze(block)


MORE_CHANGES = [pytest.param(change, marks=pytest.mark.slow) for change in (circular, renormed, refresh, nn.Module.float)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # by each operator that a graph may hold
@pytest.mark.parametrize("change", [hooked, patched, dilated, frozen_anew, *MORE_CHANGES])
def test_frozen_block_changed_after_it_was_compiled(change, dtype):
    block = freeze(make().to(dtype))
    x = sample(2, 7, 9).to(dtype)
    function = torch.compile(block, backend="eager")
    # By default PyTorch's compiler sees no hook that comes later, of no model.
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=change is not hooked):
        block(x)  # else the block learns of its surroundings in the call below, after which a graph is made anew
        before = function(x)
        change(block)
        x = x.to(block.conv1.weight.dtype)
        after = block(x)
        assert torch.equal(function(x), after)
        assert change in (refresh, nn.Module.float) or not torch.allclose(before, after)


def pickled(block):
    return pickle.loads(pickle.dumps(block))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, pytest.param(pickled, marks=pytest.mark.slow)])
def test_blocks_of_one_geometry_share_a_graph(copied, dtype):
    graphs, backend = counting()
    block = freeze(make().to(dtype))
    others = [copied(block) for _ in range(2)]
    call = torch.compile(lambda block, x: block(x), backend=backend)
    with torch.no_grad():
        for b in (block, *map(freeze, map(randomize, others))):
            x = sample(2, 7, 9).to(dtype)
            assert torch.equal(call(b, x), b(x))
        assert len(graphs) == 1
        dilated(others[0])
        assert torch.equal(call(others[0], x), others[0](x)) and len(graphs) == 2


@pytest.mark.skipif(not eligibility._ONE_GUARD, reason="before torch 2.13 a graph guards every value of the geometry")
def test_a_graph_guards_the_geometry_of_the_modules_alone():
    """Not once more what it was when the block was recognised, value by value, which costs each call."""
    names = []
    watch = {"guard_filter_fn": lambda guards: [names.append(guard.name) or True for guard in guards]}
    with torch.no_grad():
        torch.compile(freeze(make()), backend="eager", options=watch)(sample(2, 7, 9))
    assert any(name.endswith(".padding") for name in names) and not any(".geometry[" in name for name in names)


def guards_of_a_frozen_block(x):
    """What a graph of a frozen block compares before each call: places, as far as they are named."""
    names = []
    watch = {"guard_filter_fn": lambda guards: [names.append(f"{g.guard_type} {g.name}") or True for g in guards]}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(freeze(make()), backend="eager", options=watch)(x)
    return names


@pytest.mark.skipif(not eligibility._ONE_GUARD, reason="before torch 2.13 a graph guards every value of the geometry")
def test_a_graph_guards_no_more_than_it_did():
    """Each guard is compared at each call: together a sixth of the time of a compiled frozen 26w4s block of 4x4 pixels."""
    # But for those of modules' hooks, which are 50, and from torch 2.14 on twice as many.
    names = [name for name in guards_of_a_frozen_block(sample(2, 7, 9)) if "hooks" not in name]
    assert 50 < len(names) <= 490, len(names)  # with those that no part was given a forward of its own
    assert not any("_NAMES[" in name for name in names)
    of_the_package = [name for name in names if "__import_res2net_fused" in name]
    assert len(of_the_package) <= 138, len(of_the_package)


def test_frozen_block_folds_nothing_in_the_graph():
    graphs, backend = counting()
    with torch.no_grad():
        compiled(freeze(make()), backend)(sample(2, 7, 9))
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert not any("rsqrt" in target for target in targets)


@pytest.mark.parametrize("where", ["freeze", "call"])
def test_frozen_block_under_autocast(where):
    """What freeze made is in the graph as it is; what it did not is rounded there, from what was frozen."""
    block, x = make().float(), sample(2, 7, 9).float()
    graphs, backend = counting()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "freeze"):
            freeze(block)
        block.conv1.weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(block, backend)(x)
            assert torch.equal(out, block(x))
    nodes = graphs[0].graph.nodes
    assert not any("rsqrt" in str(node.target) for node in nodes)
    rounded = sum(torch.bfloat16 in node.args for node in nodes)
    assert rounded == 1 + (where == "call") * (len(block.convs) + 2)  # x, and the weights


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_transforms_inside_a_graph(frozen):
    own = make("stage").float()
    block, own = (freeze(copy.deepcopy(own)) if frozen else copy.deepcopy(own)), own.double()
    x = sample(2, 7, 9).float()
    function = torch.compile(lambda x: torch.func.vmap(block)(x), backend="eager")
    with torch.no_grad():
        assert_close(function(torch.stack((x, 2 * x)))[1], own_forward(own, 2 * x.double()), 5e-6)
        assert_close(torch.compile(block, backend="eager")(x), own_forward(own, x.double()), 5e-6)


def test_block_through_inductor():
    block = make().float().to(memory_format=torch.channels_last)
    x = sample(2, 7, 9).float().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        function = compiled(block, "inductor")
        for frozen in (False, True):
            if frozen:
                freeze(block)
            for _ in range(2):  # a kept tensor that the graph overwrote would show in the second call
                out = function(x)
                assert_close(out, own_forward(copy.deepcopy(block).double(), x.double()), 5e-6)
                out.fill_(float("nan"))


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@blocks
def test_export_of_the_block(stype, frozen):
    block = make(stype)
    if frozen:
        freeze(block)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    with torch.no_grad():
        program = torch.export.export(block, (sample(2, 7, 9),), dynamic_shapes={"x": dims})
        for size in SIZES:
            x = sample(*size)
            assert_close(program.module()(x), own_forward(block, x), 1e-12)


def test_autocast_block():
    block = make().float()
    x = sample(2, 7, 9).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = compiled(block)(x)
        assert out.dtype == torch.bfloat16
        assert_close(out, own_forward(copy.deepcopy(block).double(), x.double()), 1.5e-2)
