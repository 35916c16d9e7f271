"""Arguments that a caller may pass by mistake: each is taken as the reference takes it, or refused by its name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import numpy
import torch
from helpers import Chain, assert_close
from torch import Tensor, nn

from res2net_fused import Bottle2neck, hierarchical_conv1d, hierarchical_conv2d, pack_weights
from res2net_fused.chain import reference
from res2net_fused.chain.config import Chain1dConfig, ChainConfig
from res2net_fused.modules.reference_blocks import bottle2neck

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([torch.randn(16, 7, 9)] * 2)


def second(change: Callable[[Tensor], object]) -> Callable[[list[Tensor]], list[object]]:
    """A list whose second tensor is changed."""
    return lambda values: [values[0], change(values[1]), *values[2:]]


def each(change: Callable[[Tensor], object]) -> Callable[[list[Tensor]], list[object]]:
    return lambda values: [change(value) for value in values]


def quantized(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


TENSORS: dict[str, Callable] = {
    "none": lambda x: None,
    "number": lambda x: 3.0,
    "array": lambda x: numpy.zeros(x.shape),
    "text": lambda x: "x",
    "first image": lambda x: x[0],
    "five dimensions": lambda x: x[None],
    "scalar": lambda x: torch.tensor(1.0),
    "integers": lambda x: x.int(),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "half": lambda x: x.half(),
    "double": lambda x: x.double(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "MKLDNN": lambda x: x.to_mkldnn(),
    "quantized": quantized,
    "parameter": lambda x: nn.Parameter(x),
    "negated": lambda x: torch.complex(x, -x).conj().imag,  # a view whose values are negated as they are read
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape),
}
X = TENSORS | {
    "nested": lambda x: NESTED,
    "channels": lambda x: x[:, :-1],
    "no channels": lambda x: x[:, :0],
    "no rows": lambda x: x[..., :0, :],
    "no columns": lambda x: x[..., :0],
    "no images": lambda x: x[:0],
}
LISTS = {
    **{f"second is {name}": second(change) for name, change in TENSORS.items()},
    **{f"all {name}": each(TENSORS[name]) for name in ("integers", "half", "double", "meta", "sparse", "parameter", "negated")},
    "empty": lambda values: [],
    "none": lambda values: None,
    "tensor": lambda values: values[0],
    "tuple": tuple,
    "generator": lambda values: (value for value in values),
    "dictionary": lambda values: dict(enumerate(values)),
    "text": lambda values: "abc",
    "one less": lambda values: values[:-1],
    "one more": lambda values: [*values, values[0]],
    "second has no values": second(lambda t: t[:0]),
    "second is wider": second(lambda t: torch.cat([t, t])),
}
WEIGHTS = LISTS | {
    "1x1": each(lambda w: w[..., :1]),
    "not square": each(lambda w: w[:3]),
    "no channels": each(lambda w: w[:0, :0]),
    "no taps": each(lambda w: w[..., :0]),
}
NUMBERS = {
    repr(value): (lambda _, value=value: value)
    for value in (0, -1, 2, 3, 1.5, True, None, "2", (2, 2), [], 2**31 - 1, 2**31, 2**63, 10**30, float("nan"), numpy.int64(2))
} | {"tensor": lambda _: torch.tensor(2)}
# Of what takes memory: the largest allowed do not fit.
SIZES = {name: make for name, make in NUMBERS.items() if name not in (repr(2**31 - 1), repr(2**31))} | {"0.5": lambda _: 0.5}
FLAGS = {repr(value): (lambda _, value=value: value) for value in (False, None, 2, 0, "yes", 1.5, [])}


def words(*allowed: object) -> dict[str, Callable]:
    odd = (*allowed, "other", "", None, 3, True, (), [], b"last")
    return {repr(value): (lambda _, value=value: value) for value in odd}


GEOMETRY = {"stride": NUMBERS, "dilation": NUMBERS, "groups": NUMBERS}
PASSTHROUGH = words("none", "first", "first_added")
BACKEND = words("reference", "cpu", "triton", "cuda")
ODD: dict[str, dict[str, dict[str, Callable]]] = {
    "conv2d": {
        "x": X, "weights": WEIGHTS, "biases": LISTS, **GEOMETRY, "hierarchical": FLAGS, "passthrough": PASSTHROUGH,
        "pool": words("avg3", "avg3_nopad"), "activation": words("none", "hardtanh20", "silu"), "backend": BACKEND,
    },
    "packed": {"x": X, "weights": WEIGHTS, "biases": LISTS, **GEOMETRY, "hierarchical": FLAGS, "backend": BACKEND},
    "conv1d": {
        "x": X, "weights": WEIGHTS, "biases": LISTS, "affine_scale": LISTS, "affine_shift": LISTS, "dilation": NUMBERS,
        "passthrough": PASSTHROUGH, "padding_mode": words("zeros", "reflect"), "backend": BACKEND,
    },
    "block": {
        "inplanes": SIZES, "planes": SIZES, "stride": NUMBERS, "baseWidth": SIZES, "scale": SIZES,
        "stype": words("normal", "stage"), "cardinality": SIZES, "dilation": NUMBERS, "passthrough": PASSTHROUGH,
        "backend": BACKEND,
    },
}  # fmt: skip


def right_arguments(operator: str) -> dict[str, object]:
    if operator == "block":
        return dict(inplanes=16, planes=4, stride=1, baseWidth=64, scale=4, stype="normal", cardinality=1, dilation=1,
                    passthrough="last", backend="auto")  # fmt: skip
    x, weights, biases = Chain().tensors(dtype=torch.float32)  # (2, 4*4, 7, 9), three of (4, 4, 3, 3)
    common = {"biases": biases, "dilation": 1, "backend": "auto"}
    if operator == "conv1d":
        affine = {"affine_scale": biases, "affine_shift": biases, "passthrough": "last", "padding_mode": "zeros"}
        return {"x": x[:, :, 0], "weights": [w[..., 0].contiguous() for w in weights], **common, **affine}
    settings = {"stride": 1, "groups": 1, "hierarchical": True}
    if operator == "conv2d":
        settings |= {"passthrough": "last", "pool": None, "activation": "relu"}
    return {"x": x, "weights": weights, **common, **settings}


def run(operator: str, arguments: dict[str, object]) -> tuple[Tensor, Callable[[], Tensor]]:
    """The result, and what makes that of the reference in float64."""
    rest = dict(arguments)
    backend = rest.pop("backend")
    if operator == "block":
        block = Bottle2neck(**arguments)
        block.downsample = nn.Conv2d(block.conv1.in_channels, block.conv3.out_channels, 1, arguments["stride"])
        block = block.double().eval()
        x = torch.randn(2, block.conv1.in_channels, 5, 6, dtype=torch.float64)
        block._res2net_fused.backend = "auto"  # the others have no float64
        return block(x), lambda: bottle2neck(block, x, block.chain_config)
    lists = [rest.pop(name) for name in ("x", "weights", "biases", "affine_scale", "affine_shift") if name in rest]

    def exact() -> Tensor:
        x, *others = [t.double() if isinstance(t, Tensor) else t and [v.double() for v in t] for t in lists]
        if operator == "conv1d":
            return reference.hierarchical_conv1d(x, *others, Chain1dConfig(**rest).clamped_to(x.shape[2]))
        return reference.hierarchical_conv2d(x, *others, ChainConfig(**rest))

    if operator == "conv1d":
        return hierarchical_conv1d(*lists, **rest, backend=backend), exact
    if operator == "conv2d":
        return hierarchical_conv2d(*lists, **rest, backend=backend), exact
    x, *weights = lists
    packed = pack_weights(*weights, **{name: rest[name] for name in GEOMETRY}, backend=backend)
    with torch.no_grad():
        return hierarchical_conv2d(x, packed, hierarchical=rest["hierarchical"], backend=backend), exact


def check(operator: str, given: dict[str, str]) -> None:
    arguments = right_arguments(operator)
    for name, odd in given.items():
        arguments[name] = ODD[operator][name][odd](arguments[name])
    try:
        out, exact = run(operator, arguments)
    except (TypeError, ValueError) as error:
        named = any(re.search(rf"\b{name}\b", str(error)) for name in given)
        assert named, f"{type(error).__name__} names none of {given}: {error}"
    except RuntimeError as error:
        assert "backend" in given and f"backend={arguments['backend']!r} cannot run" in str(error), f"{given}: {error}"
    else:
        if out.device.type == "cpu":
            assert_close(out, exact())
