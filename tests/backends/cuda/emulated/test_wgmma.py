"""The wgmma kernel's own source, run on the CPU by the emulator, against PyTorch in float64."""

import pytest
import torch
from emulated_cases import CUT_SETTINGS, CUTS, HALVES, PLAN_FIELDS, named
from emulator import harness
from emulator.harness import Case, check, emulate, plan_of


@pytest.mark.parametrize("case", CUTS + CUT_SETTINGS, **named)
def test_emulated_wgmma_is_exact_and_clean_for_integers(case):
    assert check(case, seed=case.width + case.scale) == {}


@pytest.mark.parametrize("case", CUTS[::4] + CUT_SETTINGS[::4], **named)
def test_emulated_wgmma_is_exact_in_fp16(case):
    assert check(harness.replace(case, dtype=torch.float16), seed=1) == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CUTS[1::4] + CUT_SETTINGS[3:6:2], **named)
def test_emulated_wgmma_is_close_for_random_numbers(case, dtype):
    assert check(harness.replace(case, dtype=dtype), integers=False) == {}


@pytest.mark.parametrize("case", [CUTS[3], CUTS[4], CUTS[8]], **named)
def test_emulated_wgmma_gives_the_same_bits_in_every_order_of_threads(case):
    harness.assert_same_bits_in_every_order(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CUTS[4], CUT_SETTINGS[5]], **named)
def test_emulated_wgmma_spreads_nan_and_inf_as_torch_does(case, value):
    harness.assert_spreads_as_torch_does(case, value)


# (w, s) and rows of the map of published models whose plan at these batches is the wgmma kernel
PRODUCTION = [(52, 4, 28), (104, 4, 14), (48, 2, 56), (56, 8, 14), (96, 2, 28), (112, 8, 7), (208, 4, 7)]


@pytest.mark.parametrize("batch", [pytest.param(32, marks=pytest.mark.slow), 256])
@pytest.mark.parametrize("width, scale, size", PRODUCTION)
def test_emulated_production_shape_is_exact_and_clean(width, scale, size, batch):
    """One CTA's images of what such a batch runs on an H200."""
    case = Case(width, scale, batch, size, size, wgmma=True)
    plan = plan_of(case)
    if not harness.INSTANCES[plan.instance].startswith("wgmma"):
        pytest.skip("the plan prefers another kernel")
    tile = {name: getattr(plan, name) for name in PLAN_FIELDS}
    assert check(harness.replace(case, images=plan.images, tile=tile), seed=size) == {}


@pytest.mark.parametrize("width", [48, 52, 56, 96, 104, 112])
def test_emulated_wgmma_multiplies_as_often_as_the_plan_says(width):
    case = Case(width, 3, 240, 7, 9, wgmma=True)
    plan = plan_of(case)
    assert harness.INSTANCES[plan.instance].startswith("wgmma")
    tile = {name: getattr(plan, name) for name in PLAN_FIELDS}
    case = harness.replace(case, images=plan.images, tile=tile)
    run = emulate(case, seed=2)
    share = plan.ctas // run.ctas
    assert run.findings == {} and run.multiplies * share * 4096 == plan.mma_flops
    assert run.shared_bytes == plan.shared_bytes
