"""How random cases are drawn. The simplest values stand first: a case that fails is made as simple as it can be."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from memory_layouts import LAYOUTS

from fuzz.cases import BlockCase, CallCase, ChainCase, RowsCase
from fuzz.odd import ODD
from res2net_fused.chain.config import POOLS

DTYPES = ("float32", "float16", "bfloat16", "float64")
MAX_PRODUCTS = 1e6  # of one call, which is made over and over: forward and backward, plain and packed, by every kernel
FAR = 2**31 - 1

seeds = st.integers(0, 999)
threads = st.sampled_from([1, 2, 3])
layouts = st.sampled_from(["nhwc", *(name for name in LAYOUTS if name != "nhwc")])
weight_layouts = st.sampled_from(["nchw", "nchw", *LAYOUTS])
gradients = st.sampled_from(["none", "none", *LAYOUTS])
steps = st.one_of(st.integers(1, 4), st.integers(1, 12))
batches = st.sampled_from([1, 2, 3, 5, 0])


def sides(most: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(1, 3), st.integers(1, 23), st.integers(1, most))


def fitting(batch: int, height: int, width: int, products: int, most: float = MAX_PRODUCTS) -> tuple[int, int, int]:
    """Not more pixels than are checked in a moment, with so many products for each."""
    while batch * height * width * products > most and (batch > 1 or height > 1 or width > 1):
        if batch > 1:
            batch -= 1
        elif height >= width:
            height = (height + 1) // 2
        else:
            width = (width + 1) // 2
    return batch, height, width


@st.composite
def chain_settings(draw) -> dict[str, object]:
    stride = draw(st.sampled_from([1, 1, 1, 2, 3, FAR]))
    passthrough = draw(st.sampled_from(["last", "none", "first", "first_added"]))
    hierarchical = stride == 1 and (passthrough == "first_added" or draw(st.booleans()))
    if passthrough == "first_added" and not hierarchical:
        passthrough = "first"
    pools = [None] if passthrough == "none" else list(POOLS[1:]) if stride > 1 else [None, *POOLS]
    return {
        "stride": stride, "dilation": draw(st.sampled_from([1, 1, 1, 2, 3, 17, FAR])), "hierarchical": hierarchical,
        "passthrough": passthrough, "pool": draw(st.sampled_from(pools)),
        "activation": draw(st.sampled_from(["relu", "relu", "none", "hardtanh20", "relu6", "leaky_relu:0.2", "silu", "gelu"])),
    }  # fmt: skip


@st.composite
def chains(draw, finite: bool = False, most_channels: int = 300, most_products: float = MAX_PRODUCTS) -> ChainCase:
    """finite: without NaN, Inf and gradients."""
    settings, groups, count = draw(chain_settings()), draw(st.sampled_from([1, 1, 1, 2, 3])), draw(steps)
    per_group = st.one_of(st.integers(1, 9), st.integers(1, 40), st.integers(1, 120), st.just(most_channels))
    width = groups * min(draw(per_group), max(1, most_channels // groups))
    count = int(max(1, min(count, most_products * groups // (36 * width * width))))
    pixels = draw(batches), draw(sides(60)), draw(sides(200))
    values = "finite" if finite else draw(st.sampled_from(["finite", "finite", "finite", "nan", "inf", "-inf"]))
    return ChainCase(
        settings | {"groups": groups}, count, width, fitting(*pixels, 9 * count * width * width // groups, most_products),
        draw(st.sampled_from(DTYPES)), draw(layouts), draw(weight_layouts), draw(st.sampled_from(["same", "none", "float32"])),
        values, "none" if finite or values != "finite" else draw(gradients), draw(threads), draw(seeds),
    )  # fmt: skip


@st.composite
def rows(draw) -> RowsCase:
    kernel, dilation, count = draw(st.sampled_from([3, 1, 5, 7])), draw(st.sampled_from([1, 1, 2, 3, 5, FAR])), draw(steps)
    length, width = draw(st.one_of(sides(60), st.integers(1, 700))), draw(st.one_of(st.integers(1, 9), st.integers(1, 130)))
    reflects = draw(st.booleans()) and length > dilation * (kernel // 2)
    settings = {
        "dilation": dilation, "padding_mode": "reflect" if reflects else "zeros",
        "passthrough": draw(st.sampled_from(["last", "none", "first", "first_added"])),
    }  # fmt: skip
    count = int(max(1, min(count, MAX_PRODUCTS // (4 * kernel * width * width))))
    batch, *_ = fitting(draw(batches), 1, length, kernel * count * width * width)
    dtype, values = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["finite", "finite", "nan", "inf", "-inf"]))
    if dtype in ("float16", "bfloat16"):
        values = "finite"  # PyTorch's own convolution makes NaN of -Inf there
    differentiates = dtype == "float64" and values == "finite"
    return RowsCase(
        settings, count, width, kernel, (batch, length), dtype, draw(layouts), draw(weight_layouts),
        draw(st.sampled_from(["all", "none", "biases", "affine"])), values, draw(gradients) if differentiates else "none",
        draw(threads), draw(seeds),
    )  # fmt: skip


@st.composite
def blocks(draw) -> BlockCase:
    stage, scale = draw(st.booleans()), draw(st.integers(1, 12))
    planes, cardinality = draw(st.one_of(st.integers(1, 9), st.integers(1, 40))), draw(st.sampled_from([1, 1, 1, 2, 3]))
    arguments = {
        "planes": planes, "baseWidth": draw(st.sampled_from([64, 32, 100, 128])), "scale": scale, "cardinality": cardinality,
        "dilation": draw(st.sampled_from([1, 1, 2, 3])), "stype": "stage" if stage else "normal",
        "stride": draw(st.sampled_from([1, 2, 3])) if stage else 1,
        "passthrough": draw(st.sampled_from(["last", "none", "first", "first_added"])),
    }  # fmt: skip
    if planes * arguments["baseWidth"] < 64:
        arguments["baseWidth"] = 64
    inplanes = draw(st.one_of(st.integers(1, 9), st.integers(1, 90)))
    downsample = draw(st.sampled_from(["conv", "pool"])) if arguments["stride"] > 1 else draw(st.sampled_from(["none", "conv"]))
    width = planes * arguments["baseWidth"] // 64 * cardinality
    products = scale * (9 * width * width // cardinality + width * (8 * planes + inplanes))
    dtype = draw(st.sampled_from(DTYPES))
    shape = fitting(draw(batches), draw(sides(30)), draw(sides(60)), products)
    return BlockCase(
        arguments, inplanes, shape, dtype, downsample, draw(st.booleans()), draw(layouts),
        draw(gradients) if dtype == "float64" else "none", draw(threads), draw(seeds),
    )  # fmt: skip


@st.composite
def calls(draw) -> CallCase:
    operator = draw(st.sampled_from(list(ODD)))
    names = draw(st.lists(st.sampled_from(list(ODD[operator])), min_size=1, max_size=3, unique=True))
    return CallCase(operator, {name: draw(st.sampled_from(list(ODD[operator][name]))) for name in names})


# Cases take as long as they take, and what was found is kept in the corpus.
UNHURRIED = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
STRATEGIES = {"chain": chains(), "rows": rows(), "block": blocks(), "call": calls()}
