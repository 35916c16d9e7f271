"""The cluster kernel's own source, run on the CPU by the emulator, against PyTorch in float64."""

import pytest
import torch
from emulator import harness
from emulator.harness import Case, check, emulate, plan_of
from test_emulated_chain import HALVES, PLAN_FIELDS, SETTINGS, STAGE, WIDTHS, named


def parts(instance: str, row_parts: int, channel_parts: int, **tile: int) -> dict[str, int]:
    """A launch of the cluster kernel. rows, columns and whole come from `shared_by`, what is not named is 1."""
    rest = dict.fromkeys(("images", "warps_m", "warps_n", "warps_k"), 1) | {"stages": 2}
    index = harness.INSTANCES.index(f"cluster_{instance}")
    return rest | {"instance": index, "row_parts": row_parts, "channel_parts": channel_parts} | tile


def shared_by(case: Case, tile: dict[str, int]) -> Case:
    whole = int(tile["row_parts"] == 1 and "rows" not in tile)
    rows = case.height if whole else -(-case.height // tile["row_parts"])
    tile = {"whole": whole, "rows": rows, "columns": case.columns} | tile
    return harness.replace(case, tile=tile, clusters=True)


# Every way to share the work, by hand, at odd sizes and numbers of images: channels, rows, both; strips that compute their
# halos, several images; padded channel parts; one and several passes, chunks and warps on the same sums, some without slices.
SHARED = [
    shared_by(Case(26, 4, 1, 7, 9), parts("c2t2", 1, 2, warps_m=3, slices=18)),
    shared_by(Case(26, 4, 3, 7, 5), parts("c2t2", 1, 2, warps_m=1, slices=18, warps_k=3)),
    shared_by(Case(26, 8, 2, 7, 5), parts("c2t2", 3, 2, slices=3, stages=4, warps_k=4)),
    shared_by(Case(26, 3, 1, 7, 5), parts("c4t2", 4, 1, slices=6, stages=3, warps_k=2)),
    shared_by(Case(14, 8, 1, 5, 11), parts("c2t2", 5, 1, slices=9, warps_k=3)),
    shared_by(Case(30, 2, 3, 5, 7), parts("c2t2", 1, 2, warps_m=2, slices=9)),
    shared_by(Case(52, 5, 1, 7, 9), parts("c2t2", 2, 4, warps_m=2, slices=12, stages=3, warps_k=2)),
    shared_by(Case(52, 4, 5, 5, 3), parts("c4t2", 1, 2, images=2, slices=9, stages=4, warps_k=5)),
    shared_by(Case(56, 6, 1, 9, 7), parts("c7t2", 5, 1, slices=36, warps_k=12)),
    shared_by(Case(52, 4, 1, 9, 7), parts("c2t2", 1, 4, rows=4, slices=36, warps_m=2)),
    shared_by(Case(52, 4, 1, 6, 11), parts("c4t2", 1, 2, rows=3, columns=6, slices=9, warps_m=1, warps_k=2)),
    shared_by(Case(104, 4, 1, 5, 7), parts("c2t2", 1, 7, slices=21, stages=3, warps_m=2, warps_k=3)),
    shared_by(Case(104, 3, 2, 5, 7), parts("c4t2", 2, 4, slices=9, stages=4, warps_k=7)),
    shared_by(Case(104, 3, 1, 5, 7), parts("c7t2", 3, 2, slices=3, stages=3, warps_k=2)),
    shared_by(Case(104, 3, 1, 3, 7), parts("c2t2", 3, 2, slices=9, warps_n=4, warps_k=2)),
    shared_by(Case(48, 7, 1, 7, 7), parts("c2t2", 2, 3, slices=27, warps_m=1)),
    shared_by(Case(10, 4, 1, 3, 5), parts("c2t2", 3, 1, slices=3)),
]
SHARED_SETTINGS = [
    shared_by(Case(26, 4, 1, 7, 9, settings={"passthrough": "first"}), parts("c2t2", 3, 2, slices=9, warps_k=2)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"passthrough": "first_added"}), parts("c2t2", 3, 2, slices=9, warps_k=2)),
    shared_by(Case(26, 3, 2, 7, 9, settings={"passthrough": "first_added", "pool": "avg3"}), parts("c2t2", 1, 2, slices=18)),
    shared_by(Case(26, 3, 1, 7, 9, settings={"passthrough": "none"}), parts("c2t2", 2, 2, slices=9, warps_m=2)),
    shared_by(Case(26, 4, 1, 9, 9, settings={"dilation": 2}), parts("c2t2", 3, 2, slices=9)),
    shared_by(Case(26, 4, 1, 9, 5, settings={"dilation": 3}), parts("c2t2", 3, 2, slices=9, warps_k=3)),
    shared_by(Case(28, 3, 2, 7, 9, settings={"dilation": 2}), parts("c2t2", 1, 2, images=2, slices=18, warps_m=4)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"pool": "avg3_nopad"}), parts("c2t2", 3, 2, slices=18)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"activation": "hardtanh20"}), parts("c2t2", 3, 2, slices=18)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"activation": "none"}), parts("c2t2", 1, 2, slices=18, warps_k=4)),
    shared_by(Case(26, 4, 1, 7, 9, pad=6), parts("c2t2", 2, 2, slices=18)),
    shared_by(Case(14, 8, 1, 7, 9, pad=2), parts("c2t2", 3, 1, slices=9)),
    shared_by(Case(26, 4, 2, 7, 9, pad=6, fill=True), parts("c2t2", 2, 2, slices=18, warps_k=2)),
    shared_by(Case(52, 4, 1, 7, 9, pad=4, fill=True), parts("c4t2", 2, 2, slices=36, warps_k=2)),
    shared_by(Case(28, 4, 1, 7, 9, pad=2), parts("c2t2", 2, 2, slices=18)),
    # parts that send nothing
    shared_by(Case(48, 1, 2, 5, 9, settings={"passthrough": "none"}), parts("c2t2", 1, 3, slices=27, warps_m=2)),
    shared_by(Case(26, 4, 1, 9, 15, settings=STAGE | {"stride": 2}), parts("c2t2", 1, 2, rows=5, columns=8, slices=18)),
    shared_by(Case(26, 4, 1, 7, 9, settings=STAGE), parts("c2t2", 1, 2, rows=4, slices=9, warps_k=2)),
    shared_by(Case(104, 4, 1, 5, 7, settings=STAGE), parts("c2t2", 1, 7, slices=21, warps_k=3)),
]


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
