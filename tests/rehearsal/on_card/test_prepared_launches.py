"""Prepared launches of Triton's kernels: a later call launches what `JITFunction.run` would, whatever happened in between."""

import gc
import os
import weakref
from dataclasses import replace

import card
import pytest
import torch
from card.triton_driver import LAUNCHES
from chain1d_cases import arguments
from helpers import Chain, assert_close, randomize, run_together
from on_card import capture

pytest.importorskip("triton")

from triton import knobs
from triton.runtime.jit import JITFunction

from res2net_fused import Bottle2neck, freeze, hierarchical_conv1d, hierarchical_conv2d
from res2net_fused.backends import overlap
from res2net_fused.backends.triton import BACKEND, prepared, step_plan, tiles
from res2net_fused.backends.triton.kernels.conv3x3_fwd import conv3x3_fwd
from res2net_fused.testing.parity import convolution_precision

INTERPRETED = card.Settings.of(os.environ["STAND_IN_CARD"]).launch == "interpreter"
HALF = torch.float16


@pytest.fixture(autouse=True)
def nothing_prepared():
    prepared._kind.cache_clear()
    yield
    prepared._kind.cache_clear()


def channels_last(*shape, dtype=HALF, device="cuda"):
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)


def block(dtype=HALF, device="cuda", **options):
    """A frozen block on Triton, and an x for it."""
    built = Bottle2neck(64, 16, **{"baseWidth": 26, "scale": 4, "backend": "triton", **options})
    return freeze(randomize(built).to(device, dtype).eval()), channels_last(2, 64, 5, 6, dtype=dtype, device=device)


def observed(monkeypatch, work):
    """The launches of `work()`, the tensors that they were given, and the buffers that were allocated for them."""
    given, buffers, own, empty = [], [], prepared.launch, torch.empty

    def launch(calls, settings, tensors):
        def allocate(*size, **options):
            buffers.append(empty(*size, **options))
            return buffers[-1]

        given.extend(tensors)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k) if k.get("device") == "meta" else allocate(*a, **k))
            own(calls, settings, tensors)

    with monkeypatch.context() as patch, LAUNCHES.recorded() as launches:
        patch.setattr(prepared, "launch", launch)
        work()
    return launches, [t for t in given if t is not None], [t for t in buffers if t.is_cuda]


def place(pointer, tensors, buffers):
    """Which tensor, or which buffer, a pointer lies in, and how far behind its first element."""
    for kind, among in (("given", tensors), ("buffer", buffers)):
        for which, t in enumerate(among):
            size = t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize
            if t.data_ptr() <= pointer < t.data_ptr() + size:
                return kind, which, pointer - t.data_ptr()
    raise AssertionError(f"{pointer:#x} lies nowhere")


def assert_same(expected, found):
    """Kernels, grids, constants and arguments of two calls; each buffer of the first is a part of the second's only one."""
    (launches, tensors, buffers), (others, other_tensors, other_buffers) = expected, found
    assert len(other_buffers) == bool(buffers) and len(launches) == len(others) > 0
    shifts = {}
    for one, other in zip(launches, others, strict=True):
        assert replace(one, arguments=(), aligned=()) == replace(other, arguments=(), aligned=())
        assert len(one.arguments) == len(other.arguments) and len(one.aligned) == len(other.aligned)
        assert all(pointer % 16 == 0 for pointer in other.aligned)
        for a, b in zip(one.arguments, other.arguments, strict=True):
            if not isinstance(a, int) or a < 2**32:  # no address
                assert (type(a), a) == (type(b), b)
                continue
            kind, which, offset = place(a, tensors, buffers)
            own_kind, own, own_offset = place(b, other_tensors, other_buffers)
            assert kind == own_kind and (a - b) % 16 == 0
            if kind == "given":
                assert (which, offset) == (own, own_offset)
            else:
                assert shifts.setdefault(which, own_offset - offset) == own_offset - offset
    ends = sorted((shift, shift + buffers[which].nbytes) for which, shift in shifts.items())
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))
    assert not ends or ends[-1][1] <= other_buffers[0].nbytes


SETTINGS = {
    "plain": {}, "groups": {"groups": 2}, "dilation": {"dilation": 3}, "none": {"passthrough": "none"},
    "first_added": {"passthrough": "first_added", "pool": "avg3"}, "activation": {"activation": "leaky_relu:0.1"},
    "stage": {"hierarchical": False, "stride": 2, "pool": "avg3"}, "nopad": {"pool": "avg3_nopad"},
}  # fmt: skip
LAYOUTS = {
    "channels_last": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "cropped": lambda x: torch.cat([x, x], 3).contiguous(memory_format=torch.channels_last)[..., 1:-3, 2:-1],
    "of more channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] // 2 :][
        :, : x.shape[1]
    ],
    "misaligned": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 1 : x.shape[1] + 1],
    "one image for all": lambda x: x[:1].expand(3, -1, -1, -1),
    "far images": lambda x: torch.empty_strided((2, *x.shape[1:]), (2**31 + 64, *x.stride()[1:]), dtype=x.dtype, device="cuda"),
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_a_chain_launches_the_same_again(settings, dtype, monkeypatch):
    x, weights, biases = Chain(SETTINGS[settings], width=26).tensors((3, 6, 7), dtype, "cuda")
    check(monkeypatch, lambda y: hierarchical_conv2d(y, weights, biases, **SETTINGS[settings], backend="triton"), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_launch_the_same_again(layout, monkeypatch):
    x, weights, biases = Chain({}, width=26).tensors((2, 6, 7), HALF, "cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(type(BACKEND), "forward", staticmethod(BACKEND.forward.__wrapped__))  # no answers from far memory
    monkeypatch.delitem(vars(BACKEND), "forward")
    check(monkeypatch, lambda y: hierarchical_conv2d(y, weights, biases, backend="triton"), LAYOUTS[layout](x))


@pytest.mark.parametrize(
    "options",
    [{}, {"baseWidth": 14, "scale": 8}, {"stride": 2, "stype": "stage"}, {"cardinality": 2}, {"dilation": 2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@torch.no_grad()
def test_a_block_launches_the_same_again(options, dtype, monkeypatch):
    if "stride" in options:
        options = options | {"downsample": torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1, 2), torch.nn.BatchNorm2d(64))}
    model, x = block(dtype, **options)
    check(monkeypatch, model, x)


@torch.no_grad()
def test_the_1x1_convolutions_of_the_cuda_backend_are_prepared(monkeypatch):
    model, x = block(backend="cuda", baseWidth=104)
    expected, compiled = constants(lambda: model(x)), LAUNCHES.compiled
    assert [name for name, *_ in expected] == ["pointwise"] * 2
    monkeypatch.setattr(JITFunction, "__getitem__", lambda *a: pytest.fail("not prepared"))
    assert constants(lambda: model(x)) == expected and LAUNCHES.compiled == compiled


def test_chunks_of_a_batch_launch_the_same_again(monkeypatch):
    monkeypatch.setattr(step_plan, "CHUNK_BYTES", 20_000)
    x, weights, biases = Chain({}, width=26).tensors((5, 6, 7), HALF, "cuda")
    launches = check(monkeypatch, lambda y: hierarchical_conv2d(y, weights, biases, backend="triton"), x)
    assert len(launches) > 3


@pytest.mark.parametrize("name", ["speechbrain", "espnet", "none"])
def test_rows_launch_the_same_again(name, monkeypatch):
    settings, (x, *lists) = arguments(name, dtype=torch.float32)
    on_card = [None if values is None else [v.cuda() for v in values] for values in lists]
    weights, biases, scale, shift = on_card
    check(
        monkeypatch,
        lambda y: hierarchical_conv1d(y, weights, biases, scale, shift, **settings, backend="triton"),
        x.cuda(),
    )


def check(monkeypatch, run, x):
    """The second call and one of another x as the first; returns its launches."""
    first = observed(monkeypatch, lambda: run(x))
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", lambda *a: pytest.fail("not prepared"))
        second = observed(monkeypatch, lambda: run(x))
        other = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if x.data_ptr() % 16 == other.data_ptr() % 16:
            assert_same(first, observed(monkeypatch, lambda: run(other)))
    assert_same(first, second)
    return first[0]


# What may change between two calls


def constants(run):
    with LAUNCHES.recorded() as launches:
        run()
    return [(launch.kernel, launch.grid, launch.constants, launch.warps, launch.stages) for launch in launches]


def fresh(run):
    """What a process that prepared nothing launches."""
    prepared._kind.cache_clear()
    return constants(run)


@torch.no_grad()
def test_precision_is_looked_at_at_each_call(monkeypatch):
    model, x = block(torch.float32)
    seen = {}
    for setting in ("tf32", "float32", "tf32", "float32"):
        with convolution_precision(setting, "cuda"):
            found = constants(lambda: model(x))
        assert seen.setdefault(setting, found) == found
    assert seen["tf32"] != seen["float32"]
    with convolution_precision("tf32", "cuda"):
        assert fresh(lambda: model(x)) == seen["tf32"]
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        assert constants(lambda: model(x)) == seen["float32"]


@torch.no_grad()
def test_deterministic_algorithms_fill_what_is_prepared(monkeypatch):
    model, x = block()
    plain = observed(monkeypatch, lambda: model(x))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found = observed(monkeypatch, lambda: model(x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(plain, found)
    assert found[2][0].isnan().all()


@pytest.mark.parametrize("second", ["misaligned", "rows apart"])
def test_layouts_are_told_apart(second, monkeypatch):
    x, weights, biases = Chain({}, width=26).tensors((2, 6, 7), HALF, "cuda")
    whole = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)
    views = [whole[:, :104], whole[:, 1:105] if second == "misaligned" else torch.cat([whole, whole], 3)[:, :104, :, :7]]

    def seen(view):
        launches, tensors, buffers = observed(monkeypatch, lambda: hierarchical_conv2d(view, weights, biases, backend="triton"))
        assert all(pointer % 16 == 0 for launch in launches for pointer in launch.aligned)
        sizes = [[a for a in launch.arguments if not isinstance(a, int) or a < 2**32] for launch in launches]
        return sizes, [len(launch.aligned) for launch in launches]

    expected = [seen(view) for view in views]
    assert [seen(view) for view in views] == expected and expected[0] != expected[1]


@torch.no_grad()
def test_a_new_table_of_tiles_is_used(user_table):
    x, weights, biases = Chain({}, width=26).tensors((2, 6, 7), HALF, "cuda")

    def run():
        return hierarchical_conv2d(x, weights, biases, backend="triton")

    before = [constants(run) for _ in range(2)]
    assert before[0] == before[1]
    tile = tiles.Tile(16, 16, 16, 2, 5)
    shape = tiles.Shape("step", torch.cuda.get_device_capability(), "half", 26, 26, 2 * 6 * 7)
    tiles.write(user_table, [tiles.Row(shape, tile)])
    assert [(warps, stages) for *_, warps, stages in constants(run)] == [(2, 5)] * 3
    user_table.unlink()
    tiles.forget()
    assert constants(run) == before[0]


@pytest.mark.parametrize("clear", [lambda caches: caches.clear(), lambda caches: caches[0][0].clear()], ids=["all", "kernels"])
@torch.no_grad()
def test_kernels_that_triton_dropped_are_compiled_again(clear):
    model, x = block()
    expected = constants(lambda: model(x))
    for _ in range(2):
        compiled = LAUNCHES.compiled
        assert constants(lambda: model(x)) == expected and LAUNCHES.compiled == compiled
        clear(conv3x3_fwd.device_caches)
        assert constants(lambda: model(x)) == expected and LAUNCHES.compiled > compiled


@torch.no_grad()
def test_hooks_are_called_at_every_launch(monkeypatch):
    model, x = block()
    model(x)
    called = []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(called.append)
        try:
            launches = constants(lambda: model(x))
        finally:
            chain.remove(called.append)
        assert len(called) == len(launches) == 5
        called.clear()
    monkeypatch.setattr(conv3x3_fwd, "pre_run_hooks", [lambda *a, **k: called.append(k["CHANNELS"])])
    model(x)
    assert called == [6] * 3
    monkeypatch.setattr(conv3x3_fwd, "pre_run_hooks", [])
    model(x)
    own = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (called.append(self), own(self, *a, **k))[1])
    model(x)
    assert len(called) == 3 + 5


@torch.no_grad()
def test_debugging_compiles_as_triton_does(monkeypatch):
    model, x = block()
    model(x)
    compiled = LAUNCHES.compiled
    monkeypatch.setattr(knobs.runtime, "debug", True)
    model(x)
    assert LAUNCHES.compiled > compiled


@torch.no_grad()
def test_devices_and_streams_are_those_of_the_call():
    models = [block(device=f"cuda:{i}") for i in range(2)]
    side = torch.cuda.Stream(1)
    for _ in range(2):
        for i, (model, x) in enumerate(models):
            with LAUNCHES.recorded() as launches:
                model(x)
            assert {(launch.card, launch.stream) for launch in launches} == {(i, 0)}
    with torch.cuda.stream(side), LAUNCHES.recorded() as launches:
        models[1][0](models[1][1])
    assert {(launch.card, launch.stream) for launch in launches} == {(1, side.cuda_stream)} and len(launches) == 5
    assert torch.cuda.current_device() == 0


@torch.no_grad()
@pytest.mark.parametrize("setting", ["on", "off"])
def test_launches_overlap_unless_they_are_told_not_to(setting, monkeypatch):
    monkeypatch.setenv(overlap.VARIABLE, setting)
    overlap.allowed.cache_clear()
    model, x = block()
    for run in (lambda: model(x), lambda: model(x), lambda: capture(lambda: model(x))):  # the first one prepares
        with LAUNCHES.recorded() as launches:
            run()
        expected = setting == "on" and torch.cuda.get_device_capability() >= (9, 0)
        assert [(launch.overlaps, launch.constants["OVERLAPS"]) for launch in launches] == [(expected, expected)] * 5
    overlap.allowed.cache_clear()


@torch.no_grad()
def test_a_capture_holds_the_launches():
    model, x = block()
    model(x)
    with LAUNCHES.recorded() as launches:
        graph, _ = capture(lambda: model(x))
    assert len(launches) == 5 and {launch.stream for launch in launches} != {0}
    graph.replay()


@torch.no_grad()
def test_a_launch_that_cannot_be_made_is_explained():
    from triton.runtime.errors import OutOfResources

    model, x = block()
    model(x)

    def fail(stage):
        raise OutOfResources(300_000, 232_448, "shared memory")

    LAUNCHES.hook = fail
    try:
        with pytest.raises(RuntimeError, match="does not fit this GPU.*delete the table of tiles"):
            model(x)
    finally:
        LAUNCHES.hook = lambda stage: None
    model(x)


@torch.no_grad()
def test_threads_launch_their_own_tensors():
    model, x = block()
    model(x)
    own = [channels_last(2, 64, 5, 6) for _ in range(4)]

    def work(y):
        with torch.no_grad():
            return [model(y) for _ in range(20)]

    with LAUNCHES.recorded() as launches:
        run_together(*[lambda y=y: work(y) for y in own])
    read = [launch.arguments[0] for launch in launches if launch.kernel == "pointwise"]
    assert len(launches) == 4 * 20 * 5 and all(read.count(y.data_ptr()) == 20 for y in own)


@torch.no_grad()
def test_what_is_kept_is_bounded_and_holds_no_tensor():
    x, weights, biases = Chain({}, width=26).tensors((2, 6, 7), HALF, "cuda")
    for _ in range(2):
        hierarchical_conv2d(x, weights, biases, backend="triton")
    assert prepared._kind.cache_info()[:2] == (1, 1)
    gone = [weakref.ref(t) for t in (x, weights[0], biases[0])]
    storage = torch.cuda.memory_allocated()
    del x, weights, biases
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3 and torch.cuda.memory_allocated() < storage
    for i in range(2000):
        prepared._kind(i)
    assert prepared._kind.cache_info().currsize == prepared._kind.cache_info().maxsize < 1000


def test_what_is_not_known_runs_as_triton_does(monkeypatch):
    model, x = block()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(prepared, "_KNOWN", False)
        expected = constants(lambda: model(x))
    assert prepared._kind.cache_info().currsize == 0
    monkeypatch.setattr(conv3x3_fwd, "used_global_vals", {("NAME", 0): (1, {"NAME": 1})})  # which `run` compares
    with torch.no_grad():
        assert [constants(lambda: model(x)) for _ in range(2)] == [expected] * 2
        monkeypatch.setattr(conv3x3_fwd, "used_global_vals", {("NAME", 0): (1, {"NAME": 2})})
        with pytest.raises(RuntimeError, match="Global variable NAME has changed"):
            model(x)


@pytest.mark.skipif(not INTERPRETED, reason="numbers are the kernels' own where the interpreter runs them")
@torch.no_grad()
def test_numbers_of_prepared_launches():
    model, x = block(torch.float32, baseWidth=12)
    twin = Bottle2neck(64, 16, baseWidth=12, scale=4, backend="reference").double().eval()
    twin.load_state_dict({name: value.cpu().double() for name, value in model.state_dict().items()})
    x = x[:1, :, :3, :3].contiguous(memory_format=torch.channels_last)
    model(x)
    graph, static = capture(lambda: model(x))
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    expected = twin(x.cpu().double())
    assert_close(model(x).cpu(), expected, 2e-3)
    graph.replay()
    assert_close(static.cpu(), expected, 2e-3)
