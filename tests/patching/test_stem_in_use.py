"""What people do with a network whose stem runs fused: hooks, training, records, copies, writes; nobody sees a difference."""

import contextlib
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import assert_close, randomize, relative_error, run_together, timm_or_skip
from stem_cases import (
    NETWORKS,
    X,
    accelerated,
    assert_right,
    fused,
    needs_library,
    networks,
    plain,
    published,
    run,
)
from torch import nn

from res2net_fused import accelerate, explain, freeze, refresh, restore
from res2net_fused.backends.cpu import stem as kernels
from res2net_fused.modules.block_state import STATE
from res2net_fused.patching.explain import OUTDATED
from res2net_fused.patching.stem import FusedStem

pytestmark = needs_library


# Whoever looks between ---------------------------------------------------------------------------------------------------


@networks
def test_its_modules_are_untouched(make, calls):
    """Called by themselves they are what they were, and so are their classes."""
    model = make()
    before = {name: type(child) for name, child in model.named_modules() if name.split(".")[0] in vars(model)["_modules"]}
    own = plain(model)
    accelerate(model)
    run(model)
    stem = vars(model)[STATE].config
    count, u, v = len(calls), X, X
    for name in stem:
        u, v = getattr(model, name)(u), getattr(own, name)(v)
        assert_close(u, v)
        assert all(type(m) is before[n] for n, m in model.named_modules() if n.split(".")[0] == name)
    assert len(calls) == count and isinstance(model, type(own))


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda m, args, out: seen.append(out.clone())),
    "before": lambda module, seen: module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())),
    "changes": lambda module, seen: module.register_forward_hook(lambda m, args, out: seen.append(out.clone()) or out + 1),
}


@pytest.mark.parametrize("part", ["conv1", "bn1", "relu", "maxpool"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_see_what_they_would(part, kind, calls):
    model = accelerated(published, calls)
    own, seen = plain(model), [[], []]
    handles = [HOOKS[kind](getattr(m, part), s) for m, s in zip((model, own), seen, strict=True)]
    before = len(calls)
    assert_close(run(model), run(own))
    assert len(calls) == before and "hook" in explain(model).stems[0].reason
    assert len(seen[0]) == len(seen[1]) == 1
    assert_close(seen[0][0], seen[1][0])
    handles[0].remove()
    assert fused(model, calls), "the hook is gone"


@pytest.mark.parametrize("part", ["conv1", "conv1.4", "bn1"])
def test_hooks_inside_a_deep_stem(part, calls):
    model = accelerated(NETWORKS["timm_d"], calls)
    seen = []
    handle = HOOKS["forward"](model.get_submodule(part), seen)
    assert not fused(model, calls) and seen
    handle.remove()
    assert fused(model, calls)


def test_hooks_of_the_network_and_of_its_stages_see_the_network(calls):
    model = accelerated(published, calls)
    count, seen = len(calls), []
    model.register_forward_hook(lambda module, args, out: seen.append(module))
    model.layer2.register_forward_hook(lambda module, args, out: seen.append(model.conv1))
    run(model)
    assert len(calls) == count + 1
    assert [type(module) for module in seen] == [nn.Conv2d, type(model)] and seen[1] is model


def test_global_hooks_see_every_call(calls):
    model = accelerated(published, calls)
    before, seen = len(calls), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    assert len(calls) == before and {model.conv1, model.bn1, model.relu, model.maxpool} <= set(seen)


def test_parts_in_training(calls):
    model = accelerated(published, calls)
    model.bn1.train()
    own, count = plain(model), len(calls)
    for _ in range(3):
        assert_close(run(model), run(own), 1e-5)
    assert len(calls) == count and "training" in explain(model).stems[0].reason
    assert_close(model.bn1.running_var, own.bn1.running_var)
    model.bn1.eval()
    assert fused(model, calls)
    model.train()
    own = plain(model)
    assert_close(run(model), run(own), 1e-4)
    assert len(calls) == count + 1
    model.eval()
    assert fused(model, calls)


def test_gradients_are_pytorch_s(calls):
    model = accelerated(published, calls)
    own, x, count = plain(model), X.clone().requires_grad_(), len(calls)
    model(x).square().sum().backward()
    assert len(calls) == count and "gradients" in explain(model).stems[0].reason
    gradient, x.grad = x.grad, None
    own(x).square().sum().backward()
    assert_close(gradient, x.grad, 1e-4)
    assert_close(model.conv1.weight.grad, own.conv1.weight.grad, 1e-4)
    model.requires_grad_(False)
    assert model(X).grad_fn is None and len(calls) == count + 1, "nothing wants a gradient"
    model.bn1.bias.requires_grad_(True)
    model(X).sum().backward()
    assert len(calls) == count + 1 and model.bn1.bias.grad is not None


def test_autocast_and_other_dtypes_are_pytorch_s(calls):
    model = accelerated(published, calls)
    count = len(calls)
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert len(calls) == count and "autocast" in explain(model).stems[0].reason
    with pytest.raises(RuntimeError, match="type"):
        run(model, X.double())
    with pytest.raises(RuntimeError, match="channels"):
        run(model, X[:, :2])
    run(model.double(), X.double())
    assert len(calls) == count
    assert fused(model.float(), calls)


# Whoever records, copies or rebuilds the network ----------------------------------------------------------------------------


def test_copies_and_files(calls, tmp_path):
    model = freeze(accelerated(published, calls))
    expected = run(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert isinstance(other, FusedStem) and fused(other, calls)
        assert_close(run(other), expected)
        with torch.no_grad():
            other.conv1.weight.mul_(2)
        assert fused(other, calls)
    assert torch.equal(run(model), expected)


def traced(model):
    return torch.jit.trace(model, X, check_trace=False)


def exported(model):
    return torch.export.export(model, (X,)).module()


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def recompiled(model):
    return torch.fx.symbolic_trace(model)


RECORDED = [
    *((f, "published") for f in (traced, exported, compiled, recompiled)),
    *((f, "timm_d") for f in (traced, recompiled, torch.jit.script)),
    *(pytest.param(f, "timm_d", marks=pytest.mark.slow) for f in (exported, compiled)),
    (torch.jit.script, "ours"),
]


@pytest.mark.parametrize("record,name", RECORDED, ids=lambda value: getattr(value, "__name__", value))
def test_recorded_networks_have_their_own_operators(record, name, calls):
    make = NETWORKS[name]
    model = accelerated(make, calls)
    expected, count = run(plain(model).double(), X.double()), len(calls)
    with torch.no_grad():
        found = record(model)
        assert_close(found(X), expected, 1e-4)
    assert len(calls) == count
    assert fused(model, calls), "recording leaves the network as it is"


def test_extractors_of_features_see_every_module(calls):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = accelerated(published, calls)
    count = len(calls)
    found = run(extraction.create_feature_extractor(model, {"conv1": "a", "bn1": "b", "relu": "c", "maxpool": "d"}))
    own, u = plain(model), X
    for key, name in zip("abcd", ("conv1", "bn1", "relu", "maxpool"), strict=True):
        u = getattr(own, name)(u)
        if name == "conv1":
            assert_close(found[key], u)  # bn1's and relu's are one tensor, which ReLU writes in place
    assert_close(found["d"], u)
    assert len(calls) == count and fused(model, calls)


def test_timm_s_features(calls):
    timm = timm_or_skip()
    model = accelerated(NETWORKS["timm"], calls)
    count, own = len(calls), plain(model)
    with torch.no_grad():
        assert all(map(torch.equal, own.forward_intermediates(X)[1][:1], model.forward_intermediates(X)[1][:1]))
        assert_close(model.forward_features(X), own.forward_features(X), 1e-5)
    assert len(calls) == count, "only the network's own forward is known"
    sizes = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 40)}
    features = accelerate(timm.create_model("res2net50_26w_4s", features_only=True, **sizes).eval())
    expected = run(plain(features))
    for a, b in zip(run(features), expected, strict=True):
        assert_close(a, b, 1e-5)
    assert len(calls) == count and "keeps or returns" in explain(features).stems[0].reason
    assert not isinstance(features, FusedStem)


def test_quantization_finds_its_modules(calls):
    model = accelerated(published, calls)
    count = len(calls)
    fused_modules = torch.ao.quantization.fuse_modules(model, [["conv1", "bn1", "relu"]])
    assert type(fused_modules.bn1) is nn.Identity
    assert_close(run(fused_modules), run(plain(model)), 1e-4)
    assert len(calls) == count
    folded = copy.deepcopy(model)
    folded.conv1, folded.bn1 = nn.utils.fuse_conv_bn_eval(folded.conv1, folded.bn1), nn.Identity()
    assert_close(run(folded), run(plain(model)), 1e-4)


@pytest.mark.parametrize("mode", ["profiler", "flops", "vmap"])
def test_whoever_counts_or_transforms(mode, calls):
    model = accelerate(published(), memory_format=torch.preserve_format)
    assert fused(model, calls)
    own, count = plain(model), len(calls)
    if mode == "flops":
        from torch.utils.flop_counter import FlopCounterMode

        counts = []
        for m in (model, own):
            with FlopCounterMode(display=False) as counter:
                run(m)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] and len(calls) == count
    elif mode == "vmap":
        with torch.no_grad():
            assert_close(torch.func.vmap(model)(X[:, None]), torch.func.vmap(own)(X[:, None]), 1e-4)
        assert len(calls) == count
    else:
        with torch.profiler.profile() as profile:
            run(model)
        assert any("cpu_stem_forward" in event.name for event in profile.events())


# Kept weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folds(monkeypatch):
    """Every folding of a stem."""
    seen = []
    pack = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda weights: seen.append(1) or pack(weights))
    return seen


WRITES = {
    "in_place": lambda m: m.conv1.weight.mul_(2),
    "data": lambda m: m.conv1.weight.data.mul_(2),
    "numpy": lambda m: m.bn1.running_var.numpy().__imul__(2),
    "replaced": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight * 2)),
    "replaced_data": lambda m: setattr(m.conv1.weight, "data", m.conv1.weight.data * 2),
    "statistics": lambda m: m.bn1.running_mean.add_(1),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "bias": lambda m: m.bn1.bias.data.add_(1),
    "loaded": lambda m: m.load_state_dict(randomize(published(), seed=9).state_dict()),
    "loaded_child": lambda m: m.conv1.load_state_dict(randomize(published(), seed=9).conv1.state_dict()),
    "gains_a_bias": lambda m: setattr(m.conv1, "bias", nn.Parameter(torch.ones(16))),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_are_noticed_at_the_next_call(write, calls):
    model = accelerated(published, calls)
    before = run(model)
    with torch.no_grad():
        write(model)
    run(model)
    assert fused(model, calls)
    assert relative_error(run(model), before) > 1e-3


def test_parameters_that_are_given_for_one_call(calls):
    model = accelerated(published, calls)
    before, own = run(model), plain(model)
    with torch.no_grad():
        given = {name: value * 1.5 for name, value in model.named_parameters()}
        for _ in range(2):
            assert_close(torch.func.functional_call(model, given, X), torch.func.functional_call(own, given, X), 1e-5)
    assert_close(run(model), before)


def test_an_optimizer_s_steps_are_noticed(calls):
    model = accelerated(published, calls)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        assert fused(model, calls)


def test_weights_are_folded_once(calls, folds):
    model = accelerate(published())
    for _ in range(3):
        run(model)
    assert len(folds) == 1
    refresh(model)
    run(model)
    assert len(folds) == 2


def test_freeze_keeps_them_until_refresh(calls, folds):
    model = freeze(accelerate(published()))
    before, count = run(model), len(folds)
    assert count == 1 and len(calls) == 1
    with torch.no_grad():
        model.conv1.weight.mul_(2)
        model.bn1.running_mean.add_(1)
    assert torch.equal(run(model), before) and len(folds) == count and len(calls) == 2
    refresh(model)
    assert fused(model, calls) and relative_error(run(model), before) > 1e-3
    for thaw in (lambda: model.train().eval(), lambda: model.to(torch.float64).float(), lambda: restore(model)):
        accelerate(model)
        freeze(model)
        with torch.no_grad():
            model.conv1.weight.mul_(1.5)
        thaw()
        assert_right(model)


def test_without_the_native_library(monkeypatch, folds):
    monkeypatch.setattr(kernels, "why_not", lambda device, dtype: "the native extension is not built")
    model = freeze(accelerate(published()))
    assert_right(model)
    assert not folds and "not built" in explain(model).stems[0].reason


def test_explain_tells_of_writes_that_no_sample_shows(calls):
    model = accelerated(published, calls)
    model.conv1.weight.detach().numpy().reshape(-1)[1] += 1000
    run(model)
    reason = explain(model).stems[0].reason
    assert OUTDATED in reason or fused(model, calls)
    assert OUTDATED not in explain(refresh(model), X).stems[0].reason
    assert fused(model, calls)


def test_restore_takes_it_back(calls):
    model = published()
    own, before = type(model), set(vars(model))
    accelerate(model)
    assert type(model) is not own
    restore(model)
    assert type(model) is own and set(vars(model)) == before and not hasattr(model, STATE)
    run(model)
    assert not calls
    assert fused(accelerate(accelerate(model)), calls)


def test_threads_share_it(calls):
    model = accelerate(published())
    expected = run(plain(model))

    def work():
        for _ in range(5):
            assert_close(run(model), expected, 1e-5)

    run_together(work, work, lambda: [refresh(model) for _ in range(20)], lambda: [freeze(model) for _ in range(5)])


def test_a_network_is_freed_with_its_last_reference(calls):
    model = accelerated(published, calls)
    run(model)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_inference_mode_and_weights_made_in_it(calls):
    model = accelerate(published())
    with torch.inference_mode():
        out = model(X)
    assert_close(out, run(plain(model)), 1e-5)
    assert len(calls) == 1 and fused(model, calls)
    with torch.inference_mode():
        other = accelerate(published())
        expected = restore(copy.deepcopy(other))(X)
        assert_close(other(X), expected, 1e-5)


def test_parameters_are_saved_as_before(calls):
    model = published()
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    with contextlib.closing(io.BytesIO()) as file:
        torch.save(model.state_dict(), file)
