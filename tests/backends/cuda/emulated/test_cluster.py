"""The cluster kernel's own source, run on the CPU by the emulator, against PyTorch in float64."""

import pytest
import torch
from emulated_cases import HALVES, PLAN_FIELDS, SETTINGS, SHARED, SHARED_SETTINGS, WIDTHS, named
from emulator import harness
from emulator.harness import Case, check, emulate, plan_of


@pytest.mark.parametrize("case", SHARED + SHARED_SETTINGS, **named)
def test_emulated_cluster_is_exact_and_clean_for_integers(case):
    assert check(case, seed=case.width + case.scale) == {}


@pytest.mark.parametrize("case", SHARED[::3] + SHARED_SETTINGS[::4], **named)
def test_emulated_cluster_is_exact_in_fp16(case):
    assert check(harness.replace(case, dtype=torch.float16), seed=1) == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", SHARED[1::4] + SHARED_SETTINGS[::4], **named)
def test_emulated_cluster_is_close_for_random_numbers(case, dtype):
    assert check(harness.replace(case, dtype=dtype), integers=False) == {}


@pytest.mark.parametrize("case", [SHARED[2], SHARED[6], SHARED[9]], **named)
def test_emulated_cluster_gives_the_same_bits_in_every_order_of_threads(case):
    harness.assert_same_bits_in_every_order(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [SHARED[2], SHARED[11]], **named)
def test_emulated_cluster_spreads_nan_and_inf_as_torch_does(case, value):
    harness.assert_spreads_as_torch_does(case, value)


def planned_cases():
    """What the plan shares among CTAs on an H200, of the published chains at batch 1 and 2."""
    for width, scale in ((26, 4), (14, 8), (48, 2)):
        for stage, size in enumerate((56, 28, 14, 7)):
            for batch in (1, 2):
                case = Case(width << stage, scale, batch, size, size, clusters=True)
                if "cluster" in harness.INSTANCES[plan_of(case).instance]:
                    yield case


# The stages of 14 x 14 and 7 x 7 by default, the others with the slow tests.
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[pytest.mark.slow] * (c.height > 14)) for c in planned_cases()]
)
def test_emulated_production_cluster_is_exact_and_clean(case):
    assert check(case, seed=case.width + case.images) == {}


@pytest.mark.slow
@pytest.mark.parametrize("size", [28, 14, 7])
@pytest.mark.parametrize("width, scale", [(26, 4), (14, 8)])
def test_emulated_production_cluster_of_a_large_batch_is_exact_and_clean(width, scale, size):
    case = Case(width * 56 // size, scale, 32, size, size, clusters=True)
    plan = plan_of(case)
    assert "cluster" in harness.INSTANCES[plan.instance]
    tile = {name: getattr(plan, name) for name in PLAN_FIELDS}
    assert check(harness.replace(case, images=2 * plan.images, tile=tile)) == {}


@pytest.mark.parametrize("case", [c for c in WIDTHS[::2] + SETTINGS[::2] if not c.tile], **named)
def test_emulated_cluster_multiplies_as_often_as_the_plan_says(case):
    case = harness.replace(case, clusters=True)
    plan = plan_of(case)
    run = emulate(case, seed=2)
    assert run.findings == {}
    assert run.multiplies * 4096 == plan.mma_flops
    assert (run.ctas, run.shared_bytes) == (plan.ctas, plan.shared_bytes)
