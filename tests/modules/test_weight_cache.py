"""Kept weights: reused while nothing changes, dropped for every kind of change, absent from copies and files."""

import copy
import functools
import io
import pickle

import pytest
import torch
from helpers import assert_close, randomize, run_together
from kept_weights import X, assert_current, fused, kept_tensors, make, own_forward
from torch import nn

from res2net_fused import freeze, refresh
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck


def test_second_call_reuses_the_first(folds):
    block = make()
    first = fused(block)
    for _ in range(3):
        assert torch.equal(fused(block), first)
    assert len(folds) == 1
    fused(block, torch.randn(1, 32, 9, 4, dtype=torch.float64))  # other sizes, same weights
    with torch.inference_mode():
        block(X)
    assert len(folds) == 1


def test_gradients_fold_at_every_call_and_keep_nothing(folds):
    block = make()
    for count in (1, 2):
        block(X).sum().backward()
        assert len(folds) == count
    fused(block)
    assert len(folds) == 3


# Every kind of change -------------------------------------------------------------------------------------------------


def in_place(name, write):
    def change(block):
        with torch.no_grad():
            write(block.get_parameter(name) if "running" not in name else block.get_buffer(name))

    return change


def optimizer_step(make_optimizer):
    def change(block):
        optimizer = make_optimizer(block.parameters())
        block(X).square().mean().backward()
        optimizer.step()

    return change


def replace_parameter(block):
    block.bns[1].weight = nn.Parameter(block.bns[1].weight.detach() * 3)


def replace_module(block):
    old = block.convs[0]
    block.convs[0] = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False).double()


def add_bias(block):
    block.convs[2].bias = nn.Parameter(torch.randn(block.width, dtype=torch.float64))


def load(**keywords):
    def change(block):
        state = randomize(copy.deepcopy(block), seed=9).state_dict()
        block.load_state_dict(state, **keywords)

    return change


def load_into_a_child(block):
    state = randomize(copy.deepcopy(block), seed=9).convs[1].state_dict()
    block.convs[1].load_state_dict(state)


def train_forward(block):
    block.train()
    block(X)
    block.eval()


def train_forward_of_one_norm(block):
    """A BatchNorm called by itself moves its running statistics, which does not bump their version."""
    block.bn1.train()
    block.bn1(torch.randn(4, block.bn1.num_features, 3, 3, dtype=torch.float64))
    block.bn1.eval()


def functional_batch_norm_of_the_whole_block(block):
    """Norms put into training mode one by one, as calibration code does; block.train() is never called."""
    for bn in (block.bn1, *block.bns, block.bn3):
        bn.train()
    block(X)
    for bn in (block.bn1, *block.bns, block.bn3):
        bn.eval()


def round_trip(dtype):
    def change(block):
        block.to(dtype).double()

    return change


def swap_on_conversion(block):
    """`.to` by swapping tensors, which refuses tensors that somebody holds weak references to."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        block.float().double()
        block.load_state_dict(randomize(copy.deepcopy(block), seed=9).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def write_in_inference_mode(block):
    with torch.inference_mode():
        block.conv3.weight.mul_(2)


def set_data(block):
    block.conv1.weight.data = block.conv1.weight.data * 2


def vector_to_parameters(block):
    vector = nn.utils.parameters_to_vector(block.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 1.5, block.parameters())


def new_eps(block):
    block.bns[0].eps = 0.5


CHANGES = {
    "conv1_mul": in_place("conv1.weight", lambda t: t.mul_(1.5)),
    "convs_copy": in_place("convs.1.weight", lambda t: t.copy_(torch.randn_like(t))),
    "conv3_index": in_place("conv3.weight", lambda t: t[0].fill_(1.0)),
    "view_write": in_place("convs.0.weight", lambda t: t.view(-1)[3:9].add_(1.0)),
    "norm_weight_add": in_place("bns.0.weight", lambda t: t.add_(1.0)),
    "norm_bias_init": in_place("bn1.bias", lambda t: nn.init.constant_(t, 2.0)),
    "running_mean": in_place("bn3.running_mean", lambda t: t.add_(1.0)),
    "running_var": in_place("bns.2.running_var", lambda t: t.mul_(4.0)),
    "sgd": optimizer_step(lambda p: torch.optim.SGD(p, 0.1)),
    "sgd_momentum_foreach": optimizer_step(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True)),
    "sgd_fused": optimizer_step(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "adam_fused": optimizer_step(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "adamw_fused": optimizer_step(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "adamw_foreach": optimizer_step(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "adam_capturable_off": optimizer_step(lambda p: torch.optim.Adam(p, 0.1, foreach=False)),
    "rmsprop": optimizer_step(lambda p: torch.optim.RMSprop(p, 0.1)),
    "to_float_and_back": round_trip(torch.float32),
    "to_bfloat16_and_back": round_trip(torch.bfloat16),
    "swapped_on_conversion": swap_on_conversion,
    "load_state_dict": load(),
    "load_state_dict_assign": load(assign=True),
    "load_state_dict_of_a_child": load_into_a_child,
    "train_forward": train_forward,
    "train_forward_of_one_norm": train_forward_of_one_norm,
    "train_forward_by_norm_flags": functional_batch_norm_of_the_whole_block,
    "replaced_parameter": replace_parameter,
    "replaced_convolution": replace_module,
    "added_bias": add_bias,
    "inference_mode_write": write_in_inference_mode,
    "set_data": set_data,
    "vector_to_parameters": vector_to_parameters,
    "reset_parameters": lambda block: [m.reset_parameters() for m in (block.conv1, block.bns[0])],
    "norm_eps": new_eps,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_no_change_goes_unseen(change, folds):
    block = make()
    before = fused(block)
    assert_current(block)
    seen = len(folds)
    change(block)
    after = fused(block)
    assert_close(after, own_forward(block), 1e-12)
    assert (after - before).norm() > 1e-9 * before.norm(), "the change changed nothing: not a test"
    assert len(folds) > seen
    settled = len(folds)
    assert torch.equal(fused(block), after)
    assert len(folds) == settled, "the changed block is not cached again"


def test_freed_and_reused_memory_is_another_tensor():
    """A new parameter at the old one's address, with the old one's version, is still new."""
    block = make()
    for seed in range(5):
        fused(block)
        shape = block.convs[0].weight.shape
        del block.convs[0].weight
        generator = torch.Generator().manual_seed(seed)
        block.convs[0].weight = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))
        assert_current(block)


def test_optimizer_of_another_model_costs_one_fold_only(folds):
    block = make()
    fused(block)
    other = nn.Linear(2, 2)
    other(torch.randn(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert_current(block)
    fused(block)
    assert len(folds) == 2


def test_training_loop():
    """Train, evaluate, train: what a stale cache ruins."""
    block = make().train()
    optimizer = torch.optim.Adam(block.parameters(), 0.05, fused=True)
    for _ in range(3):
        block.train()
        optimizer.zero_grad()
        block(X).square().mean().backward()
        optimizer.step()
        block.eval()
        assert_current(block)


def test_refresh_reaches_blocks_inside_a_model(folds):
    model = nn.Sequential(make(), nn.Identity(), make())
    fused(model)
    assert len(folds) == 2
    assert refresh(model) is model
    fused(model)
    assert len(folds) == 4


def test_weights_that_are_no_parameters():
    """Plain tensors in a parameter's place, as in DataParallel's replicas, are watched too."""
    block = make()
    fused(block)
    weight = block.convs[1].weight.detach().clone()
    del block.convs[1].weight
    for factor in (1.0, 2.0, 3.0):
        block.convs[1].weight = weight * factor
        assert_current(block)
    block.convs[1].weight.mul_(2)
    assert_current(block)


# Backend and dtype ----------------------------------------------------------------------------------------------------


def test_environment_change_folds_again(folds, monkeypatch):
    block = make()
    fused(block)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "reference")
    assert_current(block)
    assert len(folds) == 2


# Copies and files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["cached", "frozen"])
def test_deepcopy_and_pickle_carry_nothing(frozen):
    block = make()
    empty = len(pickle.dumps(block))
    fused(block)
    if frozen:
        freeze(block)
    assert kept_tensors(block)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert not kept_tensors(twin)
        assert torch.equal(fused(twin), fused(block))
        with torch.no_grad():
            twin.conv1.weight.mul_(2)
        assert_current(twin)
        assert_current(block)
    assert len(pickle.dumps(block)) <= empty + 200
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert not kept_tensors(torch.load(file, weights_only=False))


def test_nothing_kept_is_in_the_state_dict():
    block = make()
    before = list(block.state_dict())
    fused(block)
    freeze(block)
    assert list(block.state_dict()) == before
    assert [n for n, _ in block.named_buffers()] == [n for n, _ in make().named_buffers()]


def test_copies_of_one_block_do_not_share():
    block = make()
    fused(block)
    twins = [copy.deepcopy(block) for _ in range(2)]
    for i, twin in enumerate(twins):
        with torch.no_grad():
            twin.convs[0].weight.mul_(i + 2)
        assert_current(twin)
    assert_current(block)


def test_training_mode_frees_the_memory():
    block = make()
    fused(block)
    assert kept_tensors(block)
    block.train()
    assert not kept_tensors(block)


# Modes in which nothing may be kept -----------------------------------------------------------------------------------


def test_cache_made_in_inference_mode_serves_other_modes(folds):
    block = make()
    with torch.inference_mode():
        out = block(X)
    assert not any(t.is_inference() for t in kept_tensors(block))
    assert torch.equal(fused(block), out)
    assert len(folds) == 1
    x = X.clone().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None


def test_inference_parameters_are_not_kept():
    """They have no version to watch."""
    with torch.inference_mode():
        block = make()
        for _ in range(2):
            out = block(X)
            assert_close(out, ReferenceBottle2neck.forward(block, X), 1e-12)
            block.convs[0].weight.mul_(1.5)


def test_functional_call_uses_the_parameters_it_is_given(folds):
    block = make()
    own = fused(block)
    for seed in (3, 4):
        other = randomize(copy.deepcopy(block), seed)
        tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        with torch.no_grad():
            out = torch.func.functional_call(block, tensors, (X,))
        assert_close(out, own_forward(other), 1e-12)
        assert torch.equal(fused(block), own)


def test_functional_call_is_differentiable_in_the_given_parameters():
    block = make().requires_grad_(False)
    fused(block)
    given = {k: v.detach().clone().requires_grad_() for k, v in block.named_parameters()}
    got = torch.autograd.grad(torch.func.functional_call(block, given, (X,)).square().sum(), list(given.values()))
    twin = copy.deepcopy(block)
    twin.__class__ = ReferenceBottle2neck
    expected = torch.autograd.grad(torch.func.functional_call(twin, given, (X,)).square().sum(), list(given.values()))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-11)


def transforms(block):
    """Results of torch.func's transforms of the block's forward."""
    parameters = {k: v.detach() for k, v in block.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    gradient = torch.func.grad(loss)(parameters, X)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X[:, None])
    batched = torch.func.vmap(block)(torch.stack([X, 2 * X]))
    tangent = torch.func.jvp(block, (X,), (torch.ones_like(X),))[1]
    return [*gradient.values(), *per_sample.values(), batched, tangent]


def test_torch_func_transforms_work_as_on_the_plain_block(folds):
    block = make()
    fused(block)
    twin = copy.deepcopy(block)
    twin.__class__ = ReferenceBottle2neck
    for a, b in zip(transforms(block), transforms(twin), strict=True):
        assert_close(a, b, 1e-11)
    assert_current(block)


def test_forward_mode_derivatives_are_not_lost():
    block = make().requires_grad_(False)
    twin = copy.deepcopy(block)
    twin.__class__ = ReferenceBottle2neck
    tangents = []
    for module in (block, twin):
        with torch.autograd.forward_ad.dual_level():
            out = module(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    assert tangents[0] is not None
    assert_close(*tangents, 1e-11)


# What leaves the block is nobody else's -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["cached", "frozen"])
def test_no_operator_returns_a_kept_tensor(keep):
    block = make()
    first = fused(block).clone()
    if keep == "frozen":
        freeze(block)
    out = fused(block)
    kept = {t.untyped_storage().data_ptr() for t in kept_tensors(block)}
    assert kept and out.untyped_storage().data_ptr() not in kept
    out.fill_(float("nan"))
    assert torch.equal(fused(block), first)


def test_kept_tensors_are_not_the_callers():
    block = make()
    fused(block)
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    assert not own & {t.untyped_storage().data_ptr() for t in kept_tensors(block)}


@pytest.mark.usefixtures("impatient_threads")
def test_replicas_in_threads():
    """DataParallel's replicas share their attributes, and so what is kept; none may get another's weights."""
    replicas = [randomize(make(), seed) for seed in (11, 12)]
    vars(replicas[1])[STATE] = vars(replicas[0])[STATE]
    expected = [own_forward(block) for block in replicas]

    def work(i):
        return all(torch.allclose(fused(replicas[i]), expected[i], rtol=1e-10) for _ in range(40))

    assert all(run_together(*(functools.partial(work, i % 2) for i in range(4))))
