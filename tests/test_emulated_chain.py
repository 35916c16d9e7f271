"""The chain kernel's own source, run on the CPU by the emulator, against PyTorch in float64."""

import pytest
import torch
from emulator import harness
from emulator.harness import Case, check, emulate, expected_of, make_tensors, plan_of

HALVES = (torch.bfloat16, torch.float16)
STAGE = {"hierarchical": False, "pool": "avg3"}
# All widths that have an instance of their own, and others of each kind, at odd sizes. The plan cuts them.
WIDTHS = [
    Case(2, 4, 2, 5, 9),
    Case(8, 4, 1, 9, 7),
    Case(14, 8, 1, 9, 11),
    Case(16, 3, 3, 7, 5),
    Case(26, 4, 1, 9, 13),
    Case(26, 8, 1, 5, 7),
    Case(28, 8, 2, 7, 7),
    Case(30, 2, 1, 1, 1),
    Case(40, 4, 1, 6, 5),
    Case(48, 2, 3, 5, 9),
    Case(52, 4, 1, 7, 9),
    Case(56, 8, 1, 5, 3),
    Case(64, 4, 1, 5, 7),
    Case(80, 3, 1, 3, 5),
    Case(96, 2, 1, 5, 7),
    Case(104, 4, 1, 5, 4),
    Case(112, 3, 1, 4, 5),
    Case(192, 2, 1, 3, 5),
    Case(208, 4, 1, 3, 3),
]
# Every way to cut the work, by hand: row strips, column parts, several images, more and fewer warps, long and short pipelines.
STRIP = {"whole": 0, "images": 1}
TILES = [
    Case(26, 4, 2, 9, 7, tile=STRIP | {"rows": 4, "columns": 7, "warps_m": 3, "slices": 18, "stages": 2}),
    Case(26, 4, 1, 7, 11, tile=STRIP | {"rows": 3, "columns": 4, "warps_m": 2, "slices": 6, "stages": 3}),
    Case(14, 8, 1, 5, 17, tile=STRIP | {"rows": 2, "columns": 9, "warps_m": 4, "slices": 3, "stages": 4}),
    Case(28, 3, 5, 6, 6, tile={"whole": 1, "images": 2, "rows": 6, "columns": 6, "warps_m": 1, "slices": 18, "stages": 2}),
    Case(26, 4, 7, 7, 7, tile={"whole": 1, "images": 3, "rows": 7, "columns": 7, "warps_m": 2, "slices": 9, "stages": 2}),
    Case(52, 4, 1, 10, 9, tile=STRIP | {"rows": 5, "columns": 9, "warps_m": 1, "slices": 9, "stages": 3}),
    Case(52, 2, 1, 10, 9, tile=STRIP | {"rows": 10, "columns": 5, "warps_m": 2, "slices": 36, "stages": 2}),
    Case(104, 3, 1, 6, 7, tile=STRIP | {"rows": 3, "columns": 7, "warps_m": 2, "slices": 3, "stages": 4}),
    Case(104, 3, 2, 5, 5, tile={"whole": 1, "images": 2, "rows": 5, "columns": 5, "warps_m": 1, "slices": 21, "stages": 2}),
    Case(40, 4, 1, 9, 7, tile=STRIP | {"rows": 4, "columns": 7, "warps_m": 1, "slices": 27, "stages": 2}),
]
SETTINGS = [
    Case(26, 4, 1, 9, 11, settings=STAGE | {"stride": 2}),
    Case(14, 4, 2, 8, 6, settings={"hierarchical": False, "stride": 2, "pool": "avg3_nopad"}),
    Case(28, 4, 1, 9, 9, settings=STAGE | {"stride": 2, "dilation": 2}),
    Case(52, 3, 1, 9, 14, settings=STAGE | {"stride": 2}, tile=STRIP | {"rows": 2, "columns": 3}),
    Case(26, 4, 1, 7, 9, settings=STAGE),
    Case(26, 4, 1, 7, 9, settings={"hierarchical": False, "passthrough": "none"}),
    Case(26, 4, 1, 7, 9, settings={"pool": "avg3_nopad"}),
    Case(26, 4, 1, 9, 9, settings={"dilation": 3}),
    Case(14, 3, 2, 9, 9, settings={"dilation": 2}, tile={"whole": 1, "images": 2, "rows": 9, "columns": 9, "warps_m": 2}),
    Case(14, 3, 1, 9, 12, settings={"dilation": 2}, tile=STRIP | {"rows": 2, "columns": 4}),
    Case(26, 4, 1, 7, 9, settings={"passthrough": "first"}),
    Case(26, 4, 1, 7, 9, settings={"passthrough": "first_added"}),
    Case(14, 2, 2, 7, 9, settings={"passthrough": "first_added", "pool": "avg3"}),
    Case(26, 3, 1, 7, 9, settings={"passthrough": "none"}),
    Case(48, 1, 1, 7, 9, settings={"passthrough": "none"}),
    Case(26, 4, 1, 7, 9, settings={"activation": "none"}),
    Case(26, 4, 1, 7, 9, settings={"activation": "hardtanh20"}),
    Case(26, 4, 1, 7, 9, pad=6),  # 16-byte copies, the last of each slot cut short
    Case(14, 8, 1, 7, 9, pad=2),
    Case(26, 4, 2, 7, 9, pad=6, fill=True),
    Case(14, 4, 1, 9, 9, pad=2, fill=True, settings=STAGE | {"stride": 2}),
    Case(28, 4, 1, 7, 9, pad=2),  # 4-byte copies although the groups would allow 8
]
named = {"ids": str}
PLAN_FIELDS = (
    "instance rows columns images whole warps_m warps_n slices stages row_parts channel_parts warps_k"
).split()  # what a launch is told
# float32 through TF32: odd widths too, dense and in padded slots
F32 = torch.float32
SINGLES = [
    Case(3, 3, 1, 3, 5, F32),
    Case(14, 8, 1, 5, 17, F32, tile=STRIP | {"rows": 2, "columns": 9, "warps_m": 4, "slices": 3, "stages": 4}),
    Case(26, 4, 2, 9, 7, F32, tile=STRIP | {"rows": 4, "columns": 7, "warps_m": 3, "slices": 18, "stages": 2}),
    Case(27, 4, 1, 9, 13, F32),
    Case(26, 4, 7, 7, 7, F32, tile={"whole": 1, "images": 3, "rows": 7, "columns": 7, "warps_m": 2, "slices": 9, "stages": 2}),
    Case(48, 2, 3, 5, 9, F32),
    Case(52, 4, 1, 7, 9, F32),
    Case(104, 3, 1, 5, 4, F32),
    Case(208, 2, 1, 3, 3, F32),
    Case(27, 4, 1, 9, 11, F32, settings=STAGE | {"stride": 2}),
    Case(26, 3, 2, 8, 6, F32, settings={"hierarchical": False, "stride": 2, "pool": "avg3_nopad", "dilation": 2}),
    Case(28, 3, 1, 9, 12, F32, settings={"dilation": 2, "activation": "hardtanh20"}, tile=STRIP | {"rows": 2, "columns": 4}),
    Case(26, 4, 1, 7, 9, F32, pad=2),  # 16-byte copies, the last of each slot cut short
    Case(27, 3, 2, 7, 9, F32, pad=1),
    Case(27, 3, 2, 7, 9, F32, pad=1, fill=True),
    Case(26, 4, 1, 7, 9, F32, settings={"passthrough": "first_added"}),
    Case(27, 2, 2, 7, 9, F32, settings={"passthrough": "first_added", "pool": "avg3_nopad"}, pad=1, fill=True),
]


@pytest.mark.parametrize("case", WIDTHS + TILES + SETTINGS + SINGLES, **named)
def test_emulated_chain_is_exact_and_clean_for_integers(case):
    assert check(case, seed=case.width) == {}


@pytest.mark.parametrize("case", WIDTHS[::2] + TILES[::3] + SETTINGS[::4], **named)
def test_emulated_chain_is_exact_in_fp16(case):
    case = harness.replace(case, dtype=torch.float16)
    assert check(case, seed=1) == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", WIDTHS[1::3] + SETTINGS[::3], **named)
def test_emulated_chain_is_close_for_random_numbers(case, dtype):
    assert check(harness.replace(case, dtype=dtype), integers=False) == {}


@pytest.mark.parametrize("case", SINGLES, **named)
def test_emulated_chain_in_tf32_is_close_for_random_numbers(case):
    assert check(case, integers=False) == {}
    # Of the exact result, with factors rounded to the nearest; 3.1e-4 is the worst measured, 4.8e-4 if x and u are truncated.
    x, weights, biases = make_tensors(case, False, 1)
    out = emulate(case, integers=False).out.double()
    exact = expected_of(harness.replace(case, dtype=torch.float64), x, weights, biases)
    assert (out - exact).norm() < 3.5e-4 * exact.norm()


@pytest.mark.parametrize("case", [WIDTHS[4], TILES[1], TILES[4], TILES[7], SINGLES[2]], **named)
def test_emulated_chain_gives_the_same_bits_in_every_order_of_threads(case):
    harness.assert_same_bits_in_every_order(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [WIDTHS[4], WIDTHS[15], TILES[4], SETTINGS[0], SETTINGS[16], *SINGLES[2:4]], **named)
def test_emulated_chain_spreads_nan_and_inf_as_torch_does(case, value):
    harness.assert_spreads_as_torch_does(case, value)


def production_cases(batch: int):
    """The published configurations at their four stages, cut as for a large or a small batch on an H200."""
    for width, scale in ((26, 4), (14, 8), (48, 2)):
        for stage, size in enumerate((56, 28, 14, 7)):
            whole = Case(width << stage, scale, batch, size, size)
            plan = plan_of(whole)
            tile = {name: getattr(plan, name) for name in PLAN_FIELDS}
            yield harness.replace(whole, images=plan.images, tile=tile)


# One or two images each of what a large batch runs; the cut for one image runs with the slow tests.
@pytest.mark.parametrize("index", range(12))
def test_emulated_production_shape_is_exact_and_clean(index):
    case = list(production_cases(256))[index]
    assert check(case, seed=index) == {}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("index", range(12))
def test_emulated_production_shape_is_exact_and_clean_at_small_batches(index, batch):
    case = list(production_cases(batch))[index]
    assert check(case, seed=index) == {}


@pytest.mark.slow
@pytest.mark.parametrize("device", list(harness.launch_plan.LIMITS))
@pytest.mark.parametrize("dtype", (*HALVES, F32), ids=str)
@pytest.mark.parametrize("case", WIDTHS, **named)
def test_emulated_chain_is_exact_as_cut_for_every_device(case, dtype, device):
    limits = harness.launch_plan.LIMITS[device]
    case = harness.replace(case, dtype=dtype)
    plan = plan_of(case, limits)
    tile = {name: getattr(plan, name) for name in PLAN_FIELDS}
    assert check(harness.replace(case, tile=tile)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("columns", [61, 200, 1025])
def test_emulated_chain_splits_the_columns_of_wide_images(columns):
    case = Case(26, 4, 1, 5, columns)
    assert check(case) == {}


@pytest.mark.parametrize("case", [*WIDTHS, *(case for case in SINGLES if not case.tile)], **named)
def test_emulated_chain_multiplies_as_often_as_the_plan_says(case):
    plan = plan_of(case)
    run = emulate(case)
    assert run.multiplies * 2 * 16 * 8 * (32 // case.dtype.itemsize) == plan.mma_flops
    assert (run.ctas, run.shared_bytes) == (plan.ctas, plan.shared_bytes)
