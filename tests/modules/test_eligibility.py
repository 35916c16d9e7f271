"""What lets an accelerated block run fused at each call, and what sends it to its class's own forward."""

import copy

import pytest
import torch
from helpers import assert_close, randomize
from official_models import IMAGES, blocks_of, official, run
from published_blocks.speakers1d import ESPnetBlock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

from res2net_fused import Bottle2neck, accelerate, explain, freeze
from res2net_fused.modules import eligibility


def fired_by(model, module, x=IMAGES):
    """How often a forward hook on `module` fires in one call of `model`, and what the model returns."""
    calls = []
    handle = module.register_forward_hook(lambda m, i, o: calls.append(m))
    out = run(model, x)
    handle.remove()
    return len(calls), out


@pytest.mark.parametrize("where", ["layer1.1", "layer1", "layer1.1.downsample", "layer2.0.downsample"])
def test_hooks_outside_the_chain_fire_and_keep_it_fused(where):
    model = official()
    module = dict(model.named_modules()).get(where)
    if module is None:
        pytest.skip("no such module in this block")
    expected = run(model, IMAGES)
    accelerate(model)
    count, out = fired_by(model, module)
    assert count == 1
    assert_close(out, expected, 5e-6)
    assert all(r.fused for r in explain(model))


@pytest.mark.parametrize("where", ["se", "drop_path", "drop_block"])
@pytest.mark.parametrize("warm", [True, False])
def test_hooks_on_parts_that_do_nothing_fire(where, warm):
    block = randomize(Bottle2neck(32, 8, attn_layer=lambda channels: nn.Identity(), drop_path=nn.Identity())).eval()
    block.drop_block = nn.Identity()
    x = torch.randn(2, 32, 5, 6)
    expected = run(block, x)
    for _ in range(3 * warm):
        run(block, x)
    part = block.get_submodule(where)
    for _ in range(3):
        count, out = fired_by(block, part, x)
        assert count == 1 and explain(block)[0].fused
        assert_close(out, expected, 5e-6)
    handle = part.register_forward_hook(lambda module, given, out: out * 2)
    changed = run(block, x)
    handle.remove()
    assert not torch.equal(changed, expected) and torch.equal(run(block, x), expected)


INNER = ["conv1", "bn1", "convs.0", "convs.2", "bns.1", "conv3", "bn3", "relu", "pool"]


@pytest.mark.parametrize("where", INNER)
def test_hooks_inside_the_chain_fire_as_before(where):
    model = official()
    module = model.layer2[0].get_submodule(where)
    expected_count, expected = fired_by(model, module)
    accelerate(model)
    run(model, IMAGES)
    count, out = fired_by(model, module)
    assert count == expected_count >= 1
    assert_close(out, expected, 5e-6)
    run(model, IMAGES)
    assert all(r.fused for r in explain(model)), "the hook is gone"


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_other_hooks_inside_the_chain(kind):
    model = accelerate(official())
    calls = []
    register = getattr(model.layer1[1].convs[1], f"register_{kind}_hook")
    register(lambda *args: calls.append(1) and None)
    model(IMAGES).sum().backward()
    assert calls
    reports = {r.name: r for r in explain(model)}
    assert reports["layer1.1"].fused is False and "hook" in reports["layer1.1"].reason
    assert reports["layer1.0"].fused


def test_global_hooks_see_every_module():
    model = official()
    accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        run(model, IMAGES)
    finally:
        handle.remove()
    assert model.layer1[1].convs[0] in seen


def test_feature_extraction_by_a_hook_that_changes_the_output():
    model = official()
    change = lambda m, i, o: o * 0  # noqa: E731
    model.layer1[1].bns[0].register_forward_hook(change)
    expected = run(model, IMAGES)
    assert_close(run(accelerate(model), IMAGES), expected, 5e-6)


def circular(conv):
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False, padding_mode="circular")


def new_pool(block):
    block.pool = nn.MaxPool2d(3, 2, padding=1)


CHANGES = {
    # what a user may do after accelerate: the change to layer2.0, and a word of the reason
    "weight_norm": (lambda b: parametrizations.weight_norm(b.convs[0]), "parametrized"),
    "spectral_norm": (lambda b: parametrizations.spectral_norm(b.conv1), "parametrized"),
    "pruning": (lambda b: prune.l1_unstructured(b.convs[1], "weight", 0.5), "hook"),
    "group_norm": (lambda b: setattr(b, "bn1", nn.GroupNorm(1, b.bn1.num_features)), "GroupNorm"),
    "no_norm": (lambda b: b.bns.__setitem__(0, nn.InstanceNorm2d(b.bns[0].num_features)), "InstanceNorm2d cannot be folded"),
    "one_norm_in_training": (lambda b: b.bns[1].train(), "training"),
    "dropped_statistics": (lambda b: setattr(b.bn3, "running_mean", None) or setattr(b.bn3, "running_var", None), "statistics"),
    "dilation": (lambda b: [setattr(c, "dilation", (2, 2)) or setattr(c, "padding", (2, 2)) for c in b.convs], "geometry"),
    "padding_mode": (lambda b: setattr(b, "convs", nn.ModuleList(circular(c) for c in b.convs)), "geometry"),
    "activation": (lambda b: setattr(b, "relu", nn.GELU()), "GELU"),
    "pool": (new_pool, "pool"),
    "pool_settings": (lambda b: setattr(b.pool, "count_include_pad", False), "pool"),
    "instance_forward": (lambda b: setattr(b.convs[0], "forward", lambda u: u[:, :, ::2, ::2] * 2), "forward"),
}


def test_a_sync_batch_norm_in_eval_mode_is_a_batch_norm():
    model = accelerate(official())
    expected = run(model, IMAGES)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert_close(run(model, IMAGES), expected, 1e-6)
    assert all(r.fused for r in explain(model))


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_what_cannot_run_fused_runs_the_original(change, reason, frozen):
    model = official()
    plain = copy.deepcopy(model)
    accelerate(model)
    run(model, IMAGES)
    if frozen:
        freeze(model)
    for m in (model, plain):
        torch.manual_seed(3)
        change(m.layer2[0])
    assert_close(run(model, IMAGES), run(plain, IMAGES), 5e-6)
    report = {r.name: r for r in explain(model)}["layer2.0"]
    assert report.fused is False and reason in report.reason
    assert sum(r.fused is True for r in explain(model)) == len(blocks_of(model)) - 1


def test_becoming_eligible_again():
    model = accelerate(official())
    handle = model.layer1[0].conv1.register_forward_hook(lambda m, i, o: None)
    run(model, IMAGES)
    assert not explain(model)[0].fused
    handle.remove()
    run(model, IMAGES)
    assert explain(model)[0].fused


# Devices ----------------------------------------------------------------------------------------------------------------


def on_meta(kind):
    model, x = official().to("meta"), IMAGES.to("meta")
    if kind == "half":
        return model.half(), x.half()
    return (model.train(), x) if kind == "training" else (model, x)


@pytest.mark.parametrize("how", ["", "cpu", "frozen", "accelerated there"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("kind", ["eval", "training", "half"])
def test_on_the_meta_device(kind, grad, how):
    model, x = on_meta(kind)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        if how != "accelerated there":
            model = model.to_empty(device="cpu")
        model = accelerate(model, backend="cpu" if how == "cpu" else "auto").to("meta")
        if how == "frozen" and kind != "training":
            freeze(model)
        out = model(x)
    assert (out.shape, out.dtype, out.device, out.requires_grad) == (
        expected.shape, expected.dtype, expected.device, expected.requires_grad,
    )  # fmt: skip
    str(explain(model))


@pytest.mark.parametrize("of_x", [torch.float16, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["2d", "1d"])
def test_other_dtypes_on_the_meta_device_do_as_the_plain_block_does(kind, of_x):
    block = official().layer1[1] if kind == "2d" else randomize(ESPnetBlock()).eval()
    x = torch.randn((2, block.conv1.in_channels, 7, 9)[: 4 if kind == "2d" else 3], dtype=of_x, device="meta")

    def outcome():
        try:
            out = block.to("meta")(x)
            return out.shape, out.dtype
        except RuntimeError as error:
            return str(error)

    expected = outcome()
    accelerate(block)
    assert outcome() == expected and "autocast" not in str(expected)


@pytest.mark.parametrize("device", ["xpu", "mps", "cuda", "vulkan", "cpu"])
@pytest.mark.parametrize("of_x", [torch.float32, torch.float16], ids=str)
def test_fake_tensors_of_any_device(device, of_x):
    block = accelerate(official()).layer1[1]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in block.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
        x = torch.empty(2, block.conv1.in_channels, 7, 9, dtype=of_x, device=device)
        out = block(x)
    assert out.shape == (2, block.conv3.out_channels, 7, 9) and out.device.type == device


def test_a_graph_that_guards_every_value(monkeypatch):
    """What is traced before torch 2.13, whose compiler fails on classes in a constant."""
    monkeypatch.setattr(eligibility, "_ONE_GUARD", False)
    monkeypatch.setattr(eligibility, "geometry_named", None)
    torch.compiler.reset()  # graphs of other tests count towards the limit of recompilations
    block = accelerate(official()).layer1[1].eval()
    compiled, x = torch.compile(block, fullgraph=True, backend="eager"), torch.randn(1, block.conv1.in_channels, 7, 9)
    with torch.no_grad():
        assert_close(compiled(x), block(x))
