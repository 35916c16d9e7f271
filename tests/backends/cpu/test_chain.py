"""The native CPU kernels: every instruction set and arithmetic against float64, sizes, scratch memory, threads, Inf and NaN."""

import functools

import pytest
import torch
from cpu_kernel_cases import ARITHMETICS, INSTRUCTION_SETS, each_kernel
from helpers import BOUNDS, CHAINS, Chain, assert_close, chains, relative_error, run_together
from memory_layouts import SAME_VALUES, in_layout

from res2net_fused import hierarchical_conv2d, pack_weights
from res2net_fused._native import library
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.backends.selection import choose
from res2net_fused.chain import reference
from res2net_fused.chain.activations import ACTIVATIONS
from res2net_fused.chain.problem import ChainProblem

STATUS = library.cpu_library()
pytestmark = [
    pytest.mark.skipif(not STATUS.loaded, reason=STATUS.reason),
    pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch"),
]
# (w, s, H = W) of the four stages of Res2Net-50 26w4s, 14w8s and 48w2s
PRODUCTION = [(width << stage, scale, 56 >> stage) for width, scale in ((26, 4), (14, 8), (48, 2)) for stage in range(4)]


def call(chain, x, weights, biases):
    return hierarchical_conv2d(x, weights, biases, backend="cpu", **chain.settings)


def in_float64(chain, x, weights, biases):
    biases = None if biases is None else [b.double() for b in biases]
    return reference.hierarchical_conv2d(x.double(), [w.double() for w in weights], biases, chain.config)


def check(chain, shape, dtype=torch.float32, bias=True, arithmetics=ARITHMETICS):
    """Every kernel against float64, for channels-last x of (N, H, W) = `shape`."""
    x, weights, biases = chain.tensors(shape, dtype, bias=bias)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = in_float64(chain, x, weights, biases)
    for kernel in each_kernel(arithmetics):
        error = relative_error(call(chain, x, weights, biases), expected)
        assert error <= BOUNDS[dtype], f"{kernel}, {shape}: relative error {error:.3g}"


# Against float64 ------------------------------------------------------------------------------------------------------


@chains
def test_every_feature(chain):
    for shape in ((2, 7, 9), (1, 5, 6), (3, 12, 4)):
        check(chain, shape)


@chains
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(chain, dtype):
    assert dtype in BOUNDS
    check(chain, (2, 7, 9), dtype)


@pytest.mark.parametrize("width", [*range(1, 36), 40, 47, 52, 56, 63, 64, 65, 104, 112, 120])
def test_widths(width):
    """Every number of full and half panels, and every tail of a vector in the last slot of a pixel."""
    for passthrough in ("last", "none", "first"):
        check(Chain({"passthrough": passthrough}, steps=2, width=width), (1, 5, 7))


@pytest.mark.parametrize("groups,width", [(1, 24), (2, 24), (3, 39), (4, 72), (8, 8), (5, 85)])
def test_groups(groups, width):
    check(Chain({"groups": groups}, steps=2, width=width), (2, 6, 5))


@pytest.mark.parametrize("height", range(1, 18))
def test_sizes(height):
    """Every cut of a side into tiles of 4, 3 and 2."""
    for width in (1, 2, 3, 5, 8, 11, 14, 57 - 3 * height):
        check(Chain(steps=2, width=9), (1, height, width))


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
@pytest.mark.parametrize("width,size", [(10, 7), (104, 7), (16, 14), (200, 4), (24, 33)])
def test_batches_and_threads(batch, width, size, threads):
    """Images, tiles, rows and channels shared out, with remainders."""
    for passthrough in ("last", "first_added"):
        check(Chain({"passthrough": passthrough}, steps=3, width=width), (batch, size, size))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("width,scale,size", PRODUCTION)
def test_production_shapes(width, scale, size, batch):
    check(Chain(steps=scale - 1, width=width), (batch, size, size), arithmetics=["auto"] if batch > 1 else ARITHMETICS)


def test_first_blocks_of_stages():
    for width, scale, size in PRODUCTION[4:8]:
        check(Chain({"hierarchical": False, "pool": "avg3", "stride": 2}, steps=scale - 1, width=width), (1, size, size))


def test_without_biases():
    check(Chain(width=20), (2, 9, 8), bias=False)


def test_empty_batch():
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors((0, 7, 9), torch.float32)
    assert call(chain, x, weights, biases).shape == x.shape


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 10, 16, 26])
@pytest.mark.parametrize("passthrough", ["last", "none"])
def test_layouts(width, passthrough):
    chain = Chain({"passthrough": passthrough}, steps=2, width=width)
    x, weights, biases = chain.tensors((2, 9, 16), torch.float32)
    expected = in_float64(chain, x, weights, biases)
    for name in SAME_VALUES:
        same = in_layout(x, name)
        before = same.clone()
        wanted = torch.channels_last if same.stride(1) == 1 else torch.contiguous_format
        for kernel in each_kernel():
            out = call(chain, same, weights, biases)
            assert relative_error(out, expected) <= BOUNDS[torch.float32], (name, kernel)
            assert out.is_contiguous(memory_format=wanted), (name, kernel)
            assert torch.equal(before, same), (name, kernel)


def test_expanded_batch():
    chain = Chain(width=12)
    x, weights, biases = chain.tensors((1, 6, 7), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last).expand(3, -1, -1, -1)
    expected = in_float64(chain, x, weights, biases)
    for _ in each_kernel():
        assert_close(call(chain, x, weights, biases), expected)


def test_arguments_stay_as_they_are():
    chain = Chain(width=13)
    x, weights, biases = chain.tensors((2, 9, 8), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    tensors = [x, *weights, *biases]
    before = [t.clone() for t in tensors]
    for _ in each_kernel():
        call(chain, x, weights, biases)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_packed_weights_serve_every_instruction_set():
    chain = Chain(width=29)
    x, weights, biases = chain.tensors((2, 9, 8), torch.float32)
    packs = [pack_weights(weights, biases, backend="cpu") for _ in each_kernel(["auto"])]
    expected = in_float64(chain, x, weights, biases)
    for _ in each_kernel():
        for packed in packs:
            assert_close(hierarchical_conv2d(x, packed, backend="cpu"), expected)


# Inf and NaN ----------------------------------------------------------------------------------------------------------


def same_kind(out, expected):
    """Finite, NaN and Inf at the same places; the finite values alike."""
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert_close(out[finite], expected[finite])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width,size", [(9, 13), (26, 14), (40, 7), (104, 7)])
def test_not_finite_inputs_stay_where_a_convolution_takes_them(value, width, size):
    for passthrough in ("last", "none", "first_added"):
        chain = Chain({"passthrough": passthrough, "activation": "none"}, steps=2, width=width)
        x, weights, biases = chain.tensors((2, size, size), torch.float32)
        x[0, 3, 0, 0] = value
        x[0, width + 1, size - 1, 4] = value
        x[1, x.shape[1] - 1, 5, 5] = value
        x = x.contiguous(memory_format=torch.channels_last)
        expected = in_float64(chain, x, weights, biases)
        assert not expected.isfinite().all() and expected.isfinite().float().mean() > 0.1
        for _ in each_kernel():
            same_kind(call(chain, x, weights, biases), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan(activation):
    chain = Chain({"activation": activation}, steps=2, width=17)
    x, weights, biases = chain.tensors((1, 8, 8), torch.float32)
    x[0, 2, 3, 3] = torch.nan
    expected = in_float64(chain, x, weights, biases)
    for _ in each_kernel():
        same_kind(call(chain, x, weights, biases), expected)


@pytest.mark.parametrize("width", [8, 26, 100])
def test_large_inputs_overflow_no_earlier_than_a_convolution(width):
    """Winograd's sums of inputs overflow at these values, a convolution's products do not."""
    chain = Chain(steps=2, width=width)
    x, weights, _ = chain.tensors((2, 11, 9), torch.float32)
    x = x.clamp(-1, 1) * 2.5e38
    weights = [w * 1e-3 for w in weights]
    expected = in_float64(chain, x, weights, None)
    assert expected.abs().max() < torch.finfo(torch.float32).max
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in each_kernel():
        out = call(chain, x, weights, None)
        assert out.isfinite().all()
        assert_close(out / 1e30, expected / 1e30)


def test_not_finite_weights_reach_every_output_of_their_channel():
    chain = Chain({"activation": "none"}, steps=1, width=20)
    x, weights, biases = chain.tensors((1, 9, 9), torch.float32)
    weights[0][4, 3, 1, 1] = torch.inf
    others = [c for c in range(20) if c != 4]
    expected = in_float64(chain, x, weights, biases)[:, others]
    for _ in each_kernel():
        out = call(chain, x, weights, biases)
        assert not out[:, 4].isfinite().any()
        assert_close(out[:, others], expected)


# Threads and scratch memory -------------------------------------------------------------------------------------------


def test_concurrent_calls_of_changing_shapes():
    cases = [(Chain(steps=2, width=w), (b, h, h)) for w, b, h in ((9, 2, 13), (26, 1, 28), (104, 1, 7), (5, 3, 6))]
    prepared = []
    for chain, shape in cases:
        tensors = chain.tensors(shape, torch.float32)
        prepared.append((chain, tensors, in_float64(chain, *tensors)))

    def work(offset):
        for i in range(24):
            chain, tensors, expected = prepared[(i + offset) % len(prepared)]
            assert_close(call(chain, *tensors), expected)

    run_together(*(functools.partial(work, i) for i in range(4)))


def test_the_result_does_not_depend_on_what_scratch_held(monkeypatch):
    chain = Chain(width=21)
    x, weights, biases = chain.tensors((3, 14, 10), torch.float32)
    poisoned = call(chain, x, weights, biases)
    monkeypatch.setenv("RES2NET_FUSED_CPU_POISON", "0")
    check(Chain(width=33), (2, 20, 9))  # leaves other values in the same blocks
    assert torch.equal(call(chain, x, weights, biases), poisoned)


def test_scratch_is_bounded_and_can_be_freed():
    held = torch.ops.res2net_fused_native.cpu_scratch_bytes
    assert held(True) == 0
    check(Chain(width=16, steps=2), (1, 64, 64))
    assert 0 < held(False) <= 128 << 20
    # 1.2 KB of scratch a pixel: this call needs more than the cache may keep
    x = torch.zeros(1, 64, 512, 600).contiguous(memory_format=torch.channels_last)
    weights = [torch.zeros(16, 16, 3, 3) for _ in range(3)]
    for _ in range(2):
        assert hierarchical_conv2d(x, weights, backend="cpu").eq(0).all()
        assert held(False) <= 128 << 20
    assert held(True) == 0


# Choices and errors ---------------------------------------------------------------------------------------------------


def plan_of(chain, batch=1, size=14):
    problem = ChainProblem(chain.config, torch.device("cpu"), torch.float32, batch, size, size, chain.width, chain.steps, True)
    return cpu_backend.chain.plan(problem)


def test_plans_name_what_runs(monkeypatch):
    assert "Winograd" in plan_of(Chain(width=26)) and INSTRUCTION_SETS[-1] in plan_of(Chain(width=26))
    for chain in (CHAINS["stage_stride2"], CHAINS["dilated"], CHAINS["groups"]):
        assert "direct convolution" in plan_of(chain)
    assert "direct convolution" in plan_of(Chain(width=26), size=1)
    monkeypatch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, "direct")
    assert "direct convolution" in plan_of(Chain(width=26))


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_plans_count_barriers(threads):
    """The program of the kernels counts the calls of a thread pool; here is what `explain` shows of it."""
    assert plan_of(Chain(width=26, steps=3), size=56).endswith("tiles over 2 threads, 3 barriers in its chain")
    assert plan_of(Chain(width=104, steps=3)).endswith("channels over 2 threads, 3 barriers in its chain")
    assert plan_of(CHAINS["stage_stride2"], size=56).endswith("rows over 2 threads, 1 barrier in its chain")
    assert plan_of(Chain(width=26, steps=3), batch=2).endswith("images over 2 threads")


def test_arithmetics_differ():
    """Otherwise the variable would not be read, and the tests above would run one arithmetic twice."""
    chain = Chain(width=26)
    x, weights, biases = chain.tensors((1, 14, 14), torch.float32)
    outputs = {}
    for name in ARITHMETICS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, name)
            outputs[name] = call(chain, x, weights, biases)
    assert not torch.equal(outputs["direct"], outputs["winograd"])


@pytest.mark.parametrize("size,same", [(9, "direct"), (24, "winograd")])
def test_plain_weights_are_packed_for_what_pays(size, same, monkeypatch):
    """Few pixels: transforming the weights for one call would take longer than convolving directly."""
    chain = Chain(width=26)
    x, weights, biases = chain.tensors((1, size, size), torch.float32)
    out = call(chain, x, weights, biases)
    monkeypatch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, same)
    assert torch.equal(out, call(chain, x, weights, biases))


@pytest.mark.parametrize("variable", [cpu_backend.settings.ARITHMETIC_VARIABLE, cpu_backend.settings.ISA_VARIABLE])
def test_bad_environment_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "fastest")
    chain = CHAINS["last"]
    with pytest.raises(ValueError, match=f"{variable}='fastest': allowed are 'auto'"):
        call(chain, *chain.tensors(dtype=torch.float32))


def test_missing_instruction_set_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_backend.settings, "INSTRUCTION_SETS", cpu_backend.settings.INSTRUCTION_SETS | {"neon": 77})
    monkeypatch.setenv(cpu_backend.settings.ISA_VARIABLE, "neon")
    chain = CHAINS["last"]
    with pytest.raises(RuntimeError, match="'neon': this machine has no neon kernels; it has 'portable'"):
        call(chain, *chain.tensors(dtype=torch.float32))


def test_float64_is_left_to_the_reference():
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors()
    with pytest.raises(RuntimeError, match="torch.float64; allowed are torch.float32"):
        call(chain, x, weights, biases)
    out = hierarchical_conv2d(x, weights, biases)
    assert_close(out, in_float64(chain, x, weights, biases))


def test_auto_takes_the_native_kernels():
    problem = ChainProblem(CHAINS["last"].config, torch.device("cpu"), torch.float32, 1, 7, 9, 4, 3, True)
    assert choose(problem).name == "cpu"


def test_operator_refuses_buffers_that_do_not_fit():
    chain = Chain(width=12)
    x, weights, biases = chain.tensors(dtype=torch.float32)
    packed = cpu_backend.chain.pack(weights, biases, chain.config)
    settings = (chain.width, chain.steps, 1, 1, 1, True, 0, 0, 0, 0.0, True, 0, -1)
    forward = torch.ops.res2net_fused_native.cpu_chain_forward
    assert_close(forward(x, *packed, *settings), in_float64(chain, x, weights, biases))
    for i, name in enumerate(("winograd", "direct", "bias")):
        short = list(packed)
        short[i] = short[i][:-1]
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            forward(x, *short, *settings)
    with pytest.raises(RuntimeError, match="channels, which do not fit"):
        forward(x[:, :-1], *packed, *settings)
