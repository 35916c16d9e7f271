"""`hierarchical_conv_bn`, the chain with BatchNorm in training mode: values, statistics, gradients, and its registration."""

import pytest
import torch
from helpers import BOUNDS, CHAINS, DEVICES, HALVES, Chain, assert_close, chains, relative_error
from torch.utils.flop_counter import FlopCounterMode
from training_cases import training_case

from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.backends.base import BACKENDS
from res2net_fused.backends.selection import choose_for_training
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.memory_format import memory_format
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.ops.hierarchical_conv_bn import hierarchical_conv_bn

devices = pytest.mark.parametrize("device", DEVICES)
recomputing = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
formats = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS.keys())


def training_backends(device, dtype=torch.float32):
    """The backends that train an ordinary chain here."""
    case = training_case(CHAINS["last"], dtype=dtype, device=device)
    problem = ChainProblem.from_tensor(case.x, 4, 3, ChainConfig())
    found = []
    for name in BACKENDS[1:]:
        try:
            choose_for_training(problem, name)
        except RuntimeError:
            continue
        found.append(name)
    return found


def gradient_like(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).add(0.5).to(out)


def check(case, out, got, grad, dtype):
    """Against float64 with the path's own masks; half types also against eager's error on the same input."""
    exact, _, expected = case.exact(out, grad)
    assert_close(out, exact)
    eager_errors = [0.0] * len(got)
    if dtype in HALVES:
        eager = case.reference()
        eager_expected = case.exact(eager, grad)[2]
        eager_gradients = torch.autograd.grad(eager, case.leaves, grad)
        eager_errors = [relative_error(a, b) for a, b in zip(eager_gradients, eager_expected, strict=True)]
    for a, b, eager_error in zip(got, expected, eager_errors, strict=True):
        assert relative_error(a, b) <= max(GRADIENT_BOUNDS[dtype], 2 * eager_error)


# BatchNorm's backward subtracts means, and its gradients shrink by that: a digit more than the convolutions' own.
GRADIENT_BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


COMBINATIONS = [
    (torch.float64, "nchw", False),
    (torch.float64, "nhwc", True),
    (torch.float32, "nhwc", False),
    (torch.float32, "nchw", True),
    (torch.float16, "nhwc", False),
    (torch.bfloat16, "nchw", True),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "layout", "recompute"), COMBINATIONS, ids=str)
@devices
@chains
def test_against_float64_with_own_masks(chain, device, dtype, layout, recompute):
    for backend in training_backends(device, dtype):
        case = training_case(chain, (3, 9, 11), dtype, device)
        case.x = case.x.contiguous(memory_format=FORMATS[layout])
        case.require_grad()
        result = case.run(backend=backend, recompute=recompute)
        assert memory_format(result.out) == FORMATS[layout]
        grad = gradient_like(result.out)
        got = torch.autograd.grad(result.out, case.leaves, grad)
        assert [g.dtype for g in got] == [t.dtype for t in case.leaves]
        check(case, result.out, got, grad, dtype)


@pytest.mark.parametrize("width", [8, 13, 26, 40])
@pytest.mark.parametrize("settings", [{}, {"passthrough": "first_added"}, {"hierarchical": False, "pool": "avg3"}], ids=str)
@formats
@devices
def test_widths_that_the_kernels_take(width, settings, layout, device):
    for backend in training_backends(device):
        case = training_case(Chain(settings, 3, width), (2, 14, 15), torch.float32, device)
        case.x = case.x.contiguous(memory_format=layout)
        case.require_grad()
        out = case.run(backend=backend).out
        grad = gradient_like(out)
        check(case, out, torch.autograd.grad(out, case.leaves, grad), grad, torch.float32)


@pytest.mark.skipif("cpu" not in training_backends("cpu"), reason="the native CPU kernels are not built")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("isa", cpu_backend.settings.available_instruction_sets())
@pytest.mark.parametrize("width", [1, 5, 8, 13, 16, 26, 40])
@pytest.mark.parametrize("activation", ["relu", "none", "hardtanh20", "relu6", "leaky_relu:0.3"])
def test_native_passes_of_every_instruction_set(width, isa, activation, monkeypatch):
    monkeypatch.setenv(cpu_backend.settings.ISA_VARIABLE, isa)
    settings = {"activation": activation, "passthrough": "none"}
    case = training_case(Chain(settings, 2, width), (2, 7, 9), torch.float32)
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    case.require_grad()
    if activation in ("hardtanh20", "relu6"):
        case.gammas = [gamma.detach().mul(15).requires_grad_() for gamma in case.gammas]
    out = case.run(backend="cpu").out
    grad = gradient_like(out)
    check(case, out, torch.autograd.grad(out, case.leaves, grad), grad, torch.float32)


@pytest.mark.skipif("cpu" not in training_backends("cpu"), reason="the native CPU kernels are not built")
def test_bits_do_not_depend_on_the_number_of_threads():
    case = training_case(Chain({}, 3, 4), (6, 30, 31), torch.float32)  # too narrow for Winograd, whose plan may depend on it
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(vars(case.run(backend="cpu").statistics).values())
    torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_nan_and_inf_stay_in_their_channel_of_the_first_step():
    """A channel whose input is not finite has no statistics, and NaN passes the activation, as in eager."""
    for backend in training_backends("cpu"):
        case = training_case(Chain({"hierarchical": False, "groups": 2}, 2, 4), (2, 5, 6), torch.float32)
        case.x[0, 1, 2, 3] = float("inf")
        out, expected = case.run(backend=backend).out, case.reference()
        assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any() and out.isfinite().any()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@devices
def test_statistics(device, offset):
    """Means far from zero: a variance from E[x^2] - E[x]^2 would have no digit left."""
    for backend in training_backends(device):
        case = training_case(CHAINS["none"], (4, 13, 17), torch.float32, device)
        case.x = (case.x + offset).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            result = case.run(backend=backend)
        mean, invstd, variance = (t.double() for t in vars(result.statistics).values())
        zs = case.exact(result.out)[1]
        for k, z in enumerate(zs):
            if k and offset:
                break  # behind the first, errors of its own output come in
            assert_close(mean[k], z.mean((0, 2, 3)), 1e-6)
            assert_close(variance[k], z.var((0, 2, 3)), 1e-5)
            assert_close(invstd[k], (z.var((0, 2, 3), correction=0) + case.eps[k]).rsqrt(), 1e-5)


def test_gradcheck():
    case = training_case(CHAINS["last"], (2, 3, 3)).require_grad()
    steps = case.chain.steps

    def call(x, *rest):
        return hierarchical_conv_bn(x, rest[:steps], rest[steps : 2 * steps], rest[2 * steps :], case.eps).out

    assert torch.autograd.gradcheck(call, tuple(case.leaves), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["last", "first_added", "stage_stride2", "none", "s1", "width13"])
@devices
def test_incoming_gradient_of_any_strides(name, device):
    for backend in training_backends(device):
        case = training_case(CHAINS[name], (2, 8, 9), torch.float32, device)
        case.x = case.x.contiguous(memory_format=torch.channels_last)
        case.require_grad()
        out = case.run(backend=backend).out
        wide = torch.randn(out.shape[0], out.shape[1] + 5, *out.shape[2:], device=device)
        for grad in (
            wide[:, 2 : 2 + out.shape[1]],
            wide.contiguous(memory_format=torch.channels_last)[:, 3 : 3 + out.shape[1]],
            torch.ones((), device=device).expand(out.shape) * wide[:, :1],
            wide[:1, :1].expand(out.shape),
            torch.randn(*out.shape, 2, device=device)[..., 0],
        ):
            got = torch.autograd.grad(out, case.leaves, grad, retain_graph=True)
            check(case, out, got, grad, torch.float32)


VIEWS = {
    "slice": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "slice_nhwc": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_second_pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one_image_for_all": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@devices
def test_x_of_any_strides(view, device):
    for backend in training_backends(device):
        case = training_case(CHAINS["width13"], dtype=torch.float32, device=device)
        case.x = view(case.x)
        case.require_grad()
        out = case.run(backend=backend).out
        grad = gradient_like(out)
        check(case, out, torch.autograd.grad(out, case.leaves, grad), grad, torch.float32)


@pytest.mark.parametrize("who", ["x", "weights", "gammas", "betas"])
@pytest.mark.parametrize("name", ["last", "first", "stage_stride2", "width13"])
@devices
def test_partial_requires_grad(name, who, device):
    for backend in training_backends(device):
        case = training_case(CHAINS[name], dtype=torch.float32, device=device)
        case.x = case.x.contiguous(memory_format=torch.channels_last)
        chosen = [case.x] if who == "x" else getattr(case, who)[:1]
        for tensor in chosen:
            tensor.requires_grad_()
        out = case.run(backend=backend).out
        out.square().sum().backward()
        everything = case.exact(out, 2 * out)[2]
        for tensor, exact in zip(case.leaves, everything, strict=True):
            if any(tensor is c for c in chosen):
                assert relative_error(tensor.grad, exact) <= 2e-5
            else:
                assert tensor.grad is None


def test_without_gradients_nothing_is_kept_and_nothing_needs_a_gradient():
    case = training_case(CHAINS["last"]).require_grad()
    with torch.no_grad():
        result = case.run()
    assert not result.out.requires_grad
    assert_close(result.out, case.reference(), 1e-12)
    statistics = case.run().statistics
    assert not any(t.requires_grad for t in vars(statistics).values())


@recomputing
@devices
def test_repeated_steps_give_the_same_bits(device, recompute):
    """Also what `torch.use_deterministic_algorithms(True)` asks for: no kernel of this package adds in an order of chance."""
    torch.use_deterministic_algorithms(True)
    try:
        for backend in training_backends(device):
            case = training_case(CHAINS["width13"], (4, 20, 21), torch.float32, device)
            case.x = case.x.contiguous(memory_format=torch.channels_last)
            case.require_grad()
            runs = []
            for _ in range(3):
                result = case.run(backend=backend, recompute=recompute)
                gradients = torch.autograd.grad(result.out, case.leaves, gradient_like(result.out))
                runs.append([result.out, *vars(result.statistics).values(), *gradients])
            for again in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_value_per_channel_is_batch_norms_own_error():
    case = training_case(CHAINS["last"], (1, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        case.reference()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        case.run()


BAD = {
    "gammas": (lambda c: c.gammas.pop(), ValueError, "gammas holds 2"),
    "eps": (lambda c: c.eps.pop(), ValueError, "eps holds 2"),
    "beta": (lambda c: c.betas.__setitem__(1, torch.zeros(5)), ValueError, r"betas\[1\] is \(5,\)"),
    "dtype": (lambda c: c.gammas.__setitem__(0, c.gammas[0].half()), TypeError, r"gammas\[0\] is torch.float16"),
    "weights": (lambda c: c.weights.pop(), ValueError, "x has 16 channels"),
}


@pytest.mark.parametrize(("spoil", "error", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input(spoil, error, said):
    case = training_case(CHAINS["last"])
    spoil(case)
    with pytest.raises(error, match=said):
        case.run()


def test_a_backend_without_training_kernels_says_so():
    case = training_case(CHAINS["last"])
    with pytest.raises(RuntimeError, match="backend='cuda' cannot train.*no kernels for BatchNorm in training mode"):
        case.run(backend="cuda")


@recomputing
@pytest.mark.parametrize("name", ["last", "stage_stride2"])
@devices
def test_opcheck(name, device, recompute):
    for layout in FORMATS.values():
        case = training_case(CHAINS[name], device=device)
        case.x = case.x.contiguous(memory_format=layout)
        case.require_grad()
        settings = case.chain.config.as_kwargs().values()
        arguments = case.x, case.weights, case.gammas, case.betas, case.eps, *settings, recompute, "auto", ""
        torch.library.opcheck(torch.ops.res2net_fused.hierarchical_conv_bn.default, arguments)


def test_flop_counter():
    case = training_case(CHAINS["last"]).require_grad()
    for recompute in (False, True):
        with FlopCounterMode(display=False) as counted:
            case.run(recompute=recompute).out.sum().backward()
        forward = 2 * 9 * 4 * 4 * 3 * (3 * 7 * 9)
        assert counted.get_total_flops() == (4 if recompute else 3) * forward


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@devices
def test_autocast_casts_x_and_weights_only(device, dtype):
    case = training_case(CHAINS["last"], dtype=torch.float32, device=device).require_grad()
    with torch.autocast(device, dtype):
        result = case.run()
    assert result.out.dtype == dtype and result.statistics.mean.dtype == torch.float32
    gradients = torch.autograd.grad(result.out.float().square().sum(), case.leaves)
    assert all(g.dtype == torch.float32 for g in gradients)
    assert_close(result.out, case.exact(result.out)[0], BOUNDS[dtype])
