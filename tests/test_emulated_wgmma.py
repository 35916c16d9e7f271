"""The wgmma kernel's own source, run on the CPU by the emulator, against PyTorch in float64."""

import pytest
import torch
from emulator import harness
from emulator.harness import Case, check, emulate, plan_of
from test_emulated_chain import HALVES, PLAN_FIELDS, STAGE, named


def cut(instance: str, **tile: int) -> dict[str, int]:
    """A launch of the wgmma kernel; without rows and columns, of whole images."""
    rest = {"images": 1, "warps_m": 4, "warps_n": 1, "stages": 2, "whole": int("rows" not in tile)}
    return rest | {"instance": harness.INSTANCES.index(f"wgmma_{instance}")} | tile


def wide(case: Case) -> Case:
    tile = {"rows": case.height, "columns": case.columns} | case.tile
    return harness.replace(case, wgmma=True, tile=tile)


# Every way to cut the work, by hand, at odd sizes: strips, column parts, several images; one and more warpgroups along pixels
# and channels; weights that stay and that stream; last tiles with few positions and with none.
CUTS = [
    wide(Case(48, 2, 3, 5, 9, tile=cut("c6t2", slices=27))),
    wide(Case(48, 4, 1, 9, 13, tile=cut("c6t2", rows=5, warps_m=8, slices=9, stages=3))),
    wide(Case(50, 4, 1, 9, 11, tile=cut("c7t2", rows=4, slices=12, stages=4))),
    wide(Case(52, 4, 3, 7, 5, tile=cut("c7t2", images=2, warps_m=8, slices=36))),
    wide(Case(52, 3, 1, 5, 19, tile=cut("c7t2", rows=3, columns=7, slices=3, stages=4))),
    wide(Case(56, 8, 2, 5, 3, tile=cut("c7t2", rows=2, slices=36))),
    wide(Case(96, 2, 1, 7, 5, tile=cut("c12t2", slices=18, stages=2))),
    wide(Case(96, 3, 1, 5, 7, tile=cut("c6t2", rows=3, warps_n=2, slices=9, stages=3))),
    wide(Case(104, 4, 1, 7, 5, tile=cut("c7t2", rows=4, warps_m=8, warps_n=2, slices=21))),
    wide(Case(104, 3, 2, 5, 9, tile=cut("c14t2", images=2, warps_m=8, slices=9))),
    wide(Case(112, 3, 3, 3, 5, tile=cut("c14t2", images=3, slices=21))),
    wide(Case(112, 4, 1, 6, 5, tile=cut("c7t2", rows=2, warps_n=2, slices=9, stages=3))),
    wide(Case(208, 2, 1, 3, 5, tile=cut("c14t2", warps_n=2, slices=3, stages=3))),
]
SETTINGS = [
    wide(Case(52, 4, 1, 9, 9, settings={"dilation": 2}, tile=cut("c7t2", rows=3, slices=12))),
    wide(Case(52, 3, 2, 7, 9, settings={"dilation": 3}, tile=cut("c7t2", slices=12))),
    wide(Case(48, 4, 1, 7, 9, settings=STAGE, tile=cut("c6t2", rows=4, slices=27))),
    wide(Case(52, 4, 1, 7, 9, settings={"passthrough": "first_added"}, tile=cut("c7t2", rows=4, slices=12))),
    wide(Case(52, 1, 1, 7, 9, settings={"passthrough": "none", "activation": "none"}, tile=cut("c7t2", slices=36))),
    wide(Case(52, 4, 2, 7, 9, pad=4, fill=True, tile=cut("c7t2", rows=7, slices=36))),
    wide(Case(54, 3, 1, 7, 9, pad=2, tile=cut("c7t2", slices=12))),
]


@pytest.mark.parametrize("case", CUTS + SETTINGS, **named)
def test_emulated_wgmma_is_exact_and_clean_for_integers(case):
    assert check(case, seed=case.width + case.scale) == {}


@pytest.mark.parametrize("case", CUTS[::4] + SETTINGS[::4], **named)
def test_emulated_wgmma_is_exact_in_fp16(case):
    assert check(harness.replace(case, dtype=torch.float16), seed=1) == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CUTS[1::4] + SETTINGS[3:6:2], **named)
def test_emulated_wgmma_is_close_for_random_numbers(case, dtype):
    assert check(harness.replace(case, dtype=dtype), integers=False) == {}


@pytest.mark.parametrize("case", [CUTS[3], CUTS[4], CUTS[8]], **named)
def test_emulated_wgmma_gives_the_same_bits_in_every_order_of_threads(case):
    harness.assert_same_bits_in_every_order(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CUTS[4], SETTINGS[5]], **named)
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
