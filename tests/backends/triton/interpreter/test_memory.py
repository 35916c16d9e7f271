"""Where x lies, where out lies, and what lies beside them: strides, padding, NaN and Inf in the neighbourhood."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, make_case, poison_new_memory

from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.triton.kernels.common import GroupView
from res2net_fused.backends.triton.kernels.conv3x3_fwd import chain_calls
from res2net_fused.backends.triton.step_plan import plan_steps
from res2net_fused.chain import reference
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.memory_format import memory_format

NAN, INF = float("nan"), float("inf")


def _wider(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((x.shape[0], x.shape[1] + 5, *x.shape[2:]), NAN, dtype=x.dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def _cropped(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:2], x.shape[2] + 2, x.shape[3] + 3), NAN, dtype=x.dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, :, 1:-1, 2:-1] = x
    return wide[:, :, 1:-1, 2:-1]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "slice of wider channels": _wider,
    "slice of wider contiguous channels": lambda x: torch.cat([x, x], 1).contiguous()[:, x.shape[1] :],
    "cropped": _cropped,
    "every second pixel": lambda x: x.repeat_interleave(2, 3).contiguous(memory_format=torch.channels_last)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3),
    "one image for all": lambda x: x[:1].expand(3, -1, -1, -1),
    "one pixel for all": lambda x: x[:, :, :1, :1].expand(-1, -1, 4, 5),
    "one channel for all": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", [False, True])
def test_layout_of_x(layout, stage) -> None:
    config = ChainConfig(stride=2, pool="avg3", hierarchical=False) if stage else ChainConfig()
    case = make_case(config)
    case.x = LAYOUTS[layout](case.x)
    out = case.check()
    assert out.is_contiguous(memory_format=memory_format(case.x))


@pytest.mark.parametrize("size", [(1, 1), (1, 5)])
def test_layout_where_both_formats_fit(size) -> None:
    case = make_case(size=size)
    case.x = case.x.contiguous()
    assert case.check().is_contiguous()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("width", [5, 17])
@pytest.mark.parametrize("activation", ["relu", "hardtanh20", "none"])
def test_not_finite_values_go_where_they_belong(value, width, activation) -> None:
    case = make_case(ChainConfig(activation=activation), width=width, scale=4, size=(9, 8), batch=1)
    case.x[0, width + 1, 4, 3] = value
    case.x[0, 3 * width + 2, 0, 0] = value  # in the group that passes through
    out, exact = case.run(), case.reference()
    assert torch.equal(out.isnan(), exact.isnan())
    assert not exact[:, 3 * width :].isfinite().all()
    assert torch.equal(out == INF, exact == INF) and torch.equal(out == -INF, exact == -INF)
    finite = exact.isfinite()
    assert error(out[finite], exact[finite]) <= 5e-6


@pytest.mark.parametrize("channels", [3, 8, 17])
@pytest.mark.parametrize("hierarchical", [True, False])
def test_not_finite_values_stay_in_their_convolution_group(channels, hierarchical) -> None:
    config = ChainConfig(groups=2, hierarchical=hierarchical)
    case = make_case(config, width=2 * channels, size=(3, 4), batch=1)
    clean = case.run()
    case.x[0, [channels, 3 * channels, 5 * channels], 1, 2] = torch.tensor([NAN, INF, NAN])  # second group of each slot
    out = case.run().unflatten(1, (3, 2, channels))  # (N, s, groups, w/groups, H, W)
    assert out[:, :, 1].isnan().any()
    assert torch.equal(out[:, :, 0], clean.unflatten(1, (3, 2, channels))[:, :, 0])


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("stage", [False, True])
def test_padded_slots(monkeypatch, trusted, stage) -> None:
    """Slots of 8 channels for groups of 5: the padding of x is not read (or trusted to be zero), that of out set to 0."""
    config = ChainConfig(stride=2, pool="avg3", hierarchical=False) if stage else ChainConfig()
    case = make_case(config, width=5, scale=3)
    problem, padded = case.problem, torch.full((2, 24, 4, 5), 0.0 if trusted else NAN)
    padded = padded.contiguous(memory_format=torch.channels_last)
    padded.unflatten(1, (3, 8))[:, :, :5] = case.x.unflatten(1, (3, 5))
    case.x[0, 6, 1, 1] = padded[0, 9, 1, 1] = INF  # which must not turn padding into NaN
    shape = (2, 24, problem.output_height, problem.output_width)
    out = torch.full(shape, NAN).contiguous(memory_format=torch.channels_last)
    plan = plan_steps(problem, (9, 0), pitch=8)
    weights, bias = triton_backend.chain.pack(case.weights, case.biases, config)
    poison_new_memory(monkeypatch)
    for call in chain_calls(problem, plan, GroupView(padded, 8, 8 if trusted else 5), GroupView(out, 8, 8), weights, bias):
        call.run()
    out, exact = out.unflatten(1, (3, 8)), case.reference().unflatten(1, (3, 5))
    assert out[:, :, 5:].count_nonzero() == 0
    finite = exact.isfinite()
    assert torch.equal(out[:, :, :5].isfinite(), finite) and not finite.all()
    assert error(out[:, :, :5][finite], exact[finite]) <= 5e-6


def test_poison_is_noticed(monkeypatch) -> None:
    """The NaN filling works: a backend that writes nothing returns only NaN."""
    monkeypatch.setattr("res2net_fused.backends.triton.kernels.conv3x3_fwd.KernelCall.run", lambda call: None)
    assert make_case().run().isnan().all()


def test_pass_through_is_bit_exact() -> None:
    case = make_case(dtype=torch.float16)
    assert torch.equal(case.run()[:, 10:], case.x[:, 10:])
    assert torch.equal(reference.pool_passthrough(case.x, case.config), case.x)
