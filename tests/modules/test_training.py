"""Blocks in training mode: steps of an optimizer, running statistics, mixed precision, compile, checkpointing, eligibility."""

import copy

import pytest
import torch
from helpers import DEVICES, Chain, assert_close, randomize
from official_models import blocks_of, images_for, official
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_cases import training_case

from res2net_fused import Bottle2neck, accelerate, explain
from res2net_fused.backends import policy
from res2net_fused.chain import reference
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.modules.block_state import STATE
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.patching.explain import saved_bytes

devices = pytest.mark.parametrize("device", DEVICES)


def pair(device="cpu", dtype=torch.float32, **keywords):
    """An accelerated small network in training mode, and its untouched twin."""
    plain = randomize(official()).to(device, dtype).train()
    return accelerate(copy.deepcopy(plain), **keywords), plain


def step(model, x, optimizer=None):
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 5)
    if optimizer is not None:
        optimizer.zero_grad()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_steps_follow_eagers_in_float64(optimizer, recompute):
    models = pair(dtype=torch.float64, recompute=recompute)
    optimizers = [optimizer(model.parameters()) for model in models]
    x = images_for(models[1]).double()
    for i in range(5):
        losses = [step(model, x + i, opt) for model, opt in zip(models, optimizers, strict=True)]
        assert_close(*losses, 1e-9)
    assert all(report.fused for report in explain(models[0]))
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@devices
def test_running_statistics_are_eagers(device, layout):
    ours, plain = pair(device)
    for i in range(3):
        x = (images_for(plain).to(device) + i).contiguous(memory_format=layout)
        with torch.no_grad():
            ours(x), plain(x)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
        assert a.dtype == b.dtype and (a.is_floating_point() or torch.equal(a, b)), name


NORMS = {
    "cumulative": {"momentum": None},
    "zero_momentum": {"momentum": 0.0},
    "plain": {"affine": False},
    "no_statistics": {"track_running_stats": False},
    "large_eps": {"eps": 0.3},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("keywords", NORMS.values(), ids=NORMS.keys())
def test_kinds_of_batch_norm(keywords, training):
    block = randomize(Bottle2neck(32, 8, norm_layer=lambda c: nn.BatchNorm2d(c, **keywords)).double())
    twin = ReferenceBottle2neck(32, 8, norm_layer=lambda c: nn.BatchNorm2d(c, **keywords)).double()
    twin.load_state_dict(block.state_dict())
    for module in (block, twin):
        module.train(training)
    for seed in range(3):
        x = torch.randn(2, 32, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert_close(block(x), twin(x), 1e-12)
    (report,) = explain(block)
    assert report.fused is True or (not training and "track_running_stats" in keywords and "statistics" in report.reason)
    for (name, a), b in zip(block.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12), name


def test_statistics_that_came_without_tracking():
    """Running statistics set to None after construction, in evaluation as in training."""
    block = randomize(Bottle2neck(32, 8).double()).train()
    for bn in block.bns:
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    twin = copy.deepcopy(block)
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    assert_close(block(x), ReferenceBottle2neck.forward(twin, x), 1e-12)
    assert explain(block)[0].fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@devices
def test_autocast_with_scaled_gradients(device, dtype):
    ours, plain = pair(device)
    x = images_for(plain).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    results = []
    for model in (ours, plain):
        model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        with torch.autocast(device, dtype):
            loss = nn.functional.cross_entropy(model(x), torch.arange(len(x), device=device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        scaler.step(optimizer)
        scaler.update()
    assert all(report.fused for report in explain(ours)) and str(dtype).removeprefix("torch.") in explain(ours)[0].plan
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in results[0][1:])
    assert_close(results[0][0], results[1][0], 5e-2)
    gradients = [torch.cat([g.flatten() for g in result[1:]]) for result in results]
    assert_close(*gradients, 0.15)  # flipped masks of half types; float64 comparisons are the operator's


def test_half_gradients_accumulate_in_single_precision():
    """Two batches added up: what bf16 would round away beside the first one's gradients stays."""
    ours, _ = pair()
    x = images_for(ours)
    gradients = []
    for scales in ((1.0,), (1e-4,), (1.0, 1e-4)):
        ours.zero_grad()
        for scale in scales:
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(ours(x), torch.arange(len(x)))
            (scale * loss).backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
        gradients.append(ours.layer1[0].convs[0].weight.grad.clone())
    large, small, both = gradients
    assert all(report.fused for report in explain(ours))
    assert_close(both - large, small, 1e-2)


def test_a_step_whose_gradients_overflow_is_skipped():
    ours, _ = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    before = [p.detach().clone() for p in ours.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = nn.functional.cross_entropy(ours(images_for(ours)), torch.tensor([1, 3]))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_deterministic_run_gives_the_same_bits_again(recompute):
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            ours, plain = pair(recompute=recompute)
            ours.to(memory_format=torch.channels_last)
            optimizer = OPTIMIZERS["sgd"](ours.parameters())
            x = images_for(plain).contiguous(memory_format=torch.channels_last)
            losses = [step(ours, x + i, optimizer).detach() for i in range(3)]
            runs.append([*losses, *ours.state_dict().values()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(report.fused for report in explain(ours))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_compiled_step_is_one_graph(recompute):
    torch._dynamo.reset()
    ours, plain = pair(dtype=torch.float64, recompute=recompute)
    x = images_for(plain).double()
    for _ in range(2):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert_close(step(compiled, x), step(plain, x), 1e-10)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-9)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.slow
def test_a_step_through_inductor():
    torch._dynamo.reset()
    ours, plain = pair()
    x = images_for(plain)
    assert_close(step(torch.compile(ours, fullgraph=True), x), step(plain, x), 1e-4)
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (ours, plain)]
    assert_close(*gradients, 1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    ours, plain = pair(dtype=torch.float64)
    x = images_for(plain).double().requires_grad_()
    for model in (ours, plain):
        stem = model.relu(model.bn1(model.conv1(x)))
        checkpoint(model.layer1, stem, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip(ours.layer1.parameters(), plain.layer1.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-10)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert_close(a, b, 1e-12)


def bytes_saved(function, *unsaved):
    """What autograd keeps for the backward of `function`, each storage once, without those of `unsaved`."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    known = {t.untyped_storage().data_ptr() for t in unsaved}
    total = sum(size for pointer, (size, _) in storages.items() if pointer not in known)
    return total, out


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("settings", [{}, {"hierarchical": False, "pool": "avg3", "stride": 2}], ids=["normal", "stage"])
def test_bytes_that_explain_reports_are_those_that_autograd_keeps(settings, recompute):
    case = training_case(Chain(settings, 3, 8), (2, 12, 14), torch.float32)
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    case.require_grad()
    problem = ChainProblem.from_tensor(case.x, 8, 3, case.chain.config)
    fused, eager = saved_bytes(problem, recompute)
    parameters = [*case.weights, *case.gammas, *case.betas]
    measured, _ = bytes_saved(lambda: case.run(recompute=recompute).out, *parameters)
    assert measured == fused
    scratch = 2 * 3 * 8 * 4  # eager's operators also hold on to an empty reserve and the statistics one by one
    measured_eager, _ = bytes_saved(lambda: eager_chain(case).square(), *parameters)  # what follows keeps out
    assert abs(measured_eager - eager) <= 2 * scratch
    assert fused < eager


def eager_chain(case):
    config = case.chain.config

    def convolution(k, u):
        z = torch.conv2d(u, case.weights[k], None, config.stride, config.dilation, config.dilation, config.groups)
        y = torch.nn.functional.batch_norm(z, None, None, case.gammas[k], case.betas[k], True, 0.1, case.eps[k])
        return y.relu_()

    return torch.cat(reference.hierarchical_chain(case.x.split(8, 1), convolution, config), 1)


def hooked(block):
    block.convs[1].register_forward_hook(lambda *args: None)


CHANGES = {
    "hook": (hooked, "hook"),
    "one_norm_in_eval": (lambda b: b.bns[1].eval(), "some are not"),
    "group_norm": (lambda b: b.bns.__setitem__(0, nn.GroupNorm(1, b.width)), "GroupNorm"),
    "bias": (lambda b: setattr(b.convs[0], "bias", nn.Parameter(torch.zeros(b.width))), "bias"),
    "silu": (lambda b: setattr(b, "relu", nn.SiLU()), "SiLU"),
    "backend": (lambda b: setattr(getattr(b, STATE, None) or b, "backend", "cuda"), "no kernels for BatchNorm in training"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_what_cannot_train_fused_runs_the_original(change, reason):
    ours, plain = pair()
    for model in (ours, plain):
        change(model.layer2[1])
    x = images_for(plain)
    assert_close(ours(x), plain(x), 1e-5)
    reports = {report.name: report for report in explain(ours)}
    assert reports["layer2.1"].fused is False and reason in reports["layer2.1"].reason
    assert sum(report.fused is True for report in reports.values()) == len(blocks_of(ours)) - 1


@pytest.mark.parametrize("where", ["conv1", "bn1", "conv3", "bn3"])
def test_hooks_around_the_chain_fire_while_it_stays_fused(where):
    ours, _ = pair()
    calls = []
    getattr(ours.layer1[1], where).register_forward_hook(lambda *args: calls.append(1))
    ours(images_for(ours))
    assert calls == [1] and explain(ours)[1].fused


def test_norms_outside_the_chain_may_be_in_eval_mode():
    ours, plain = pair(dtype=torch.float64)
    for model in (ours, plain):
        model.layer1[1].bn1.eval()
        model.layer1[1].bn3.eval()
    x = images_for(plain).double()
    assert_close(ours(x), plain(x), 1e-12)
    assert explain(ours)[1].fused


def test_a_single_value_per_channel_raises_as_batch_norm_does():
    block = Bottle2neck(32, 8).train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 32, 1, 1))


def test_sync_batch_norm_of_one_process_is_fused():
    ours, plain = pair(dtype=torch.float64)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    x = images_for(plain).double()
    assert_close(ours(x), plain(x), 1e-12)
    assert all(report.fused for report in explain(ours))


def test_auto_trains_fused_only_where_that_is_faster(training_pays, monkeypatch):
    monkeypatch.setattr(policy, "training_pays", training_pays)
    small = torch.randn(2, 128, 6, 6).contiguous(memory_format=torch.channels_last)
    large = torch.randn(8, 128, 28, 28).contiguous(memory_format=torch.channels_last)
    for x, backend, recompute, fused in (
        (small, "auto", False, False), (large, "auto", False, True), (large.contiguous(), "auto", False, True),
        (small, "reference", False, True), (small, "auto", True, True), (large[..., :27], "auto", False, False),
        (large[:7], "auto", False, False),
    ):  # fmt: skip
        block = accelerate(randomize(Bottle2neck(128, 32, baseWidth=64, scale=2)), backend, recompute=recompute).train()
        block(x)
        (report,) = explain(block)
        assert bool(report.fused) == fused, (x.shape, backend, recompute)
        assert fused or "measured" in report.reason


@pytest.mark.parametrize("backend,calls", [("auto", 0), ("reference", 1)])
def test_compilers_get_the_own_forward_unless_asked(backend, calls, training_pays, monkeypatch):
    monkeypatch.setattr(policy, "training_pays", training_pays)
    x = torch.randn(1, 128, 28, 28).contiguous(memory_format=torch.channels_last)
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    block = accelerate(randomize(Bottle2neck(128, 32, baseWidth=64, scale=2)), backend).train()
    torch.compile(block, backend=keep, fullgraph=True)(x)
    assert "".join(graphs).count("res2net_fused.hierarchical_conv_bn") == calls
