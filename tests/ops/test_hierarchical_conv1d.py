"""`hierarchical_conv1d`: both backends against the float64 reference, forward and gradients, registration, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from chain1d_cases import CHAINS, arguments, leaves, to_float64
from helpers import BOUNDS, assert_close, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from res2net_fused import hierarchical_conv1d
from res2net_fused.backends import choices, policy
from res2net_fused.backends.cpu import chain1d
from res2net_fused.chain import reference
from res2net_fused.chain.activations import ACTIVATIONS
from res2net_fused.chain.config import Chain1dConfig

OPERATOR = torch.ops.res2net_fused.hierarchical_conv1d.default
BACKWARD = torch.ops.res2net_fused.hierarchical_conv1d_backward.default
chains = pytest.mark.parametrize("name", CHAINS)
# The number of rows up to which the cpu backend multiplies tap by tap: always, and never.
arrangements = pytest.mark.parametrize("rows", [10**9, 0], ids=["products", "convolutions"])


@pytest.fixture(autouse=True)
def nothing_decided():
    """Native bodies ask again how many rows are multiplied."""
    choices.forget_native()
    yield
    choices.forget_native()


PYTORCHS = {
    "relu": F.relu,
    "none": lambda z: z,
    "hardtanh20": lambda z: z.clamp(0, 20),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu:0.3": lambda z: F.leaky_relu(z, 0.3),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "mish": F.mish,
}


def by_hand(x, weights, biases, scales, shifts, passthrough="last", padding_mode="zeros", dilation=1, activation="relu"):
    """Equation by equation, value by value: an index beyond an end is nothing, or is mirrored at the last value."""
    w, length, reach = weights[0].shape[0], x.shape[2], weights[0].shape[2] // 2
    groups = list(x.split(w, 1))
    passed = {"first": 0, "first_added": 0, "last": len(groups) - 1, "none": None}[passthrough]
    outputs = []
    for i, group in enumerate(groups):
        if i == passed:
            outputs.append(group)
            continue
        k = i - (passed == 0)
        u = group + outputs[-1] if k > 0 or (passthrough == "first_added" and i == 1) else group
        z = biases[k][None, :, None].repeat(x.shape[0], 1, length)
        for at in range(length):
            for tap in range(-reach, reach + 1):
                source = at + tap * dilation
                if padding_mode == "reflect":
                    source = -source if source < 0 else source
                    source = 2 * (length - 1) - source if source >= length else source
                if 0 <= source < length:
                    z[:, :, at] += u[:, :, source] @ weights[k][:, :, tap + reach].T
        outputs.append(scales[k][:, None] * PYTORCHS[activation](z) + shifts[k][:, None])
    return torch.cat(outputs, 1)


# Forward ----------------------------------------------------------------------------------------------------------------


@chains
def test_the_reference_is_the_recurrence(name):
    settings, tensors = arguments(name)
    ours = reference.hierarchical_conv1d(*tensors, Chain1dConfig(**settings))
    assert_close(ours, by_hand(*tensors, **settings), 1e-13)


@pytest.mark.usefixtures("poisoned_memory")
@arrangements
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
@chains
def test_against_float64(name, backend, dtype, rows, monkeypatch):
    monkeypatch.setattr(policy, "ROWS_FOR_PRODUCTS", rows)
    for shape in ((2, 13), (1, 9), (3, 32)):
        for extras in (True, False):
            settings, tensors = arguments(name, shape, dtype, extras)
            out = hierarchical_conv1d(*tensors, **settings, backend=backend)
            expected = reference.hierarchical_conv1d(*to_float64(tensors), Chain1dConfig(**settings))
            assert out.dtype == dtype and out.is_contiguous()
            if dtype in (torch.float16, torch.bfloat16):
                eager = relative_error(reference.hierarchical_conv1d(*tensors, Chain1dConfig(**settings)), expected)
                assert relative_error(out, expected) <= 2 * eager
            else:
                assert_close(out, expected)


@pytest.mark.usefixtures("poisoned_memory")
@arrangements
@pytest.mark.parametrize("kind", ["channels_last", "slice", "stride0", "every_other"])
def test_layouts(kind, rows, monkeypatch):
    monkeypatch.setattr(policy, "ROWS_FOR_PRODUCTS", rows)
    settings, (x, *others) = arguments("speechbrain")
    batch, channels, length = x.shape
    if kind == "channels_last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "slice":
        wide = torch.randn(batch, channels + 5, length + 3, dtype=x.dtype)
        x = wide[:, 2 : 2 + channels, 1 : 1 + length]
    elif kind == "stride0":
        x = x[:1].expand(batch, channels, length)
    else:
        x = torch.randn(batch, channels, 2 * length, dtype=x.dtype)[:, :, ::2]
    expected = reference.hierarchical_conv1d(x, *others, Chain1dConfig(**settings))
    before = x.clone()
    assert_close(hierarchical_conv1d(x, *others, **settings), expected, 1e-13)
    assert torch.equal(x, before), "x is only read"


def test_an_empty_batch():
    settings, tensors = arguments("espnet", (0, 13))
    assert hierarchical_conv1d(*tensors, **settings).shape == tensors[0].shape


@arrangements
def test_nan_stays_where_it_belongs(rows, monkeypatch):
    """A NaN reaches every value whose window holds it, and nothing else: no other image, no other end."""
    monkeypatch.setattr(policy, "ROWS_FOR_PRODUCTS", rows)
    settings, (x, *others) = arguments("speechbrain", (3, 60))
    x[1, 4:8, 0] = torch.nan  # the first convolved group
    expected = reference.hierarchical_conv1d(x, *others, Chain1dConfig(**settings)).isnan()
    out = hierarchical_conv1d(x, *others, **settings).isnan()
    assert torch.equal(out, expected) and expected[1].any() and not expected[0].any() and not expected[2].any()


def test_fp32_biases_beside_half_weights():
    settings, tensors = arguments("speechbrain", dtype=torch.bfloat16)
    wide = [*tensors[:2], *([v.float() for v in values] for values in tensors[2:])]
    expected = reference.hierarchical_conv1d(*to_float64(tensors), Chain1dConfig(**settings))
    for backend in ("reference", "cpu"):
        assert_close(hierarchical_conv1d(*wide, **settings, backend=backend), expected, BOUNDS[torch.bfloat16])


# Gradients --------------------------------------------------------------------------------------------------------------


@arrangements
@pytest.mark.parametrize("kind", ["dense", "stride0", "slice", "channels_last"])
@chains
def test_gradients(name, kind, rows, monkeypatch):
    monkeypatch.setattr(policy, "ROWS_FOR_PRODUCTS", rows)
    settings, tensors = arguments(name)
    parameters = leaves(tensors)
    for tensor in parameters:
        tensor.requires_grad_()
    x = tensors[0]
    gradient = {
        "dense": lambda: torch.randn_like(x),
        "stride0": lambda: torch.tensor(1.5, dtype=x.dtype).expand(x.shape),
        "slice": lambda: torch.randn(x.shape[0], x.shape[1] + 3, x.shape[2], dtype=x.dtype)[:, 2:-1],
        "channels_last": lambda: torch.randn(x.shape[0], x.shape[2], x.shape[1], dtype=x.dtype).transpose(1, 2),
    }[kind]().detach()
    ours = torch.autograd.grad(hierarchical_conv1d(*tensors, **settings), parameters, gradient)
    expected = torch.autograd.grad(reference.hierarchical_conv1d(*tensors, Chain1dConfig(**settings)), parameters, gradient)
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b, 1e-12)


@arrangements
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "leaky_relu:0.3", "leaky_relu:-0.5"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_activation(activation, backend, rows, monkeypatch):
    """Forward, gradients and, as a gradient penalty needs them, second derivatives, in float64 and float32."""
    monkeypatch.setattr(policy, "ROWS_FOR_PRODUCTS", rows)
    for name in ("speechbrain_dilated", "espnet"):
        settings, tensors = arguments(name, extras=name == "espnet")
        settings, config = {**settings, "activation": activation}, Chain1dConfig(**settings, activation=activation)
        tensors[0] *= 12  # beyond the bounds of what clamps
        narrow = [t if t is None else t.float() if isinstance(t, torch.Tensor) else [v.float() for v in t] for t in tensors]
        assert_close(hierarchical_conv1d(*narrow, **settings, backend=backend), reference.hierarchical_conv1d(*tensors, config))
        parameters = [t.requires_grad_() for t in leaves(tensors)]
        results = []
        for out in (
            hierarchical_conv1d(*tensors, **settings, backend=backend),
            reference.hierarchical_conv1d(*tensors, config),
        ):
            first = torch.autograd.grad(out.square().sum(), parameters, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
            results.append([out, *first, *second])
        for ours, expected in zip(*results, strict=True):
            assert_close(ours, expected, 1e-12)


def test_a_scale_of_zero_loses_no_gradient():
    settings, tensors = arguments("espnet")
    tensors[3][2].zero_()
    parameters = [t.requires_grad_() for t in leaves(tensors)]
    ours = torch.autograd.grad(hierarchical_conv1d(*tensors, **settings).square().sum(), parameters)
    out = reference.hierarchical_conv1d(*tensors, Chain1dConfig(**settings))
    for a, b in zip(ours, torch.autograd.grad(out.square().sum(), parameters), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("which", range(5), ids=["x", "weights", "biases", "affine_scale", "affine_shift"])
def test_only_what_is_asked_for(which):
    settings, tensors = arguments("speechbrain")
    wanted = leaves([tensors[which]])
    for tensor in wanted:
        tensor.requires_grad_()
    ours = torch.autograd.grad(hierarchical_conv1d(*tensors, **settings).sin().sum(), wanted)
    out = reference.hierarchical_conv1d(*tensors, Chain1dConfig(**settings))
    for a, b in zip(ours, torch.autograd.grad(out.sin().sum(), wanted), strict=True):
        assert_close(a, b, 1e-12)


def test_gradcheck():
    settings, tensors = arguments("speechbrain_dilated", (1, 7))
    flat = [t.requires_grad_() for t in leaves(tensors)]

    def call(x, *rest):
        return hierarchical_conv1d(x, *(rest[i : i + 3] for i in range(0, 12, 3)), **settings)

    assert torch.autograd.gradcheck(call, flat)


# Registration -----------------------------------------------------------------------------------------------------------


def operator_arguments(name, extras=True, keep=True, packed=None):
    settings, tensors = arguments(name, extras=extras)
    for tensor in leaves(tensors):
        tensor.requires_grad_(keep)
    *chain, activation = Chain1dConfig(**settings).as_kwargs().values()
    return *tensors, packed, *chain, keep, "auto", activation


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["speechbrain_dilated", "espnet"])
def test_opcheck(name, keep, extras):
    torch.library.opcheck(OPERATOR, operator_arguments(name, extras, keep))


def test_opcheck_of_packed_weights():
    given = operator_arguments("espnet", keep=False)
    packed = chain1d.pack_1d(given[1])
    assert torch.equal(OPERATOR(*given[:5], packed, *given[6:])[0], OPERATOR(*given)[0])
    torch.library.opcheck(OPERATOR, (*given[:5], packed, *given[6:]))


@pytest.mark.parametrize("needed", [[True] * 5, [False, True, False, True, False], [True, False, True, False, True]], ids=str)
def test_opcheck_of_the_backward_operator(needed):
    x, weights, biases, scale, shift, _, *settings, _, _, _ = operator_arguments("speechbrain_dilated", keep=False)
    for activation in ("relu", "gelu"):
        out, *kept = OPERATOR(x, weights, biases, scale, shift, None, *settings, True, "auto", activation)
        given = torch.randn_like(out), x, out, kept, weights, biases, scale, shift, *settings, activation, needed
        torch.library.opcheck(BACKWARD, given)


def test_a_call_of_an_older_program_rectifies():
    given = operator_arguments("espnet", keep=False)
    assert torch.equal(OPERATOR(*given[:-1])[0], OPERATOR(*given)[0])


def test_compile_export_and_fake_tensors():
    settings, tensors = arguments("speechbrain", dtype=torch.float32)
    expected = hierarchical_conv1d(*tensors, **settings)

    class Chain(torch.nn.Module):
        def forward(self, x):
            return hierarchical_conv1d(x, *tensors[1:], **settings)

    compiled = torch.compile(Chain(), fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(compiled(tensors[0]), expected)
    x = tensors[0].clone().requires_grad_()
    compiled(x).square().sum().backward()
    y = tensors[0].clone().requires_grad_()
    hierarchical_conv1d(y, *tensors[1:], **settings).square().sum().backward()
    assert_close(x.grad, y.grad)
    assert_close(torch.export.export(Chain(), (tensors[0],)).module()(tensors[0]), expected)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else [mode.from_tensor(v) for v in t] for t in tensors]
        assert hierarchical_conv1d(*fake, **settings).shape == expected.shape


def test_autocast_casts_x_and_weights():
    settings, tensors = arguments("espnet", dtype=torch.float32)
    expected = hierarchical_conv1d(*tensors, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        out = hierarchical_conv1d(*tensors, **settings)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, BOUNDS[torch.bfloat16])


def test_flops():
    settings, (x, weights, *others) = arguments("espnet")
    with FlopCounterMode(display=False) as counter:
        hierarchical_conv1d(x, weights, *others, **settings)
    assert counter.get_total_flops() == 2 * 2 * 13 * 7 * 4 * 4 * 3


# Arguments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.__setitem__(0, t[0][:, :-1]), ValueError, "x has 31 channels; 7 weights of width 4"),
        (lambda t: t.__setitem__(0, t[0][0]), ValueError, "three dimensions"),
        (lambda t: t.__setitem__(0, [1]), TypeError, "x is a list"),
        (lambda t: t.__setitem__(0, t[0].float()), ValueError, "weights[0] is (4, 4, 3) torch.float64"),
        (lambda t: t.__setitem__(1, []), ValueError, "weights is empty"),
        (lambda t: t.__setitem__(1, t[1][0]), TypeError, "weights is a (4, 4, 3)"),
        (lambda t: t[1].__setitem__(0, torch.zeros(4, 4, 2).double()), ValueError, "odd k"),
        (lambda t: t[2].pop(), ValueError, "biases holds 6 tensors; weights holds 7"),
        (lambda t: t.__setitem__(3, None), ValueError, "both be given"),
        (lambda t: t[4].__setitem__(3, torch.zeros(5)), ValueError, "affine_shift[3]"),
        (lambda t: t[4].__setitem__(3, torch.zeros(4).half()), TypeError, "affine_shift[3] is torch.float16"),
        (lambda t: t[2].__setitem__(1, 3.0), TypeError, "biases[1] is a float"),
    ],
)
def test_bad_tensors(change, error, words):
    settings, tensors = arguments("speechbrain")
    change(tensors)
    with pytest.raises(error) as caught:
        hierarchical_conv1d(*tensors, **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; allowed are 'relu'"),
        ({"padding_mode": "same"}, ValueError, "padding_mode is 'same'; allowed are 'zeros', 'reflect'"),
        ({"passthrough": "middle"}, ValueError, "passthrough is 'middle'"),
        ({"dilation": 0}, ValueError, "dilation is 0"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"backend": "cuda"}, RuntimeError, "it has no 1-D kernels"),
        ({"backend": "triton"}, RuntimeError, "torch.float64"),
        ({"padding_mode": "reflect", "dilation": 13}, ValueError, "L must be at least 14"),
    ],
)
def test_bad_settings(settings, error, words):
    _, tensors = arguments("espnet")
    with pytest.raises(error) as caught:
        hierarchical_conv1d(*tensors, **settings)
    assert words in str(caught.value)


def test_reflection_needs_as_many_values_as_pytorch_says():
    settings, tensors = arguments("speechbrain", (1, 3))
    assert hierarchical_conv1d(*tensors, **settings).shape[2] == 3
    F.pad(tensors[0], (2, 2), mode="reflect")
    with pytest.raises(ValueError, match="at least 3"):
        hierarchical_conv1d(tensors[0][:, :, :2], *tensors[1:], **settings)
