"""The drop-in block: its contract with the published and timm's class, train and eval, gradients, dtypes, errors."""

import copy
import inspect

import pytest
import torch
from helpers import (
    BOUNDS,
    DEVICES,
    HALVES,
    Chain,
    SqueezeExcite,
    assert_close,
    randomize,
    relative_error,
    runnable_backends,
    timm_or_skip,
)
from official_style import Bottle2neck as OfficialBottle2neck
from torch import nn

from res2net_fused import Bottle2neck, explain
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

devices = pytest.mark.parametrize("device", DEVICES)


def shortcut(inplanes, outplanes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


# name: (positional arguments after inplanes, keywords)
BLOCKS = {
    "normal": ((8,), {}),  # groups of 3 channels
    "even": ((16,), {}),  # of 6, which the CUDA kernels run in half precision
    "s2": ((8,), {"baseWidth": 32, "scale": 2}),
    "s3": ((8,), {"scale": 3}),
    "s8": ((8,), {"baseWidth": 14, "scale": 8}),
    "s1": ((8,), {"baseWidth": 64, "scale": 1}),
    "next": ((16,), {"baseWidth": 8, "cardinality": 4}),
    "dilated": ((8,), {"dilation": 2}),
    "first": ((8,), {"passthrough": "first"}),
    "first_added": ((8,), {"passthrough": "first_added"}),
    "none": ((8,), {"passthrough": "none"}),
    "stage1": ((8, 1), {"stype": "stage"}),
    "stage2": ((8, 2), {"stype": "stage"}),
    "stage2_first": ((8, 2), {"stype": "stage", "passthrough": "first"}),
    "stage2_s1": ((8, 2), {"stype": "stage", "scale": 1, "baseWidth": 64}),
    "se": ((8,), {"attn_layer": SqueezeExcite}),
}


def build(name, cls=Bottle2neck, **more):
    arguments, keywords = BLOCKS[name]
    planes, stride = (*arguments, 1)[:2]
    stage = keywords.get("stype") == "stage"
    inplanes = 12 if stage else planes * 4
    downsample = shortcut(inplanes, planes * 4, stride) if stage else None
    return randomize(cls(inplanes, planes, stride, downsample, **keywords, **more))


def like(block, cls):
    """The same block of class ReferenceBottle2neck, with the same tensors."""
    twin = copy.deepcopy(block)
    twin.__class__ = cls
    return twin


def sample(block, shape=(2, 7, 9), **kwargs):
    return torch.randn(shape[0], block.conv1.in_channels, *shape[1:], **kwargs)


all_blocks = pytest.mark.parametrize("name", BLOCKS)


# Contract -------------------------------------------------------------------------------------------------------------


def test_positional_signature_is_the_published_one():
    ours = list(inspect.signature(Bottle2neck).parameters.values())
    published = list(inspect.signature(OfficialBottle2neck).parameters.values())
    for a, b in zip(ours, published, strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    rest = ours[len(published) :]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in rest)
    assert [p.name for p in rest[:4]] == ["cardinality", "dilation", "passthrough", "backend"]
    assert Bottle2neck.expansion == OfficialBottle2neck.expansion == 4


@pytest.mark.parametrize("stype", ["normal", "stage"])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_attributes_and_state_dict_are_the_published_ones(stype, scale):
    arguments = (16, 8, 2, shortcut(16, 32, 2), 26, scale, "stage") if stype == "stage" else (32, 8, 1, None, 26, scale)
    ours, official = Bottle2neck(*arguments), OfficialBottle2neck(*arguments)
    for attribute in ("nums", "scale", "width", "stype", "expansion"):
        assert getattr(ours, attribute) == getattr(official, attribute)
    for attribute in ("conv1", "bn1", "convs", "bns", "conv3", "bn3", "relu"):
        assert repr(getattr(ours, attribute)) == repr(getattr(official, attribute))
    assert hasattr(ours, "pool") == hasattr(official, "pool") and hasattr(ours, "downsample")
    mine, theirs = ours.state_dict(), official.state_dict()
    assert list(mine) == list(theirs)
    assert [v.shape for v in mine.values()] == [v.shape for v in theirs.values()]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("stype", "stride"), [("normal", 1), ("stage", 1), ("stage", 2)])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_published_weights_load_and_give_the_published_result(scale, stype, stride, training):
    downsample = shortcut(32, 32, stride) if stype == "stage" else None
    arguments = (32, 8, stride, downsample, 26, scale, stype)
    official = randomize(OfficialBottle2neck(*arguments).double()).train(training)
    ours = Bottle2neck(*copy.deepcopy(arguments)).double().train(training)
    assert ours.load_state_dict(official.state_dict()) == ([], [])
    x = sample(ours, dtype=torch.float64)
    assert_close(ours(x), official(x))
    for (key, a), b in zip(ours.state_dict().items(), official.state_dict().values(), strict=True):
        assert torch.equal(a, b) or relative_error(a, b) < 1e-12, key


@pytest.mark.parametrize("stride_and_shortcut", [(1, False), (1, True), (2, True)], ids=str)
def test_timms_keywords_and_result(stride_and_shortcut):
    res2net = timm_or_skip().models.res2net
    stride, has_shortcut = stride_and_shortcut
    keywords = dict(cardinality=2, base_width=16, scale=4, dilation=2, first_dilation=1, norm_layer=nn.BatchNorm2d,
                    act_layer=nn.ReLU, attn_layer=None, drop_block=None, drop_path=None)  # fmt: skip
    downsample = shortcut(32, 32, stride) if has_shortcut else None
    theirs = randomize(res2net.Bottle2neck(32, 8, stride, downsample, **keywords).double()).eval()
    ours = Bottle2neck(32, 8, stride, copy.deepcopy(downsample), **keywords).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = sample(ours, dtype=torch.float64)
    assert_close(ours(x), theirs(x))
    assert explain(ours)[0].fused


def test_as_the_block_of_timms_resnet():
    timm = timm_or_skip()
    arguments = dict(layers=(1, 1, 1, 1), base_width=26, block_args=dict(scale=4), num_classes=7)
    theirs = randomize(timm.models.resnet.ResNet(timm.models.res2net.Bottle2neck, **arguments)).eval()
    ours = timm.models.resnet.ResNet(Bottle2neck, **arguments).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double())
        assert relative_error(ours(x), exact) <= 4 * relative_error(theirs(x), exact)


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@devices
@all_blocks
def test_eval_against_float64(name, device, dtype, layout):
    block = build(name).eval().to(device, dtype)
    x = sample(block).to(device, dtype).contiguous(memory_format=layout)
    before = x.clone()
    reference = like(block, ReferenceBottle2neck).double()
    with torch.no_grad():
        expected = reference(x.double())
        eager = relative_error(like(block, ReferenceBottle2neck)(x), expected)
        chain = Chain(vars(block.chain_config), len(block.convs), block.width)
        for backend in ["auto", *runnable_backends(device, dtype, chain)]:
            fused = build(name, backend=backend).eval().to(device, dtype)
            fused.load_state_dict(block.state_dict())
            for _ in range(2):  # folding, and from the cache
                out = fused(x)
                assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
                assert_close(out, expected, None if dtype != torch.float64 else 1e-12)
                if dtype in HALVES:
                    assert relative_error(out, expected) <= 2 * eager
            assert explain(fused)[0].fused
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 7, 9), (1, 1, 1), (3, 1, 6), (2, 5, 1)], ids=str)
@pytest.mark.parametrize("name", ["normal", "stage2", "s1", "se"])
def test_odd_sizes(name, shape):
    block = build(name).double().eval()
    x = sample(block, shape, dtype=torch.float64)
    with torch.no_grad():
        expected = like(block, ReferenceBottle2neck)(x)
        assert_close(block(x), expected)
    assert_close(block(x), expected)  # with gradients on


@all_blocks
def test_training_mode_in_float64(name):
    block = build(name).double().train()
    twin = like(block, ReferenceBottle2neck)
    x = sample(block, dtype=torch.float64)
    outs = []
    for module in (block, twin):
        out = module(x)
        out.square().sum().backward()
        outs.append(out)
    assert explain(block)[0].fused
    assert_close(*outs, 1e-12)
    for a, b in zip(block.buffers(), twin.buffers(), strict=True):
        assert_close(a, b, 1e-14)
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-10)


@all_blocks
def test_gradients_in_eval_mode(name):
    """Folding is differentiable: every parameter, BatchNorm's too, and x."""
    block = build(name).double().eval()
    twin = like(block, ReferenceBottle2neck)
    x = sample(block, dtype=torch.float64).requires_grad_()
    got = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    expected = torch.autograd.grad(twin(x).square().sum(), [x, *twin.parameters()])
    for (key, _), a, b in zip([("x", x), *block.named_parameters()], got, expected, strict=True):
        assert relative_error(a, b) < 1e-11, key
    assert explain(block)[0].fused


def test_gradients_with_frozen_parameters_reach_x():
    block = build("normal").double().eval().requires_grad_(False)
    x = sample(block, dtype=torch.float64)
    with torch.no_grad():
        block(x)  # fills the cache
    x.requires_grad_()
    got = torch.autograd.grad(block(x).sum(), x)[0]
    assert_close(got, torch.autograd.grad(like(block, ReferenceBottle2neck)(x).sum(), x)[0], 1e-11)


def test_gradients_of_weights_that_are_no_parameters():
    """DataParallel's replicas, FSDP's views and hypernetworks hold plain tensors where parameters were."""
    block = build("normal").double().eval().requires_grad_(False)
    x = sample(block, dtype=torch.float64)
    with torch.no_grad():
        block(x)
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    weight = block.convs[1].weight.detach()
    twin = like(block, ReferenceBottle2neck)
    gradients = []
    for module in (block, twin):
        del module.convs[1].weight
        module.convs[1].weight = weight * factor
        out = module(x).square().sum()
        assert out.requires_grad
        gradients.append(torch.autograd.grad(out, factor)[0])
    assert_close(*gradients, 1e-11)


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["normal", "stage2", "se"])
def test_autocast(name, gradients):
    block = build(name).eval()
    twin = like(block, ReferenceBottle2neck)
    x = sample(block)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        out, eager = block(x), twin(x)
    assert out.dtype == eager.dtype == torch.bfloat16
    exact = twin.double()(x.double())
    assert relative_error(out, exact) <= min(2 * relative_error(eager, exact), BOUNDS[torch.bfloat16])
    if gradients:
        out.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def test_autocast_and_full_precision_in_turn():
    block = build("normal").eval()
    twin = like(block, ReferenceBottle2neck).double()
    x = sample(block)
    with torch.no_grad():
        exact = twin(x.double())
        for _ in range(2):
            assert_close(block(x), exact)
            with torch.autocast("cpu", torch.bfloat16):
                assert_close(block(x), exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fp32_batchnorms_beside_half_convolutions(dtype):
    """Norms stay fp32, which is how mixed-precision tools leave a model."""
    block = build("normal").eval()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    x = sample(block).to(dtype)
    with torch.no_grad():
        exact = like(block, ReferenceBottle2neck).double()(x.double())
        assert block(x).dtype == dtype
        assert_close(block(x), exact)


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("given", [torch.float64, torch.float16], ids=str)
def test_x_of_another_dtype_is_an_error_not_a_cast(given, gradients):
    block = build("normal").eval()
    with torch.set_grad_enabled(gradients), pytest.raises((RuntimeError, TypeError, ValueError)):
        block(sample(block).to(given))


def test_float_conv_bias_folds():
    block = build("normal").double().eval()
    block.convs[0].bias = nn.Parameter(torch.randn(block.width, dtype=torch.float64))
    block.conv1.bias = nn.Parameter(torch.randn(block.conv1.out_channels, dtype=torch.float64))
    x = sample(block, dtype=torch.float64)
    with torch.no_grad():
        assert_close(block(x), like(block, ReferenceBottle2neck)(x))


def test_batchnorm_without_affine_parameters_folds():
    block = build("normal", norm_layer=lambda c: nn.BatchNorm2d(c, affine=False, eps=0.1)).double().eval()
    x = sample(block, dtype=torch.float64)
    with torch.no_grad():
        assert_close(block(x), like(block, ReferenceBottle2neck)(x))
    assert explain(block)[0].fused


NOT_FUSED = {
    "group_norm": ({"norm_layer": lambda c: nn.GroupNorm(1, c)}, "GroupNorm"),
    "elu": ({"act_layer": nn.ELU}, "activation ELU is not fused"),
    "silu": ({"act_layer": nn.SiLU}, "in channels-last only"),
}


@pytest.mark.parametrize(("keywords", "reason"), NOT_FUSED.values(), ids=NOT_FUSED.keys())
def test_what_cannot_be_folded_runs_as_it_is(keywords, reason):
    block = build("normal", **keywords).eval()
    x = sample(block)
    with torch.no_grad():
        assert torch.equal(block(x), like(block, ReferenceBottle2neck)(x))
    (report,) = explain(block)
    assert report.fused is False and reason in report.reason


# Bad input ------------------------------------------------------------------------------------------------------------

BAD = {
    "scale": (dict(scale=0), ValueError, ["scale is 0", "at least 1"]),
    "scale_negative": (dict(scale=-2), ValueError, ["scale is -2", "at least 1"]),
    "scale_float": (dict(scale=4.0), TypeError, ["scale is 4.0", "int"]),
    "planes": (dict(planes=0), ValueError, ["planes is 0", "at least 1"]),
    "inplanes": (dict(inplanes=0), ValueError, ["inplanes is 0", "at least 1"]),
    "cardinality": (dict(cardinality=0), ValueError, ["cardinality is 0", "at least 1"]),
    "stride": (dict(stride=0, stype="stage"), ValueError, ["stride is 0", "at least 1"]),
    "dilation": (dict(dilation=0), ValueError, ["dilation", "at least 1"]),
    "width": (dict(baseWidth=1), ValueError, ["baseWidth is 1", "planes=8"]),
    "stype": (dict(stype="first"), ValueError, ["stype is 'first'", "'normal'", "'stage'"]),
    "stride_normal": (dict(stride=2), ValueError, ["stride is 2", "'normal'", "stype='stage'"]),
    "passthrough": (dict(passthrough="all"), ValueError, ["passthrough is 'all'", "'last'"]),
    "backend": (dict(backend="mps"), ValueError, ["backend is 'mps'", "'reference'"]),
    "keyword": (dict(widht=26), TypeError, ["widht"]),
    "drop_block": (dict(drop_block=nn.Dropout), ValueError, ["drop_block"]),
}


@pytest.mark.parametrize(("given", "error", "said"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(given, error, said):
    with pytest.raises(error) as caught:
        Bottle2neck(**({"inplanes": 32, "planes": 8} | given))
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
def test_x_with_the_wrong_channels(gradients):
    block = build("normal").eval()
    with torch.set_grad_enabled(gradients), pytest.raises((ValueError, RuntimeError), match="31"):
        block(torch.randn(2, 31, 7, 9))
