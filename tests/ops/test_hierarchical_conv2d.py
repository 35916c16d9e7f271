"""`hierarchical_conv2d`, forward: every backend against the float64 reference, layouts, registration and bad input."""

import copy

import numpy
import pytest
import torch
from helpers import (
    BOUNDS,
    CHAINS,
    DEVICES,
    HALVES,
    NAMED_BACKENDS,
    Chain,
    assert_close,
    chains,
    relative_error,
    runnable_backends,
    why_not,
)
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from res2net_fused import hierarchical_conv2d, pack_weights
from res2net_fused.chain import reference

OPERATOR = torch.ops.res2net_fused.hierarchical_conv2d.default
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
formats = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS.keys())
devices = pytest.mark.parametrize("device", DEVICES)
backends = pytest.mark.parametrize("backend", [*NAMED_BACKENDS, "auto"])


def call(chain, x, weights, biases, backend="auto"):
    return hierarchical_conv2d(x, weights, biases, backend=backend, **chain.settings)


def float64_reference(chain, x, weights, biases):
    biases = None if biases is None else [b.double() for b in biases]
    return reference.hierarchical_conv2d(x.double(), [w.double() for w in weights], biases, chain.config)


def run_or_refuse(chain, x, weights, biases, backend):
    """The output, or None after checking that a backend that cannot run this call raises and says why."""
    reason = None if backend == "auto" else why_not(backend, chain, x)
    if reason is None:
        return call(chain, x, weights, biases, backend)
    with pytest.raises(RuntimeError) as caught:
        call(chain, x, weights, biases, backend)
    assert reason in str(caught.value) and backend in str(caught.value)
    return None


# Against float64 ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("backend", NAMED_BACKENDS)
@devices
@chains
def test_against_float64(chain, device, backend, dtype):
    for layout in FORMATS.values():
        x, weights, biases = chain.tensors((2, 7, 9), dtype, device)
        x = x.contiguous(memory_format=layout)
        out = run_or_refuse(chain, x, weights, biases, backend)
        if out is None:
            continue
        assert out.dtype == dtype and out.device == x.device
        expected = float64_reference(chain, x, weights, biases)
        assert_close(out, expected)
        if dtype in HALVES:
            eager = relative_error(reference.hierarchical_conv2d(x, weights, biases, chain.config), expected)
            assert relative_error(out, expected) <= 2 * eager


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 8), (2, 8, 1), (1, 2, 2), (2, 13, 17), (1, 31, 5)], ids=str)
@pytest.mark.parametrize("name", ["last", "first_added", "stage_stride2", "stage_stride2_nopad", "dilated3_groups"])
@backends
@devices
def test_odd_sizes(name, device, backend, shape):
    chain = CHAINS[name]
    for layout in FORMATS.values():
        x, weights, biases = chain.tensors(shape, torch.float32, device)
        x = x.contiguous(memory_format=layout)
        out = run_or_refuse(chain, x, weights, biases, backend)
        if out is not None:
            assert_close(out, float64_reference(chain, x, weights, biases))


VIEWS = {
    "channel_slice": lambda wide, c: wide[:, 3 : 3 + c],
    "channel_slice_nhwc": lambda wide, c: wide.contiguous(memory_format=torch.channels_last)[:, 3 : 3 + c],
    "expanded_batch": lambda wide, c: wide[:1, :c].expand(3, -1, -1, -1),
    "expanded_pixels": lambda wide, c: wide[:, :c, :1, :1].expand(-1, -1, 6, 8),
    "expanded_channels": lambda wide, c: wide[:, :1].expand(-1, c, -1, -1),
    "cropped": lambda wide, c: wide[:, :c, 1:-1, 2:],
    "every_second_column": lambda wide, c: wide[:, :c, :, ::2],
    "transposed": lambda wide, c: wide[:, :c].transpose(2, 3),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("name", ["last", "stage_stride2", "first"])
@backends
@devices
def test_views_of_wider_tensors(name, device, backend, view):
    chain = CHAINS[name]
    _, weights, biases = chain.tensors(dtype=torch.float32, device=device)
    wide = torch.randn(3, chain.channels + 5, 8, 9, device=device)
    x = view(wide, chain.channels)
    before = wide.clone()
    out = run_or_refuse(chain, x, weights, biases, backend)
    assert torch.equal(wide, before)
    if out is not None:
        assert_close(out, float64_reference(chain, x, weights, biases))


@backends
@devices
def test_weights_of_any_layout(device, backend):
    chain = CHAINS["groups"]
    x, weights, biases = chain.tensors(dtype=torch.float32, device=device)
    odd = [torch.stack([w, w], -1)[..., 0] for w in weights]  # every stride doubled
    odd[1] = weights[1].contiguous(memory_format=torch.channels_last)
    odd_biases = [torch.stack([b, b], -1)[..., 0] for b in biases]
    out = run_or_refuse(chain, x, odd, odd_biases, backend)
    if out is not None:
        assert_close(out, float64_reference(chain, x, weights, biases))


@backends
@devices
def test_half_x_beside_fp32_biases(device, backend):
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors(dtype=torch.float16, device=device)
    biases = [b.float() * 1.0001 for b in biases]
    out = run_or_refuse(chain, x, weights, biases, backend)
    if out is not None:
        assert out.dtype == torch.float16
        assert_close(out, float64_reference(chain, x, weights, biases))


@formats
@pytest.mark.parametrize("name", ["last", "stage_stride2", "none"])
@devices
def test_empty_batch(name, device, layout):
    chain = CHAINS[name]
    _, weights, biases = chain.tensors(dtype=torch.float32, device=device)
    x = torch.empty(0, chain.channels, 7, 9, device=device).contiguous(memory_format=layout).requires_grad_()
    for weight in weights:
        weight.requires_grad_()
    out = call(chain, x, weights, biases)
    rows, columns = chain.config.output_size(7), chain.config.output_size(9)
    assert out.shape == (0, chain.channels, rows, columns)
    out.sum().backward()
    assert x.grad.shape == x.shape and all((w.grad == 0).all() for w in weights)


@pytest.mark.parametrize("backend", [b for b in NAMED_BACKENDS if b != "reference"])
@devices
def test_empty_batch_does_not_hide_that_a_backend_cannot_run(device, backend):
    chain = CHAINS["last"]
    _, weights, biases = chain.tensors(dtype=torch.float32, device=device)
    out = run_or_refuse(chain, torch.empty(0, chain.channels, 7, 9, device=device), weights, biases, backend)
    assert out is None or out.shape == (0, chain.channels, 7, 9)


@backends
@devices
def test_nothing_of_the_callers_changes(device, backend):
    chain = CHAINS["last"]
    tensors = chain.tensors(dtype=torch.float32, device=device)
    before = copy.deepcopy(tensors)
    versions = [t._version for t in (tensors[0], *tensors[1], *tensors[2])]
    out = run_or_refuse(chain, *tensors, backend)
    x, weights, biases = tensors
    assert versions == [t._version for t in (x, *weights, *biases)]
    for now, then in zip((x, *weights, *biases), (before[0], *before[1], *before[2]), strict=True):
        assert torch.equal(now, then)
    if out is not None:
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["last", "stage_stride2", "s1"])
@devices
def test_repeated_calls_give_the_same_bits(name, device):
    chain = CHAINS[name]
    for backend in runnable_backends(device):
        x, weights, biases = chain.tensors((2, 14, 14), torch.float32, device)
        first = call(chain, x, weights, biases, backend)
        for _ in range(3):
            assert torch.equal(first, call(chain, x, weights, biases, backend))


def test_forward_mode_is_refused_by_the_operator_rather_than_zero():
    """torch.library operators have no forward-mode rule, and without a check their tangents come out as zero."""
    x, weights, biases = CHAINS["last"].tensors()
    settings = CHAINS["last"].config.as_kwargs().values()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.ops.res2net_fused.hierarchical_conv2d(dual, weights, biases, None, "plain", *settings, "auto")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@devices
def test_nan_and_inf_stay_in_reach_of_their_taps(value, device):
    """One bad pixel reaches, per convolution, its 3x3 neighbours and nothing farther."""
    chain = Chain(steps=2, width=4)
    for backend in runnable_backends(device):
        x, weights, biases = chain.tensors((1, 9, 9), torch.float32, device)
        clean = call(chain, x, weights, biases, backend)
        x[0, 0, 4, 4] = value
        out = call(chain, x, weights, biases, backend)
        far = torch.ones(9, 9, dtype=torch.bool, device=device)
        far[2:7, 2:7] = False
        assert torch.equal(out[..., far], clean[..., far])
        assert not out[:, :4, 3:6, 3:6].isfinite().all()


# Memory format and fake -----------------------------------------------------------------------------------------------


def formats_agree(x, weights, **settings):
    out = hierarchical_conv2d(x, weights, **settings)
    mode = FakeTensorMode()
    with mode:
        fake = hierarchical_conv2d(mode.from_tensor(x), [mode.from_tensor(w) for w in weights], **settings)
    assert suggest_memory_format(out) == suggest_memory_format(x)
    assert fake.shape == out.shape and fake.dtype == out.dtype
    assert fake.stride() == out.stride()


@formats
@pytest.mark.parametrize("shape", [(2, 7, 9), (1, 7, 9), (2, 1, 5), (2, 5, 1), (2, 1, 1), (1, 1, 1), (0, 7, 9)], ids=str)
@pytest.mark.parametrize("name", ["last", "stage_stride2", "width1", "s1"])
@devices
def test_output_keeps_the_memory_format_and_the_fake_agrees(name, device, shape, layout):
    chain = CHAINS[name]
    _, weights, _ = chain.tensors(dtype=torch.float32, device=device)
    x = torch.randn(shape[0], chain.channels, *shape[1:], device=device)
    x = torch.empty_like(x, memory_format=layout).copy_(x)
    formats_agree(x, weights, **chain.settings)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@devices
def test_memory_format_for_views(device, view):
    chain = CHAINS["last"]
    _, weights, _ = chain.tensors(dtype=torch.float32, device=device)
    formats_agree(view(torch.randn(3, chain.channels + 5, 8, 9, device=device), chain.channels), weights)


# Registration ---------------------------------------------------------------------------------------------------------


def operator_arguments(chain, x, weights, biases, backend="auto"):
    return x, weights, biases, None, "plain", *chain.config.as_kwargs().values(), backend


OPCHECKED = ["last", "first_added", "none", "stage_stride2", "dilated3_groups", "hardtanh", "s1"]


@pytest.mark.parametrize("name", OPCHECKED)
@devices
def test_opcheck(name, device):
    chain = CHAINS[name]
    x, weights, biases = chain.tensors((2, 5, 6), torch.float32, device)
    layout = list(FORMATS.values())[OPCHECKED.index(name) % 2]
    x = x.contiguous(memory_format=layout).requires_grad_()
    for tensor in (*weights, *biases):
        tensor.requires_grad_()
    torch.library.opcheck(OPERATOR, operator_arguments(chain, x, weights, biases))


@devices
def test_opcheck_without_gradients_biases_and_with_a_pack(device):
    chain = CHAINS["last"]
    x, weights, _ = chain.tensors((2, 5, 6), torch.float32, device)
    torch.library.opcheck(OPERATOR, operator_arguments(chain, x, weights, None))
    for backend in runnable_backends(device):
        pack = pack_weights(weights, backend=backend)
        arguments = (x, pack.weights, pack.biases, pack.packed, pack.layout, *chain.config.as_kwargs().values(), backend)
        torch.library.opcheck(OPERATOR, arguments)


@pytest.mark.parametrize("needed", [[True, True, True], [True, False, False], [False, True, False], [False, False, True]])
@pytest.mark.parametrize("name", ["stage_stride2"])
def test_opcheck_of_the_backward_operator(name, needed):
    chain = CHAINS[name]
    x, weights, biases = chain.tensors((2, 5, 6), torch.float32)
    out = call(chain, x, weights, biases)
    settings = chain.config.as_kwargs().values()
    backward = torch.ops.res2net_fused.hierarchical_conv2d_backward.default
    torch.library.opcheck(backward, (torch.randn_like(out), x, out, weights, biases, *settings, "auto", needed))


def test_flop_counter():
    chain = CHAINS["stage_stride2"]  # three convolutions of width 4
    x, weights, biases = chain.tensors((2, 7, 9), torch.float32)
    one_direction = 2 * (2 * 4 * 5) * (9 * 4 * 4) * 3
    with FlopCounterMode(display=False) as counter:
        call(chain, x, weights, biases)
    assert counter.get_total_flops() == one_direction
    x.requires_grad_()
    for weight in weights:
        weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        call(chain, x, weights, biases).sum().backward()
    assert counter.get_total_flops() == 3 * one_direction


def test_flop_counter_divides_by_groups():
    chain = CHAINS["depthwise"]
    x, weights, biases = chain.tensors((2, 7, 9), torch.float32)
    with FlopCounterMode(display=False) as counter:
        call(chain, x, weights, biases)
    assert counter.get_total_flops() == 2 * (2 * 7 * 9) * (9 * 4) * 3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@devices
def test_autocast_casts_x_and_weights_only(device, dtype):
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("autocast to fp16 on the CPU is checked by bfloat16")
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors(dtype=torch.float32, device=device)
    tensors = [x, *weights, *biases]
    for tensor in tensors:
        tensor.requires_grad_()
    with torch.autocast(device, dtype):
        out = call(chain, x, weights, biases)
    assert out.dtype == dtype
    by_hand = call(chain, x.to(dtype), [w.to(dtype) for w in weights], biases)  # biases stay fp32
    assert torch.equal(out, by_hand)
    gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    assert [g.dtype for g in gradients] == [torch.float32] * len(tensors)
    for got, expected in zip(gradients, torch.autograd.grad(by_hand.float().square().sum(), tensors), strict=True):
        assert torch.equal(got, expected)


def test_autocast_takes_an_x_that_is_half_already():
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(chain, x.bfloat16(), weights, biases), call(chain, x, weights, biases))


def test_autocast_leaves_float64_alone():
    chain = CHAINS["last"]
    tensors = chain.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(chain, *tensors), float64_reference(chain, *tensors))


def test_autocast_drops_a_pack_of_another_dtype():
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors(dtype=torch.float32)
    pack = pack_weights(weights, biases)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hierarchical_conv2d(x, pack), call(chain, x, weights, biases))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current():
    chain = CHAINS["last"]
    for backend in runnable_backends("cuda"):
        x, weights, biases = chain.tensors(dtype=torch.float32, device="cuda:1")
        with torch.cuda.device(0):
            assert_close(call(chain, x, weights, biases, backend), float64_reference(chain, x, weights, biases))


# Bad input ------------------------------------------------------------------------------------------------------------

X, WEIGHTS, BIASES = Chain().tensors(dtype=torch.float32)  # (2, 4*4, 7, 9), three of (4, 4, 3, 3)


def replaced(values, index, value):
    return [value if i == index else v for i, v in enumerate(values)]


BAD = {
    # what the message must name: the argument, what was given, what is allowed
    "x_rank3": (dict(x=X[0]), ValueError, ["x is", "(16, 7, 9)", "(N, s*w, H, W)"]),
    "x_rank5": (dict(x=X[None]), ValueError, ["x is", "(1, 2, 16, 7, 9)", "(N, s*w, H, W)"]),
    "x_array": (dict(x=numpy.zeros((2, 16, 7, 9))), TypeError, ["x is", "ndarray", "Tensor"]),
    "x_integer": (dict(x=X.int()), TypeError, ["x is", "torch.int32", "torch.float32"]),
    "x_complex": (dict(x=X.to(torch.complex64)), TypeError, ["x is", "torch.complex64", "torch.float32"]),
    "x_bool": (dict(x=X > 0), TypeError, ["x is", "torch.bool", "torch.float32"]),
    "channels": (dict(x=X[:, :15]), ValueError, ["x has 15 channels", "4*4 = 16"]),
    "channels_of_another_scale": (dict(passthrough="none"), ValueError, ["x has 16 channels", "3*4 = 12"]),
    "no_rows": (dict(x=X[:, :, :0]), ValueError, ["x is", "(2, 16, 0, 9)", "at least 1"]),
    "weights_empty": (dict(weights=[]), ValueError, ["weights is empty", "(w, w/groups, 3, 3)"]),
    "weights_tensor": (dict(weights=WEIGHTS[0]), TypeError, ["weights is", "(4, 4, 3, 3)", "list"]),
    "weights_none": (dict(weights=None), TypeError, ["weights is", "NoneType", "list"]),
    "weight_not_a_tensor": (dict(weights=replaced(WEIGHTS, 1, 3.0)), TypeError, ["weights[1]", "float", "Tensor"]),
    "weight_1x1": (dict(weights=[w[..., :1, :1] for w in WEIGHTS]), ValueError, ["weights[0]", "1, 1", "3, 3"]),
    "weight_not_square": (dict(weights=[w[:3] for w in WEIGHTS]), ValueError, ["weights[0]", "(3, 4, 3, 3)", "w/groups"]),
    "weight_groups": (dict(groups=2), ValueError, ["weights[0]", "groups=2", "w/groups"]),
    "groups_do_not_divide": (dict(groups=3), ValueError, ["weights[0]", "groups=3", "w/groups"]),
    "weights_differ": (
        dict(weights=replaced(WEIGHTS, 2, torch.randn(5, 5, 3, 3))),
        ValueError,
        ["weights[2]", "(5, 5, 3, 3)", "(4, 4, 3, 3)"],
    ),
    "weights_dtypes_differ": (
        dict(weights=replaced(WEIGHTS, 1, WEIGHTS[1].half())),
        (ValueError, TypeError),
        ["weights[1]", "torch.float16", "torch.float32"],
    ),
    "weights_integer": (dict(weights=[w.int() for w in WEIGHTS]), TypeError, ["weights[0]", "torch.int32", "torch.float32"]),
    "weights_dtype": (
        dict(weights=[w.double() for w in WEIGHTS]),
        TypeError,
        ["x is torch.float32", "weights[0]", "torch.float64"],
    ),
    "half_x": (dict(x=X.half()), TypeError, ["x is torch.float16", "torch.float32"]),
    "mixed_devices": (dict(x=X.to("meta")), ValueError, ["x is on meta", "cpu"]),
    "mixed_weight_devices": (dict(weights=replaced(WEIGHTS, 1, WEIGHTS[1].to("meta"))), ValueError, ["weights[1]", "meta"]),
    "biases_count": (dict(biases=BIASES[:2]), ValueError, ["biases", "2", "3"]),
    "biases_tensor": (dict(biases=BIASES[0]), TypeError, ["biases is", "(4,)", "list"]),
    "bias_shape": (dict(biases=replaced(BIASES, 1, BIASES[1][:3])), ValueError, ["biases[1]", "(3,)", "(4,)"]),
    "bias_dtype": (dict(biases=[b.half() for b in BIASES]), TypeError, ["biases[0]", "torch.float16", "torch.float32"]),
    "bias_none": (dict(biases=replaced(BIASES, 2, None)), TypeError, ["biases[2]", "NoneType", "Tensor"]),
    "stride_0": (dict(stride=0), ValueError, ["stride is 0", "at least 1"]),
    "stride_negative": (dict(stride=-1), ValueError, ["stride is -1", "at least 1"]),
    "dilation_0": (dict(dilation=0), ValueError, ["dilation is 0", "at least 1"]),
    "groups_0": (dict(groups=0), ValueError, ["groups is 0", "at least 1"]),
    "stride_fraction": (dict(stride=1.5), TypeError, ["stride is 1.5", "int"]),
    "stride_pair": (dict(stride=(2, 2)), TypeError, ["stride is (2, 2)", "int"]),
    "passthrough": (dict(passthrough="middle"), ValueError, ["passthrough is 'middle'", "'last'", "'first_added'"]),
    "passthrough_none": (dict(passthrough=None), (ValueError, TypeError), ["passthrough is None", "'last'"]),
    "pool": (dict(pool="max"), ValueError, ["pool is 'max'", "'avg3'", "None"]),
    "activation": (dict(activation="swish"), ValueError, ["activation is 'swish'", "'relu'", "'hardtanh20'", "'silu'"]),
    "slope": (dict(activation="leaky_relu:steep"), ValueError, ["activation is 'leaky_relu:steep'", "'leaky_relu:0.1'"]),
    "slope_nan": (dict(activation="leaky_relu:nan"), ValueError, ["activation is 'leaky_relu:nan'", "finite"]),
    "slope_of_relu": (dict(activation="relu:0.1"), ValueError, ["activation is 'relu:0.1'"]),
    "activation_type": (dict(activation=torch.relu), ValueError, ["activation is <built-in", "'relu'"]),
    "backend": (dict(backend="cudnn"), ValueError, ["backend", "'cudnn'", "'reference'", "'triton'"]),
    "backend_none": (dict(backend=None), (ValueError, TypeError), ["backend", "None", "'reference'"]),
    "pool_without_passthrough": (
        dict(x=X[:, :12], passthrough="none", pool="avg3"),
        ValueError,
        ["pool is 'avg3'", "passthrough is 'none'"],
    ),
    "stride_with_adds": (dict(stride=2, pool="avg3"), ValueError, ["stride is 2", "hierarchical=False"]),
    "stride_without_pool": (dict(stride=2, hierarchical=False), ValueError, ["stride is 2", "pool", "'avg3'"]),
    "nothing_to_add": (
        dict(hierarchical=False, passthrough="first_added"),
        ValueError,
        ["passthrough is 'first_added'", "hierarchical"],
    ),
}


@pytest.mark.parametrize(("given", "error", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input(given, error, said):
    arguments = {"x": X, "weights": WEIGHTS, "biases": BIASES} | given
    with pytest.raises(error) as caught:
        hierarchical_conv2d(**arguments)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["x_rank3", "channels", "x_integer", "weights_differ", "stride_with_adds", "pool"])
def test_bad_input_while_tracing(name):
    """The fake raises as the kernel does."""
    given, error, said = BAD[name]
    arguments = {"x": X, "weights": WEIGHTS, "biases": BIASES} | given
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, pytest.raises(error) as caught:
        arguments["x"] = mode.from_tensor(arguments["x"])
        hierarchical_conv2d(**arguments)
    assert all(words in str(caught.value) for words in said)
