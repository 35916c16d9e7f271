"""The backward kernels, with batch statistics and with BatchNorm folded, against float64 with the path's own masks."""

from __future__ import annotations

import pytest
import torch
from helpers import CHAINS, Chain, masked_gradients
from training_cases import training_case
from triton_cases import error, poison_new_memory, small_tiles

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends.triton.kernels import reductions
from res2net_fused.backends.triton.launch import KernelCall
from res2net_fused.chain import sync_batch_norm

# Sums over pixels that nearly cancel lose digits in half types; the measure is what eager loses, as in
# tests/ops/test_hierarchical_conv_bn.py.
BOUNDS = {torch.float32: 2e-5, torch.float16: 6e-3}
DTYPES = (torch.float32, torch.float16)
NAMES = list(CHAINS)


def gradient_like(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).add(0.5).to(out.dtype)


def check(got, expected, dtype):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and error(a, b) <= BOUNDS[dtype]


def trained(case, monkeypatch, grad=None, **keywords):
    """out, the gradient that came in, and those of the leaves, all memory poisoned."""
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        out = case.require_grad().run(backend="triton", **keywords).out
        grad = gradient_like(out) if grad is None else grad(out)
        return out, grad, torch.autograd.grad(out, case.leaves, grad)


def folded(chain, monkeypatch, shape=(2, 5, 6), dtype=torch.float32, change=lambda x: x, grad=gradient_like):
    """The same without batch statistics, and the expected gradients."""
    x, weights, biases = chain.tensors(shape, dtype)
    tensors = [t.requires_grad_() for t in (change(x), *weights, *biases)]
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        out = hierarchical_conv2d(tensors[0], weights, biases, backend="triton", **chain.settings)
        grad = grad(out)
        got = torch.autograd.grad(out, tensors, grad)
    return got, masked_gradients(chain, tensors[0], weights, biases, out, grad)


def _combinations():
    """A default run has one of the four for each chain."""
    for i, name in enumerate(NAMES):
        for recompute in (False, True):
            for dtype in DTYPES:
                marks = () if DTYPES[(i + recompute) % 2] == dtype and recompute == (i // 2 % 2) else pytest.mark.slow
                yield pytest.param(name, recompute, dtype, marks=marks)


@pytest.mark.parametrize("name, recompute, dtype", list(_combinations()))
def test_batch_statistics(name, recompute, dtype, monkeypatch):
    case = training_case(CHAINS[name], (2, 5, 6), dtype)
    if NAMES.index(name) % 3:
        case.x = case.x.contiguous(memory_format=torch.channels_last)
    out, grad, got = trained(case, monkeypatch, recompute=recompute)
    assert [g.dtype for g in got] == [t.dtype for t in case.leaves]
    check(got, case.exact(out, grad)[2], dtype)


@pytest.mark.parametrize("name", NAMES)
def test_folded(name, monkeypatch):
    dtype = DTYPES[NAMES.index(name) % 2]
    check(*folded(CHAINS[name], monkeypatch, dtype=dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_folded_in_the_other_dtype(name, monkeypatch):
    dtype = DTYPES[1 - NAMES.index(name) % 2]
    check(*folded(CHAINS[name], monkeypatch, dtype=dtype), dtype)


@pytest.mark.parametrize("width", [8, *(pytest.param(width, marks=pytest.mark.slow) for width in (17, 40))])
def test_many_tiles(width, monkeypatch):
    """Several tiles in every direction, and more of them than one program adds."""
    small_tiles(monkeypatch)
    monkeypatch.setattr(reductions, "ROWS", 2)
    case = training_case(Chain({}, 2, width), (2, 4, 7), torch.float32)
    out, grad, got = trained(case, monkeypatch)
    check(got, case.exact(out, grad)[2], torch.float32)
    grouped = Chain({"groups": 2} if width == 8 else {}, 2, width)
    check(*folded(grouped, monkeypatch, (2, 4, 7)), torch.float32)


GRADIENTS = {
    "slice": lambda out: torch.randn(len(out), out.shape[1] + 5, *out.shape[2:])[:, 2:-3],
    "slice_nhwc": lambda out: torch.randn(len(out), *out.shape[2:], out.shape[1] + 5).permute(0, 3, 1, 2)[:, 3:-2],
    "one_value": lambda out: torch.full((), 0.7).expand(out.shape),
    "one_channel": lambda out: torch.randn(len(out), 1, *out.shape[2:]).expand(out.shape),
    "one_pixel": lambda out: torch.randn(len(out), out.shape[1], 1, 1).expand(out.shape),
    "every_second": lambda out: torch.randn(*out.shape, 2)[..., 0],
}


SOME = ["last", "first_added", "stage_stride2"]
SHAPES = [(SOME[i % 3], kind) for i, kind in enumerate(GRADIENTS)]


@pytest.mark.parametrize("name, kind", SHAPES)
def test_incoming_gradient_of_any_strides(name, kind, monkeypatch):
    case = training_case(CHAINS[name], (2, 5, 6), torch.float32)
    out, grad, got = trained(case, monkeypatch, GRADIENTS[kind])
    check(got, case.exact(out, grad)[2], torch.float32)
    check(*folded(CHAINS[name], monkeypatch, grad=GRADIENTS[kind]), torch.float32)


@pytest.mark.parametrize("name", ["last", "stage_stride2"])
def test_x_is_any_slice(name, monkeypatch):
    chain = CHAINS[name]

    def inside(x):
        wide = torch.full((len(x), x.shape[1] + 5, x.shape[2] + 2, x.shape[3] + 3), float("nan"))
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 2:-3, 1:-1, 2:-1] = x
        return wide[:, 2:-3, 1:-1, 2:-1].detach()

    case = training_case(chain, (2, 5, 6), torch.float32)
    case.x = inside(case.x)
    out, grad, got = trained(case, monkeypatch)
    check(got, case.exact(out, grad)[2], torch.float32)
    check(*folded(chain, monkeypatch, change=inside), torch.float32)


@pytest.mark.parametrize("who", ["x", "weights", "gammas", "betas"])
@pytest.mark.parametrize("name", ["last", "first_added", "stage_stride2"])
def test_only_what_requires_a_gradient(name, who, monkeypatch):
    case = training_case(CHAINS[name], (2, 5, 6), torch.float32)
    chosen = [case.x] if who == "x" else getattr(case, who)
    for tensor in chosen:
        tensor.requires_grad_()
    out = case.run(backend="triton").out
    got = torch.autograd.grad(out, chosen, gradient_like(out))
    everything = zip(case.leaves, case.exact(out, gradient_like(out))[2], strict=True)
    check(got, [exact for leaf, exact in everything if leaf.requires_grad], torch.float32)

    x, weights, biases = CHAINS[name].tensors((2, 5, 6), torch.float32)
    tensors = {"x": [x], "weights": weights}.get(who, biases)
    for tensor in tensors:
        tensor.requires_grad_()
    out = hierarchical_conv2d(x, weights, biases, backend="triton", **CHAINS[name].settings)
    got = torch.autograd.grad(out, tensors, gradient_like(out))
    expected = masked_gradients(CHAINS[name], x, weights, biases, out, gradient_like(out))
    everything = zip((x, *weights, *biases), expected, strict=True)
    check(got, [exact for leaf, exact in everything if leaf.requires_grad], torch.float32)


def test_not_finite_gradients_go_where_they_belong(monkeypatch):
    """Scratch has padding behind 5 channels, where an Inf times a zero weight would be NaN."""
    chain = Chain({"activation": "none"}, 3, 5)

    def infinite(out):
        grad = gradient_like(out)
        grad[0, 11, 2, 3] = float("inf")
        return grad

    got, expected = folded(chain, monkeypatch, grad=infinite)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert not got[0].isfinite().all() and got[0].isfinite().any()


def test_repeated_calls_give_the_same_bits(monkeypatch):
    runs = []
    for _ in range(2):
        case = training_case(Chain({}, 3, 5), (3, 5, 6), torch.float32)
        runs.append(trained(case, monkeypatch)[2])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("norms", [True, False], ids=["batch_statistics", "folded"])
def test_launches(norms, monkeypatch):
    """One that masks; then for each convolution its own and, with batch statistics, the sums' and BatchNorm's."""
    counted, run = [], KernelCall.run
    monkeypatch.setattr(KernelCall, "run", lambda call: (counted.append(call.kernel), run(call)))
    case = training_case(Chain({}, 3, 4), (2, 5, 6), torch.float32)
    case.x.requires_grad_()
    out = case.run(backend="triton").out if norms else hierarchical_conv2d(case.x, case.weights, backend="triton")
    counted.clear()
    out.sum().backward()
    assert len(counted) == 1 + 3 * (3 if norms else 1)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_statistics_of_all_processes(recompute, monkeypatch):
    """Two processes with the same images are one with these images twice: gathering doubles what this one gives."""
    case = training_case(Chain({}, 3, 5), (2, 5, 6), torch.float32)
    out, grad, expected = trained(case, monkeypatch, recompute=recompute)
    twice = training_case(Chain({}, 3, 5), (2, 5, 6), torch.float32)
    vectors = []

    def gather(vector, group):
        assert group == "pair"
        vectors.append(vector)
        return torch.stack([vector, vector])

    monkeypatch.setattr(sync_batch_norm, "gather", gather)
    out_twice, _, got = trained(twice, monkeypatch, lambda out: grad, recompute=recompute, group="pair")
    assert len(vectors) == 2 * 3
    assert error(out_twice, out.double()) <= 1e-6
    check(got, [g.double() for g in expected], torch.float32)


def test_statistics_of_processes_that_differ(monkeypatch):
    """Forward against the joined batch: the other process's half has another mean and spread."""
    case = training_case(Chain({"passthrough": "none"}, 1, 5), (4, 5, 6), torch.float32)
    case.x = torch.cat([case.x[:2], 3 * case.x[2:] + 1])
    joined, whole = case.run(backend="triton"), case.x
    halves, said = (whole[:2], whole[2:]), []
    monkeypatch.setattr(sync_batch_norm, "gather", lambda vector, group: said.append(vector) or vector[None])
    for half in halves:
        case.x = half
        case.run(backend="triton", group="pair")
    monkeypatch.setattr(sync_batch_norm, "gather", lambda vector, group: torch.stack(said))
    for half, expected in zip(halves, joined.out.split(2), strict=True):
        case.x = half
        result = case.run(backend="triton", group="pair")
        assert error(result.out, expected.double()) <= 1e-6
        for name, value in vars(result.statistics).items():
            assert error(value, getattr(joined.statistics, name).double()) <= 1e-6


@pytest.mark.slow  # tests/ops asks the same of the operator on other backends
@pytest.mark.parametrize("name", ["last", "stage_stride2"])
def test_opcheck(name):
    """Schemas and fakes hold for these kernels too; and no two results share memory."""
    case = training_case(CHAINS[name], (2, 5, 6), torch.float32).require_grad()
    settings = case.chain.config.as_kwargs().values()
    out, *rest = torch.ops.res2net_fused.hierarchical_conv_bn.default(
        *(arguments := (case.x, case.weights, case.gammas, case.betas, case.eps, *settings, False, "triton", ""))
    )
    torch.library.opcheck(torch.ops.res2net_fused.hierarchical_conv_bn.default, arguments)
    mean, invstd, _, *z = [t.detach() for t in rest]
    grad, detached = gradient_like(out), [[t.detach() for t in tensors] for tensors in (case.weights, case.gammas)]
    x, out = case.x.detach(), out.detach()
    for backward, arguments in (
        ("conv_bn", (grad, x, out, z, mean, invstd, *detached, case.eps, *settings, "triton", "", [True] * 4)),
        ("conv2d", (grad, x, out, detached[0], detached[1], *settings, "triton", [True] * 3)),
    ):
        operator = getattr(torch.ops.res2net_fused, f"hierarchical_{backward}_backward").default
        results = operator(*arguments)
        assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
