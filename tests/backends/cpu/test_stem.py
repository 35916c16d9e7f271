"""The native CPU kernels of a network's stem against float64: convolutions with ReLU, and the max pooling behind them."""

import math

import pytest
import torch
import torch.nn.functional as F
from cpu_kernel_cases import each_kernel
from helpers import BOUNDS, HALVES, assert_close, thread_count

from res2net_fused._native import library
from res2net_fused.backends.cpu import stem
from res2net_fused.backends.cpu.settings import operators
from res2net_fused.backends.cpu.stem import StemWeights, in_float64, pack, stem_forward

STATUS = library.cpu_library()
pytestmark = [
    pytest.mark.skipif(not STATUS.loaded, reason=STATUS.reason),
    pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch"),
]
FORMATS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
IMAGENET = [(64, 7, 2, 3)]  # (output channels, kernel, stride, padding), where a pair is of rows and columns
DEEP = [(32, 3, 2, 1), (32, 3, 1, 1), (64, 3, 1, 1)]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def make(channels, convolutions, pools=True, seed=5):
    generator = torch.Generator().manual_seed(seed)
    weights, biases = [], []
    for outputs, kernel, *_ in convolutions:
        depth = channels * math.prod(pair(kernel))
        weights.append(torch.randn(outputs, channels, *pair(kernel), generator=generator) / depth**0.5)
        biases.append(torch.randn(outputs, generator=generator))
        channels = outputs
    strides, paddings = [pair(c[2]) for c in convolutions], [pair(c[3]) for c in convolutions]
    return pack(StemWeights(weights, biases, strides, paddings, pools))


def images(*shape, layout=torch.contiguous_format, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype).contiguous(memory_format=layout)


def check(x, convolutions, pools=True):
    weights = make(x.shape[1], convolutions, pools)
    before, expected = x.clone(), in_float64(x, weights)
    for kernel in each_kernel(["direct"]):
        for channels_last in (True, False):
            out = stem_forward(x, weights, channels_last)
            assert out.dtype == x.dtype and out.shape == weights.sizes(x)[-1], kernel
            assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            assert_close(out, expected)
    assert torch.equal(x, before)


@FORMATS
@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("height,width", [(1, 1), (2, 3), (7, 5), (16, 17), (33, 47)])
def test_imagenet_stems(height, width, pools, layout):
    check(images(2, 3, height, width, layout=layout), IMAGENET, pools)


@FORMATS
@pytest.mark.parametrize("height,width", [(1, 1), (9, 6), (30, 31)])
def test_deep_stems(height, width, layout):
    check(images(1, 3, height, width, layout=layout), DEEP)


@pytest.mark.parametrize("outputs", [1, 5, 8, 16, 23, 24, 40, 56, 100])
@pytest.mark.parametrize("channels", [1, 4, 19])
def test_channels(channels, outputs):
    check(images(2, channels, 9, 26), [(outputs, 3, 2, 1), (outputs + 3, 3, 1, 1)])


@pytest.mark.parametrize(
    "convolution",
    [
        (16, 1, 1, 0), (16, 1, 3, 0), (16, 1, 2, 1), (16, 2, 1, 1), (16, 5, 4, 0), (16, 3, 1, 5), (16, 16, 3, 8),
        (16, (1, 5), (2, 1), (0, 3)), (16, (5, 2), (1, 3), (4, 0)), (16, (3, 7), 2, (1, 3)), (16, 3, 5, 1), (16, 3, 4, 3),
    ],
    ids=str,
)  # fmt: skip
@FORMATS
def test_kernels_strides_and_paddings(convolution, layout):
    for pools in (True, False):
        check(images(2, 3, 19, 14, layout=layout), [convolution, (8, 3, 2, 1)], pools)
        check(images(1, 2, 16, 23, layout=layout), [convolution], pools)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 40])
def test_batches_and_threads(batch, count):
    """Also more threads than there are rows."""
    with thread_count(count):
        check(images(batch, 3, 13, 18), IMAGENET)
        check(images(batch, 3, 11, 9), DEEP)


@pytest.mark.parametrize("convolutions", [IMAGENET, DEEP], ids=["imagenet", "deep"])
@pytest.mark.parametrize("shape", [(1, 3, 91, 45), (3, 3, 17, 30)], ids=str)
def test_the_same_bits_by_any_number_of_threads(convolutions, shape):
    """Rows that another thread takes over, and those around them, which are computed again."""
    x, weights = images(*shape), make(3, convolutions)
    with thread_count(1):
        alone = stem_forward(x, weights, True)
    for count in (2, 4, 8, 16, 32, 64):
        with thread_count(count):
            assert torch.equal(stem_forward(x, weights, True), alone), count


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@FORMATS
def test_half_types_compute_in_fp32(dtype, layout):
    check(images(2, 3, 21, 18, layout=layout, dtype=dtype), IMAGENET)


def test_any_strides():
    wide = images(2, 7, 30, 26)
    check(wide[:, 2:5, 3:25:2, ::3], IMAGENET)
    check(wide.flip(3)[:, :1].expand(2, 3, 30, 26), DEEP)
    check(wide[:0], IMAGENET)


def plainly(x, weights):
    out = x
    for weight, bias, stride, padding in zip(weights.weights, weights.biases, weights.strides, weights.paddings, strict=True):
        out = F.conv2d(out, weight, bias, stride, padding).relu()
    return F.max_pool2d(out, 3, 2, 1) if weights.pools else out


@FORMATS
@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_comes_out_where_pytorch_has_it(value, pools, layout):
    weights = make(3, IMAGENET, pools)
    for place in ((0, 1, 0, 0), (1, 0, 20, 17), (0, 2, 25, 33)):
        x = images(2, 3, 26, 34, layout=layout)
        x[place] = value
        expected = plainly(x, weights)
        assert not expected.isfinite().all()
        for kernel in each_kernel(["direct"]):
            out = stem_forward(x, weights, True)
            assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf()), kernel
            finite = expected.isfinite()
            assert_close(out[finite], expected[finite])


def test_overflow_of_float16_as_pytorch_has_it():
    weights = make(3, IMAGENET)
    x = (images(1, 3, 20, 20) * 3e4).half()
    out, expected = stem_forward(x, weights, True), plainly(x.float(), weights).half()
    assert out.isinf().any() and torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda a: a.update(geometry=a["geometry"][:-1]), "geometry must hold 7 numbers"),
        (lambda a: a.update(packed=a["packed"][:1]), "packed 2 tensors"),
        (lambda a: a["geometry"].__setitem__(1, 17), "at most 16 rows"),
        (lambda a: a["geometry"].__setitem__(3, 0), "strides from 1 on"),
        (lambda a: a["geometry"].__setitem__(2, 6), "weights must be"),
        (lambda a: a["geometry"].__setitem__(0, 65), "weights must be"),
        (lambda a: a["packed"].__setitem__(1, torch.zeros(64)), "bias must be"),
        (lambda a: a.update(x=a["x"][:, :, :0]), "larger than what it reads"),
        (lambda a: a.update(x=a["x"][0]), "four-dimensional"),
        (lambda a: a.update(x=a["x"][:, :2]), "weights must be"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    weights = make(3, [(64, 7, 2, 0)])
    arguments = {"x": images(1, 3, 9, 9), "packed": list(weights.packed), "geometry": list(weights.geometry)}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        operators.cpu_stem_forward.default(**arguments, pools=True, channels_last=True, instruction_set=-1)


def test_kernels_are_compared_with_float64_at_their_first_use(monkeypatch):
    x, weights = images(2, 3, 18, 18), make(3, IMAGENET)
    monkeypatch.setattr(stem, "_compared", {})
    assert stem.why_not_confirmed(x, weights) is None
    monkeypatch.setattr(stem, "_compared", {})
    monkeypatch.setattr(stem, "stem_forward", lambda *arguments: stem_forward(*arguments) * (1 + 20 * BOUNDS[torch.float32]))
    assert "differs from float64" in stem.why_not_confirmed(x, weights)
