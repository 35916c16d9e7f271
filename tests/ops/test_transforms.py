"""Second derivatives, batched gradients, torch.func and forward mode of the operators, against autograd of the reference."""

import copy
import functools
import os

import chain1d_cases
import pytest
import torch
from helpers import CHAINS, DEVICES, Chain, assert_close, runnable_backends
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from training_cases import training_case

import res2net_fused as rf
from res2net_fused.chain import reference
from res2net_fused.chain.config import Chain1dConfig
from res2net_fused.modules.bottle2neck import Bottle2neck
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.ops.hierarchical_conv_bn import hierarchical_conv_bn

NAMES = ["last", "first_added", "none", "groups", "hardtanh", "linear", "stage", "stage_stride2", "stage_stride3_dilated"]
NAMES = [name for name in (*NAMES, "relu6", "leaky") if name in CHAINS]
SMOOTH = ("silu", "gelu", "gelu_tanh", "mish", "hardswish", "leaky_relu:-0.2")  # and others whose output shows no derivative


def conv2d(name, size=(2, 5, 7), **keywords):
    """The operator and the reference as functions of flat tensors, and these; so for the two below."""
    chain = CHAINS[name] if name in CHAINS else Chain({"activation": name})
    chain = Chain(chain.settings, 2, chain.settings.get("groups", 1) * 2, chain.amplitude)
    x, weights, biases = chain.tensors(size)

    def ours(x, *rest):
        return rf.hierarchical_conv2d(x, rest[:2], rest[2:], **chain.settings, **keywords)

    def plain(x, *rest):
        return reference.hierarchical_conv2d(x, rest[:2], rest[2:], chain.config)

    return ours, plain, [x, *weights, *biases]


def conv_bn(name, size=(2, 5, 7), **keywords):
    chain = CHAINS[name]
    case = training_case(Chain(chain.settings, 2, chain.settings.get("groups", 1) * 2, chain.amplitude), size)

    def ours(x, *rest):
        return hierarchical_conv_bn(x, rest[:2], rest[2:4], rest[4:], case.eps, **chain.settings, **keywords).out

    def plain(x, *rest):
        return reference.hierarchical_conv_bn(x, rest[:2], rest[2:4], rest[4:], case.eps, chain.config)

    return ours, plain, case.leaves


def conv1d(name, size=(2, 11), **keywords):
    settings, tensors = chain1d_cases.arguments(name, size)
    steps = len(tensors[1])

    def lists(rest):
        return (rest[i : i + steps] for i in range(0, 4 * steps, steps))

    def ours(x, *rest):
        return rf.hierarchical_conv1d(x, *lists(rest), **settings, **keywords)

    def plain(x, *rest):
        return reference.hierarchical_conv1d(x, *lists(rest), Chain1dConfig(**settings))

    return ours, plain, chain1d_cases.leaves(tensors)


CASES = {
    **{f"2d-{name}": (conv2d, name, {}) for name in (*NAMES, *SMOOTH)},
    **{f"bn-{name}": (conv_bn, name, {}) for name in NAMES},
    **{f"bn-recomputed-{name}": (conv_bn, name, {"recompute": True}) for name in NAMES[:2]},
    **{f"1d-{name}": (conv1d, name, {}) for name in chain1d_cases.CHAINS},
}
FEW = {key: CASES[key] for key in ("2d-first_added", "2d-stage_stride2", "2d-gelu", "2d-mish", "bn-last", "bn-stage_stride2",
                                   "1d-first_added", "1d-wide_kernel")}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = pytest.mark.parametrize("case", FEW.values(), ids=FEW.keys())


def like(tensor, seed=3):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(tensor)


def flat(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else [t for inner in tensors for t in flat(inner)]


def compare(case, transform, bound=1e-10):
    """transform(function, tensors) of the operator and of the reference."""
    make, name, keywords = case
    ours, plain, tensors = make(name, **keywords)
    for a, b in zip(flat(transform(ours, tensors)), flat(transform(plain, tensors)), strict=True):
        assert_close(a, b, bound)


def required(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# Second derivatives and batched gradients -------------------------------------------------------------------------------


@cases
def test_second_and_third_derivatives(case):
    def transform(function, tensors):
        leaves = required(tensors)
        out = function(*leaves)
        total, found = (out.square() * like(out)).sum(), []
        for _ in range(3):
            gradients = torch.autograd.grad(total, leaves, create_graph=True)
            found += gradients
            total = sum((g.square() * like(g)).sum() for g in gradients)
        return found

    compare(case, transform)


@pytest.mark.parametrize(
    "case",
    [
        (conv2d, "last", {}),
        (conv_bn, "last", {}),
        (conv1d, "speechbrain_dilated", {}),
        (conv_bn, "leaky", {}),
        *((conv2d, name, {}) for name in ("leaky", "leaky_relu:-0.2", "silu", "gelu", "gelu_tanh", "mish")),
    ],
)
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "every value"])
def test_gradgradcheck(case, fast):
    make, name, _ = case
    ours, _, tensors = make(name, (1, 7) if make is conv1d else (2, 3, 3))
    assert torch.autograd.gradgradcheck(ours, required(tensors), atol=1e-5, fast_mode=fast)


@few
def test_incoming_gradients_of_any_strides(case):
    def transform(function, tensors):
        leaves, found = required(tensors), []
        out = function(*leaves)
        one, wide = torch.ones((), dtype=out.dtype, requires_grad=True), required([torch.cat([out, out], 1)])[0]
        slices = wide[:, 1 : 1 + out.shape[1]], wide[:1, :1].expand(out.shape)
        for leaf, incoming in ((one, one.expand(out.shape)), *((wide, part) for part in slices)):
            gradients = torch.autograd.grad(out, leaves, incoming, create_graph=True)
            total = sum(g.sin().sum() for g in gradients)
            found += torch.autograd.grad(total, [leaf, *leaves], retain_graph=True, materialize_grads=True)
        return found

    compare(case, transform)


@few
@pytest.mark.parametrize("which", [0, 1, -1])
def test_second_derivatives_of_one_tensor(case, which):
    def transform(function, tensors):
        tensors = [t.detach() for t in tensors]
        leaf = tensors[which].clone().requires_grad_()
        tensors[which] = leaf
        (gradient,) = torch.autograd.grad(function(*tensors).sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)

    compare(case, transform)


@cases
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(case):
    def transform(function, tensors):
        leaves = required(tensors)
        out = function(*leaves)
        stride0 = torch.ones((), dtype=out.dtype).expand(2, *out.shape)
        return [
            torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
            for grads in (torch.stack([like(out), like(out, 4)]), stride0)
        ]

    compare(case, transform)


@few
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, tensors: functional.jacobian(f, tuple(tensors), vectorize=True),
        lambda f, tensors: functional.jacobian(f, tuple(tensors), vectorize=True, strategy="forward-mode"),
        lambda f, tensors: functional.hessian(lambda x: f(x, *tensors[1:]).sin().sum(), tensors[0]),
        lambda f, tensors: functional.hessian(lambda x: f(x, *tensors[1:]).sin().sum(), tensors[0], vectorize=True),
        lambda f, tensors: functional.hvp(lambda x: f(x, *tensors[1:]).sin().sum(), tensors[0], like(tensors[0])),
    ],
    ids=["jacobian", "jacobian_forward", "hessian", "hessian_vectorized", "hvp"],
)
def test_autograd_functional(case, derivative):
    compare(case, lambda f, tensors: derivative(f, [t.detach() for t in tensors]))


@pytest.mark.parametrize("backend", runnable_backends("cpu"))
def test_penalty_through_every_backend(backend):
    chain = Chain({}, 3, 13)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weights, biases = chain.tensors((2, 9, 11), torch.float32)
        x = x.contiguous(memory_format=layout)

        def penalty(function, leaves):
            (gradient,) = torch.autograd.grad(function(*leaves).sin().sum(), leaves[0], create_graph=True)
            return torch.autograd.grad((gradient.flatten(1).norm(dim=1) - 1).square().mean(), leaves)

        tensors = required([x, *weights, *biases])
        got = penalty(lambda x, *rest: rf.hierarchical_conv2d(x, rest[:3], rest[3:], backend=backend), tensors)
        exact = required([t.double() for t in tensors])
        expected = penalty(lambda x, *rest: reference.hierarchical_conv2d(x, rest[:3], rest[3:], chain.config), exact)
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, 2e-5)


def test_first_derivatives_run_the_operator(monkeypatch):
    """Only with create_graph=True do PyTorch's operators take its place."""
    ours, _, tensors = conv2d("last")
    leaves = required(tensors)

    def operators(**keywords):
        out = ours(*leaves).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(out, leaves, **keywords)
        return {event.key for event in profile.key_averages()}

    assert "res2net_fused::hierarchical_conv2d_backward" in operators()
    assert "res2net_fused::hierarchical_conv2d_backward" not in operators(create_graph=True)


def test_several_processes_are_refused_in_one_sentence():
    case = training_case(CHAINS["last"])
    operators = torch.ops.res2net_fused
    settings = case.chain.config.as_kwargs().values()
    out = case.run()
    vectors = out.statistics.mean, out.statistics.invstd
    given = (case.x, out.out, [], *vectors, case.weights, case.gammas, case.eps, *settings, "auto", "world", [True] * 4)
    with pytest.raises(NotImplementedError, match="batched gradients over several processes"):
        vmap(lambda g: operators.hierarchical_conv_bn_backward(g, *given))(torch.stack([out.out, out.out]))
    with pytest.raises(NotImplementedError, match="batched gradients over several processes"):
        of_a_group = functools.partial(hierarchical_conv_bn, eps=case.eps, group="world")
        vmap(lambda x: of_a_group(x, case.weights, case.gammas, case.betas).out)(case.x[None])


# torch.func -------------------------------------------------------------------------------------------------------------


def alone(tensors):
    return (0, *[None] * (len(tensors) - 1))


def stacked(tensors):
    return [torch.stack([t, 1.1 * t, t + 0.1]) for t in tensors]


def one_dual(function, tensors):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*(forward_ad.make_dual(t, like(t)) for t in tensors))).tangent


TRANSFORMS = {
    "grad": lambda f, ts: grad(lambda *a: f(*a).sin().sum(), tuple(range(len(ts))))(*ts),
    "grad_of_grad": lambda f, ts: grad(lambda x: grad(lambda x: f(x, *ts[1:]).sin().sum())(x).square().sum())(ts[0]),
    "vjp": lambda f, ts: [pull(like(out)) for out, pull in [vjp(f, *ts)]],
    "jvp": lambda f, ts: jvp(f, tuple(ts), tuple(map(like, ts))),
    "linearize": lambda f, ts: linearize(f, *ts)[1](*map(like, ts)),
    "jacrev": lambda f, ts: jacrev(f, (0, 1))(*ts),
    "jacfwd": lambda f, ts: jacfwd(f, (0, 1))(*ts),
    "hessian": lambda f, ts: hessian(lambda w: f(ts[0], w, *ts[2:]).sin().sum())(ts[1]),
    "vmap": lambda f, ts: vmap(f)(*stacked(ts)),
    "vmap_of_x": lambda f, ts: vmap(f, alone(ts))(stacked(ts)[0], *ts[1:]),
    "vmap_along_the_last_axis": lambda f, ts: vmap(f, (-1, *alone(ts)[1:]), out_dims=1)(stacked(ts)[0].movedim(0, -1), *ts[1:]),
    "vmap_of_weights": lambda f, ts: vmap(f, (None, *[0] * (len(ts) - 1)))(ts[0], *stacked(ts)[1:]),
    "vmap_of_vmap": lambda f, ts: vmap(vmap(f, alone(ts)), alone(ts))(torch.stack(stacked(ts[:1]) * 2), *ts[1:]),
    "vmap_of_grad": lambda f, ts: vmap(grad(lambda *a: f(*a).sin().sum(), (0, 1)), alone(ts))(stacked(ts)[0], *ts[1:]),
    "grad_of_vmap": lambda f, ts: grad(lambda x: vmap(f, alone(ts))(torch.stack([x, 2 * x]), *ts[1:]).sin().sum())(ts[0]),
    "forward_ad": one_dual,
}


@few
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_torch_func(case, transform):
    compare(case, lambda f, tensors: transform(f, [t.detach() for t in tensors]))


@pytest.mark.parametrize("case", [FEW["2d-first_added"], FEW["1d-wide_kernel"]])
def test_vmap_over_x_is_one_larger_batch(case):
    ours, plain, tensors = case[0](case[1])

    def batch(function):
        leaves = required(tensors)
        out = vmap(function, alone(leaves))(torch.stack([leaves[0], 2 * leaves[0]]), *leaves[1:])
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = batch(ours)
    (name,) = {key for key in (event.key for event in profile.key_averages()) if key.endswith(("_conv2d", "_conv1d"))
               and key.startswith("res2net_fused::")}  # fmt: skip
    assert sum(event.count for event in profile.key_averages() if event.key == name) >= 1
    for a, b in zip(got, batch(plain), strict=True):
        assert_close(a, b, 1e-10)


def test_statistics_of_batches_under_torch_func():
    ours = training_case(CHAINS["last"])

    def statistics(x):
        found = hierarchical_conv_bn(x, ours.weights, ours.gammas, ours.betas, ours.eps).statistics
        return found.mean, found.invstd, found.variance

    batched = vmap(statistics)(torch.stack([ours.x, 3 * ours.x]))
    for i, x in enumerate((ours.x, 3 * ours.x)):
        for a, b in zip(batched, statistics(x), strict=True):
            assert_close(a[i], b, 1e-12)


def test_compiled_and_exported_programs_follow_torch_func():
    ours, plain, tensors = conv2d("last")

    def gradient(function):
        return grad(lambda x: function(x, *tensors[1:]).sin().sum())

    compiled = torch.compile(gradient(ours), backend="aot_eager", fullgraph=True)
    assert_close(compiled(tensors[0]), gradient(plain)(tensors[0]), 1e-12)

    class Net(torch.nn.Module):
        def forward(self, *tensors):
            return ours(*tensors)

    with torch.no_grad():
        program = torch.export.export(Net(), tuple(tensors)).module()
    assert_close(gradient(program)(tensors[0]), gradient(plain)(tensors[0]), 1e-12)
    with pytest.raises(NotImplementedError, match="hierarchical_conv2d has no forward-mode derivative"):
        one_dual(program, tensors)


# Blocks -----------------------------------------------------------------------------------------------------------------

KINDS = {
    "eval": (False, {}),
    "train": (True, {"backend": "cpu"}),
    "train_recomputed": (True, {"backend": "cpu", "recompute": True}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("training", "keywords"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_blocks(training, keywords, device):
    if keywords.get("backend") == "cpu" and "cpu" not in runnable_backends(device):
        pytest.skip("the native CPU kernels are not built")
    torch.manual_seed(0)
    plain = ReferenceBottle2neck(32, 8, baseWidth=52, scale=4).train(training).to(device)
    ours = rf.accelerate(copy.deepcopy(plain), **keywords)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(2, 32, 7, 9, device=device)

    def results(block, x):
        x, parameters = x.clone().requires_grad_(), dict(block.named_parameters())
        (gradient,) = torch.autograd.grad(block(x).sin().sum(), x, create_graph=True)
        found = [*torch.autograd.grad((gradient.flatten(1).norm(dim=1) - 1).square().mean(), [x, *parameters.values()])]
        found += torch.autograd.grad(block(x), x, torch.stack([like(x), like(x, 4)]), is_grads_batched=True)
        if not training:
            if device == "cuda" and os.environ.get("STAND_IN_CARD"):
                pytest.skip("a stand-in card's tensors hold no memory inside functorch's wrappers; what is above was compared")
            found += grad(lambda p: functional_call(block, p, (x.detach(),)).sin().sum())(parameters).values()
            found += [jvp(block, (x.detach(),), (like(x),))[1], vmap(block)(torch.stack([x, 2 * x]))]
        return found

    for a, b in zip(results(ours, x), results(exact, x.double()), strict=True):
        assert_close(a, b, 1e-4)


def test_an_exported_block_follows_torch_func():
    torch.manual_seed(0)
    block = Bottle2neck(32, 8, baseWidth=52, scale=4).eval()
    x = torch.randn(2, 2, 32, 7, 9)
    with torch.no_grad():
        program = torch.export.export(block, (x[0],)).module()
        assert_close(vmap(program)(x), torch.stack([block(x[0]), block(x[1])]))
    leaf = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(block(leaf).sin().sum(), leaf)
    assert_close(grad(lambda x: program(x).sin().sum())(x[0]), expected, 1e-5)
