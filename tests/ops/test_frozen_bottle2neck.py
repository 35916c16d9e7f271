"""The operator that graphs of frozen blocks call, whose weights lie in one tensor."""

import copy

import pytest
import torch
from helpers import assert_close, randomize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from res2net_fused import accelerate, freeze, refresh
from res2net_fused._native import library
from res2net_fused._native.library import release
from res2net_fused.chain.gathered_weights import read_layout, weights_in
from res2net_fused.chain.tolerances import FORWARD
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

pytestmark = pytest.mark.skipif(not library.cpu_library().loaded, reason="needs the CPU library")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OPERATOR = torch.ops.res2net_fused.frozen_bottle2neck.default
WHOLE = torch.ops.res2net_fused.bottle2neck.default


def shortcut(*before, stride=1):
    return nn.Sequential(*before, nn.Conv2d(24, 32, 1, stride, bias=False), nn.BatchNorm2d(32))


BLOCKS = {
    "plain": lambda: ReferenceBottle2neck(32, 8, baseWidth=26),
    "one convolution": lambda: ReferenceBottle2neck(32, 8, baseWidth=26, scale=2),
    "eight groups": lambda: ReferenceBottle2neck(32, 8, baseWidth=14, scale=8),
    "projected": lambda: ReferenceBottle2neck(24, 8, stype="stage", downsample=shortcut()),
    "strided": lambda: ReferenceBottle2neck(24, 8, 2, shortcut(stride=2), stype="stage"),
    "pooled": lambda: ReferenceBottle2neck(24, 8, 2, shortcut(nn.AvgPool2d(2, 2, ceil_mode=True)), stype="stage"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def make(name, dtype=torch.float32, backend="cpu"):
    """A frozen block and its own forward in float64."""
    own = randomize(BLOCKS[name]()).to(dtype).eval()
    return freeze(accelerate(copy.deepcopy(own), backend=backend)), own.double()


def image(name, size, dtype=torch.float32, layout="nhwc"):
    channels = BLOCKS[name]().conv1.in_channels
    batch, *pixels = size
    return torch.randn(batch, channels, *pixels).to(dtype).contiguous(memory_format=FORMATS[layout])


def kept(block, dtype=torch.float32):
    return block._res2net_fused.frozen.weights(dtype, torch.device("cpu"))


def arguments(block, x, backend="cpu"):
    """Of a call in which x is the shortcut, or what is projected."""
    gathered = kept(block, x.dtype).gathered
    strided = x[:, :, ::2, ::2] if block.convs[0].stride == (2, 2) and not gathered.projects else x
    return x, strided, gathered.memory, gathered.layout, True, *block._res2net_fused.config.as_kwargs().values(), backend


def whole(block, x, backend="cpu"):
    """The same by `bottle2neck`."""
    f = kept(block, x.dtype)
    _, added, _, _, relu, *settings = arguments(block, x, backend)
    return WHOLE(
        x, added, f.conv1_weight, f.conv1_bias, f.weights, f.biases, f.conv3_weight, f.conv3_bias, f.projection_weight,
        f.projection_bias, f.projection_stride, f.packed, f.layout, relu, *settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_frozen_weights_lie_in_one_tensor_that_holds_no_more(name):
    block, _ = make(name)
    plain = accelerate(copy.deepcopy(block), backend="cpu")
    x = image(name, (2, 7, 5))
    for _ in range(3):
        plain(x)
    found, cached = kept(block), plain._res2net_fused.kept[1]
    memory, layout = found.gathered.memory, found.gathered.layout
    total, first = 0, memory.data_ptr()
    for ours, other in zip(tensors(found), tensors(cached), strict=True):
        assert torch.equal(ours, other) and ours.dtype == other.dtype
        assert ours.numel() == 0 or first < ours.data_ptr() <= first + memory.numel() - ours.nbytes
        assert ours.data_ptr() % 64 == 0 or ours.numel() == 0
        total += ours.nbytes
    assert block._res2net_fused.frozen.original.conv1_weight.data_ptr() == found.conv1_weight.data_ptr()  # not twice
    assert total <= memory.numel() <= total + 64 * (len(tensors(found)) + 5)
    assert [tuple(t.shape) for t in tensors(weights_in(memory, layout))] == [p.size for p in read_layout(layout).places]


def tensors(f):
    outer = [f.conv1_weight, f.conv1_bias, *f.weights, *f.biases, f.conv3_weight, f.conv3_bias]
    return [t for t in (*outer, f.projection_weight, f.projection_bias, *f.packed) if t is not None]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "pooled"])  # whose pool is not the operator's
@torch.no_grad()
def test_against_float64_and_bit_for_bit_as_the_other_operator(name, dtype, layout):
    block, own = make(name, dtype)
    for size in [(2, 7, 5), (1, 1, 1), (3, 1, 6), (0, 4, 4)]:
        x = image(name, size, dtype, layout)
        out = OPERATOR(*arguments(block, x))
        assert torch.equal(out, whole(block, x)) and out.stride() == whole(block, x).stride()
        if x.numel():
            assert_close(out.double(), own(x.double()), FORWARD[str(dtype).removeprefix("torch.")].limit)


@pytest.mark.parametrize(
    "name", ["plain", "strided", *(pytest.param(n, marks=pytest.mark.slow) for n in ("projected", "pooled"))]
)
@torch.no_grad()
def test_a_graph_has_one_input_beside_x(name):
    block, own = make(name, backend="auto")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(block, fullgraph=True, backend=backend)
    for size in [(2, 7, 9), (3, 12, 5), (4, 30, 31)]:
        x = image(name, size)
        for dimension in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, dimension)
        assert_close(function(x), own(x.double()), 5e-6)
    assert len(graphs) == 1
    refresh(block)
    block.conv1.weight.mul_(2)
    before = function(x)
    freeze(block)
    assert_close(function(x), before, 5e-6)
    own.conv1.weight.mul_(2)
    assert_close(before, own(x.double()), 5e-6)
    nodes = graphs[0].graph.nodes
    given = [node for node in nodes if node.op == "placeholder" and isinstance(node.meta["example_value"], torch.Tensor)]
    targets = {node.target for node in nodes}
    takes_itself_for_an_export = release(torch.__version__) < (2, 13) and WHOLE in targets
    assert takes_itself_for_an_export or (len(given) == 2 and OPERATOR in targets)


@torch.no_grad()
def test_the_backend_is_chosen_when_the_graph_runs(monkeypatch):
    block, own = make("projected", backend="auto")
    function = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = image("projected", (2, 7, 9))
    native = function(x)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "reference")
    assert torch.equal(function(x), whole(block, x, "auto")) and not torch.equal(function(x), native)
    assert_close(function(x), own(x.double()), 5e-6)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="RES2NET_FUSED_BACKEND=triton cannot run"):
        function(x)


@torch.no_grad()
def test_an_exported_program_keeps_the_operator_that_anybody_can_read():
    block, own = make("strided", backend="auto")
    x = image("strided", (2, 8, 6))
    program = torch.export.export(block, (x,))
    targets = {node.target for node in program.graph.nodes}
    assert WHOLE in targets and OPERATOR not in targets
    constants = [c for c in program.constants.values() if isinstance(c, torch.Tensor)]
    # AOTInductor writes each constant's storage: of weights that shared one, a package would hold all of them that often.
    assert len(constants) > 8 and all(c.untyped_storage().nbytes() == c.nbytes for c in constants)
    assert_close(program.module()(x), own(x.double()), 5e-6)


@torch.no_grad()
def test_memory_may_begin_anywhere_in_its_storage():
    block, _ = make("projected", backend="auto")
    x = image("projected", (2, 8, 6))
    for backend in ("cpu", "reference"):
        x, added, memory, *rest = arguments(block, x, backend)
        elsewhere = torch.cat([torch.full((192,), 255, dtype=torch.uint8), memory])[192:]
        assert torch.equal(OPERATOR(x, added, elsewhere, *rest), OPERATOR(x, added, memory, *rest))


@torch.no_grad()
def test_a_default_device_does_not_matter():
    own = randomize(BLOCKS["plain"]()).eval()
    with torch.device("meta"):
        block = freeze(accelerate(copy.deepcopy(own)))
    x = image("plain", (2, 8, 6))
    assert kept(block).gathered is not None
    assert_close(block(x), own.double()(x.double()), 5e-6)


def words(memory):
    return memory[: 8 * 22].view(torch.int64)


DAMAGES = {
    "version": (0, 2),
    "bytes": (1, 64),
    "a piece before the first": (6, -64),
    "a piece behind the end": (12, 1 << 40),
    "a piece between floats": (6, 257),
    "a longer piece": (20, 1 << 40),
    "a negative piece": (20, -4),
    "more channels": (2, 4096),
    "no convolutions": (3, 0),
    "more convolutions": (3, 9),
    "no channels out": (4, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
@torch.no_grad()
def test_memory_that_is_no_blocks_is_refused(damage):
    block, _ = make("plain")
    x, added, memory, *rest = arguments(block, image("plain", (1, 6, 6)))
    assert OPERATOR(x, added, memory, *rest).isfinite().all()
    memory = memory.clone()
    place, value = DAMAGES[damage]
    words(memory)[place] = value
    with pytest.raises(RuntimeError, match="memory|must be|no chain"):
        OPERATOR(x, added, memory, *rest)


@torch.no_grad()
def test_memory_that_is_cut_is_refused():
    block, _ = make("plain")
    x, added, memory, *rest = arguments(block, image("plain", (1, 6, 6)))
    for cut in (memory[:-64], memory[:100].clone(), memory[:0], memory.view(torch.float32), memory[::2]):
        with pytest.raises((RuntimeError, ValueError)):
            OPERATOR(x, added, cut, *rest)


def test_transforms_gradients_and_counts():
    block, own = make("plain")
    x = image("plain", (2, 6, 5))
    call = lambda x: OPERATOR(*arguments(block, x))  # noqa: E731
    stacked = torch.stack((x, 2 * x))
    with torch.no_grad():
        assert_close(torch.func.vmap(call)(stacked)[1], call(2 * x), 5e-6)
    gradient = torch.func.grad(lambda x: call(x).square().sum())(x)
    doubled = x.double().requires_grad_()
    assert_close(gradient, torch.autograd.grad(own(doubled).square().sum(), doubled)[0], 5e-5)
    with pytest.raises(NotImplementedError, match="for inference"):
        call(x.requires_grad_()).sum().backward()
    counted = []
    for operator in (call, lambda x: whole(block, x)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            operator(x.detach())
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("name", ["plain", "projected"])
def test_opcheck(name):
    block, _ = make(name)
    with torch.no_grad():
        torch.library.opcheck(OPERATOR, arguments(block, image(name, (2, 7, 5))))
