"""The reference against the published formula, written out here in sums over pixels, channels and taps, in float64."""

import pytest
import torch
from helpers import CHAINS, Chain, assert_close, chains, randomize
from torch import nn

from res2net_fused.chain.reference import hierarchical_conv2d
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck


def convolve(x, weight, bias, stride, dilation, groups):
    """sum over taps and channels; padding = dilation."""
    n, _, h, w = x.shape
    rows, columns = (h - 1) // stride + 1, (w - 1) // stride + 1
    padded = x.new_zeros(n, x.shape[1], h + 2 * dilation, w + 2 * dilation)
    padded[:, :, dilation : dilation + h, dilation : dilation + w] = x
    out_channels, in_channels = weight.shape[:2]
    out = x.new_zeros(n, out_channels, rows, columns)
    for o in range(out_channels):
        first = o // (out_channels // groups) * in_channels
        for c in range(in_channels):
            for r in range(3):
                for q in range(3):
                    top, left = r * dilation, q * dilation
                    window = padded[:, first + c, top : top + h : stride, left : left + w : stride]
                    out[:, o] += weight[o, c, r, q] * window
        if bias is not None:
            out[:, o] += bias[o]
    return out


def average(x, stride, count_padding):
    """The mean over the 3x3 neighbours; of nine with the padding counted, else of those inside."""
    _, _, h, w = x.shape
    rows, columns = (h - 1) // stride + 1, (w - 1) // stride + 1
    out = x.new_zeros(*x.shape[:2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            inside = [
                (r, q)
                for r in range(i * stride - 1, i * stride + 2)
                for q in range(j * stride - 1, j * stride + 2)
                if 0 <= r < h and 0 <= q < w
            ]
            out[:, :, i, j] = sum(x[:, :, r, q] for r, q in inside) / (9 if count_padding else len(inside))
    return out


def clamp(y, activation):
    if activation == "relu":
        return torch.where(y > 0, y, torch.zeros_like(y))
    if activation == "hardtanh20":
        return torch.where(y > 20, torch.full_like(y, 20), torch.where(y > 0, y, torch.zeros_like(y)))
    if activation == "relu6":
        return torch.where(y > 6, torch.full_like(y, 6), torch.where(y > 0, y, torch.zeros_like(y)))
    if activation == "leaky_relu:0.2":
        return torch.where(y > 0, y, 0.2 * y)
    return y


def published_chain(x, convolutions, passthrough, hierarchical, pool):
    """y_1 ... y_s by the equations, groups counted from 1; `convolutions` are K_i in the order of their groups."""
    s = len(convolutions) + (passthrough != "none")
    x = dict(enumerate(x.chunk(s, 1), start=1))
    y = {}
    if passthrough in ("last", "none"):
        for i, K in enumerate(convolutions, start=1):
            y[i] = K(x[i] + y[i - 1]) if hierarchical and i > 1 else K(x[i])
        if passthrough == "last":
            y[s] = pool(x[s])
    else:
        y[1] = pool(x[1])
        for i, K in enumerate(convolutions, start=2):
            adds = hierarchical and (i > 2 or passthrough == "first_added")
            y[i] = K(x[i] + y[i - 1]) if adds else K(x[i])
    return torch.cat([y[i] for i in range(1, s + 1)], 1)


def published(x, weights, biases, *, stride=1, dilation=1, groups=1, hierarchical=True, passthrough="last", pool=None,
              activation="relu"):  # fmt: skip
    def convolution(weight, bias):
        return lambda u: clamp(convolve(u, weight, bias, stride, dilation, groups), activation)

    pools = {
        None: lambda t: t,
        "avg3": lambda t: average(t, stride, True),
        "avg3_nopad": lambda t: average(t, stride, False),
        "max3": lambda t: (
            nn.functional.pad(t, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, stride).unfold(3, 3, stride).amax((4, 5))
        ),
    }
    convolutions = [convolution(w, None if biases is None else biases[i]) for i, w in enumerate(weights)]
    return published_chain(x, convolutions, passthrough, hierarchical, pools[pool])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@chains
def test_chain(chain, bias):
    x, weights, biases = chain.tensors((2, 6, 5), bias=bias)
    out = hierarchical_conv2d(x, weights, biases, chain.config)
    assert out.dtype == torch.float64
    assert_close(out, published(x, weights, biases, **chain.settings))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 4), (1, 5, 1), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["last", "stage_stride2", "stage_stride2_nopad", "dilated", "first"])
def test_chain_at_the_smallest_sizes(name, shape):
    chain = CHAINS[name]
    x, weights, biases = chain.tensors(shape)
    assert_close(hierarchical_conv2d(x, weights, biases, chain.config), published(x, weights, biases, **chain.settings))


def test_hardtanh_case_reaches_both_ends():
    chain = CHAINS["hardtanh"]
    x, weights, biases = chain.tensors()
    out = hierarchical_conv2d(x, weights, biases, chain.config)[:, : chain.steps * chain.width]
    assert (out == 0).any() and (out == 20).any() and ((out > 0) & (out < 20)).any()


def test_the_four_passthroughs_differ():
    """The table's point: one set of weights, several results."""
    results = {}
    for kind in ("last", "first", "first_added"):
        x, weights, biases = Chain({"passthrough": kind}).tensors()
        results[kind] = hierarchical_conv2d(x, weights, biases, Chain({"passthrough": kind}).config)
    for a, b in (("last", "first"), ("last", "first_added"), ("first", "first_added")):
        assert (results[a] - results[b]).norm() > 0.1 * results[a].norm()


def normalize(z, bn, training):
    """BatchNorm by its definition; in training the statistics are the batch's, with the biased variance."""
    if training:
        mean = z.mean((0, 2, 3))
        var = ((z - mean.reshape(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
    else:
        mean, var = bn["running_mean"], bn["running_var"]
    scale = bn["weight"] / torch.sqrt(var + 1e-5)
    return z * scale.reshape(1, -1, 1, 1) + (bn["bias"] - mean * scale).reshape(1, -1, 1, 1)


def published_block(x, state, *, scale, stype, stride, dilation=1, groups=1, passthrough="last", training=False):
    """The whole bottleneck from its state_dict."""

    def bn(name, z):
        own = {key: state[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
        return normalize(z, own, training)

    def pointwise(t, weight):
        return torch.einsum("nchw,oc->nohw", t, weight[:, :, 0, 0])

    def convolution(i):
        weight = state[f"convs.{i}.weight"]
        return lambda u: clamp(bn(f"bns.{i}", convolve(u, weight, None, stride, dilation, groups)), "relu")

    steps = sum(key.startswith("convs.") for key in state)
    stage = stype == "stage"
    out = clamp(bn("bn1", pointwise(x, state["conv1.weight"])), "relu")
    pool = (lambda t: average(t, stride, True)) if stage else (lambda t: t)
    out = published_chain(out, [convolution(i) for i in range(steps)], passthrough, not stage, pool)
    out = bn("bn3", pointwise(out, state["conv3.weight"]))
    shortcut = x
    if "downsample.0.weight" in state:
        shortcut = bn("downsample.1", pointwise(x[:, :, ::stride, ::stride], state["downsample.0.weight"]))
    return clamp(out + shortcut, "relu")


BLOCKS = {
    "normal": {"stype": "normal", "stride": 1, "scale": 4},
    "normal_first": {"stype": "normal", "stride": 1, "scale": 3, "passthrough": "first"},
    "normal_first_added": {"stype": "normal", "stride": 1, "scale": 3, "passthrough": "first_added"},
    "normal_none": {"stype": "normal", "stride": 1, "scale": 3, "passthrough": "none"},
    "normal_dilated": {"stype": "normal", "stride": 1, "scale": 3, "dilation": 2},
    "stage1": {"stype": "stage", "stride": 1, "scale": 4},
    "stage2": {"stype": "stage", "stride": 2, "scale": 4},
    "stage2_groups": {"stype": "stage", "stride": 2, "scale": 3, "groups": 2},
    "stage2_first": {"stype": "stage", "stride": 2, "scale": 3, "passthrough": "first"},
    "s1": {"stype": "normal", "stride": 1, "scale": 1},
    "s1_stage": {"stype": "stage", "stride": 2, "scale": 1},
    "s2": {"stype": "normal", "stride": 1, "scale": 2},
}


def reference_block(stype, stride, scale, groups=1, **settings):
    stage = stype == "stage"
    inplanes = 12 if stage else 16
    downsample = None
    if stage:
        downsample = nn.Sequential(nn.Conv2d(inplanes, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    block = ReferenceBottle2neck(inplanes, 4, stride, downsample, 32, scale, stype, cardinality=groups, **settings)
    return randomize(block.double())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("settings", BLOCKS.values(), ids=BLOCKS.keys())
def test_block(settings, training):
    block = reference_block(**settings).train(training)
    x = torch.randn(3, block.conv1.in_channels, 5, 6, dtype=torch.float64)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    arguments = {"passthrough": "none"} if settings["scale"] == 1 else {}
    expected = published_block(x, state, training=training, **settings | arguments)
    assert_close(block(x), expected)


def test_train_mode_moves_the_running_statistics():
    block = reference_block("normal", 1, 4).train()
    x = torch.randn(3, 16, 5, 6, dtype=torch.float64)
    before = block.bn1.running_mean.clone()
    z = torch.einsum("nchw,oc->nohw", x, block.conv1.weight[:, :, 0, 0])
    block(x)
    assert_close(block.bn1.running_mean, 0.9 * before + 0.1 * z.mean((0, 2, 3)))


@pytest.mark.parametrize("name", CHAINS)
def test_the_walk_meets_every_group_but_the_passed_one(name):
    config, steps = CHAINS[name].config, CHAINS[name].steps
    walk, passed = config.convolutions(steps), config.passed_group(config.scale(steps))
    assert [c.k for c in walk] == list(range(steps))
    assert sorted({c.group for c in walk} | {passed} - {None}) == list(range(config.scale(steps)))
    assert [c.feeds_next for c in walk] == [*(c.chained for c in walk[1:]), False]
    assert all(c.adds == (c.chained or (c.k == 0 and config.adds_passed)) for c in walk)
