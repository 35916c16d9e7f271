"""The chain kernel's own source, run on the CPU by the emulator, against PyTorch in float64."""

import pytest
import torch
from emulated_cases import F32, HALVES, PLAN_FIELDS, SETTINGS, SHARED, SINGLES, TILES, WIDTHS, named
from emulator import harness
from emulator.harness import Case, check, emulate, expected_of, make_tensors, plan_of


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


@pytest.mark.parametrize("case", TILES[:3] + SINGLES[-1:] + SHARED[6:7], **named)
def test_emulated_older_code_is_exact_and_clean(case):
    """Weights come by copies of each thread's own where one thread cannot copy them in bulk."""
    assert check(case, seed=1, flags=harness.OLDER_CODE) == {}


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
