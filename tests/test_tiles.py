"""The tables of tiles, and tuning with a made-up clock: nothing here needs a GPU or compiles anything."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from res2net_fused import cli, tuning
from res2net_fused.bench.workloads import Config, cases
from res2net_fused.kernels import tile_table
from res2net_fused.kernels.step_plan import default_tile, plan_steps, step_shape
from res2net_fused.kernels.tile_table import Row, Shape, Tile, lookup, merge, read, write

SHAPE = Shape("step", (9, 0), "half", 26, 26, 32 * 56 * 56)
TILE = Tile(64, 32, 32, 4, 3)


pytestmark = pytest.mark.usefixtures("user_table")


def test_the_shipped_table_answers_for_the_published_shapes():
    for width, pixels in ((26, 56 * 56), (52, 28 * 28), (104, 14 * 14), (208, 7 * 7), (14, 56 * 56), (48, 56 * 56)):
        for batch in (1, 32, 256):
            shape = Shape("step", (9, 0), "half", width, width, batch * pixels)
            assert lookup(shape)[1] == "shipped table"


def test_shipped_rows_are_those_of_known_kernels_and_distinct():
    rows = read(tile_table.SHIPPED)
    assert len({row.shape for row in rows}) == len(rows) > 100
    assert {row.shape.capability for row in rows} == {(8, 0), (9, 0)}


def test_the_nearest_row_answers(user_table):
    near, far = replace(SHAPE, pixels=SHAPE.pixels * 2), replace(SHAPE, pixels=SHAPE.pixels // 3)
    write(user_table, [Row(far, Tile(16, 16, 16, 1, 2)), Row(near, TILE)])
    assert lookup(SHAPE) == (TILE, "tuned")
    assert lookup(replace(SHAPE, pixels=far.pixels)) == (Tile(16, 16, 16, 1, 2), "tuned")


@pytest.mark.parametrize(
    "changes", [{"kernel": "pointwise"}, {"capability": (8, 0)}, {"dtype": "tf32"}, {"width": 64}, {"pixels": 100}], ids=str
)
def test_what_is_not_near_does_not_answer(changes):
    assert SHAPE.distance(replace(SHAPE, **changes)) == math.inf


def test_a_plan_takes_its_tile_from_the_tables_and_says_so(user_table):
    case = cases(("chain",), [Config(26, 4)], [32], "bfloat16", "cpu")[0]
    problem = replace(case.problem(case.module()), device=torch.device("cuda"))
    shipped = plan_steps(problem, (9, 0))
    assert shipped.tile_source == "shipped table"
    assert plan_steps(problem, (12, 0)).tile_source == "rule"  # no row for such a GPU
    assert plan_steps(problem, (12, 0)).tile == default_tile(problem, (12, 0), "ieee", plan_steps(problem, (12, 0)).images)
    other = Tile(32, 16, 16, 2, 2)
    write(user_table, [Row(step_shape(problem, (9, 0), "ieee", shipped.images), other)])
    tuned = plan_steps(problem, (9, 0))
    assert (tuned.tile, tuned.tile_source) == (other, "tuned") and "(tuned)" in tuned.describe(problem)


def test_round_trip_and_merge(user_table):
    rows = [Row(SHAPE, TILE), Row(replace(SHAPE, width=52), Tile(128, 64, 64, 8, 3))]
    write(user_table, rows)
    assert read(user_table) == rows
    newer = Row(SHAPE, Tile(128, 32, 32, 4, 2))
    assert merge(rows, [newer]) == [newer, rows[1]]


GOOD = {
    "kernel": "step", "capability": "9.0", "dtype": "half", "width": 26, "inputs": 26, "pixels": 9, "tile": [64, 32, 32, 4, 3],
}  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no table of tiles"),
        ('{"rows": [', "is no table of tiles"),
        ("[]", "an object with 'rows'"),
        ('{"rows": [1]}', r"rows\[0\] is a int"),
        (json.dumps({"rows": [GOOD | {"kernel": "gemm"}]}), "kernel='gemm'"),
        (json.dumps({"rows": [GOOD | {"capability": 9.0}]}), "capability=9.0"),
        (json.dumps({"rows": [GOOD | {"width": "26"}]}), "width='26'"),
        (json.dumps({"rows": [GOOD | {"pixels": 0}]}), "pixels=0"),
        (json.dumps({"rows": [GOOD | {"tile": [64, 32, 32, 4]}]}), "tile="),
        (json.dumps({"rows": [GOOD | {"tile": [65, 32, 32, 4, 3]}]}), "block_m is 65"),
        (json.dumps({"rows": [GOOD | {"tile": [64, 32, 32, 3, 3]}]}), "warps is 3"),
        (json.dumps({"rows": [GOOD | {"tile": [64, 32, 32, 4, 90]}]}), "stages is 90"),
    ],
)
def test_a_broken_table_names_itself_and_the_remedy(user_table, text, message, caplog):
    user_table.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read(user_table)
    assert str(user_table) in str(error.value) and "res2net-fused tune" in str(error.value)
    with caplog.at_level(logging.WARNING, "res2net_fused"):
        assert lookup(SHAPE)[1] == "shipped table"  # a chain still runs
    assert "tuned tiles are not used" in caplog.text


def jobs():
    return list(tuning.jobs(cases(("block",), [Config(26, 4)], [1], "float16", "cpu")))


def test_jobs_are_the_distinct_launches_of_the_blocks():
    found = jobs()
    assert len({job.shape for job in found}) == len(found)
    assert {job.shape.kernel for job in found} == {"step", "pointwise"}
    assert {job.shape.width for job in found if job.shape.kernel == "step"} == {26, 52, 104, 208}


def test_another_tile_covers_the_same_work():
    for job in jobs():
        call = job.with_tile(Tile(16, 16, 16, 1, 2))
        columns = call.arguments.get("OUT_LANES" if job.shape.kernel == "pointwise" else "CHANNELS")
        tasks = 1 if job.shape.kernel == "pointwise" else call.arguments["STEPS"] + call.arguments["PASSES"]
        assert call.programs == tasks * -(-call.arguments["pixels"] // 16) * -(-columns // 16)
        assert job.with_tile(job.tile).programs == job.call.programs


def test_the_fastest_tile_that_fits_is_kept():
    def clock(call):
        tile = call.arguments["BLOCK_M"], call.arguments["BLOCK_N"], call.options["num_warps"]
        return None if tile[0] == 128 else abs(tile[0] - 64) + abs(tile[1] - 32) + abs(tile[2] - 2) + 1.0

    advanced = []
    some = jobs()[:3]
    rows = tuning.tune(some, clock, lambda: advanced.append(1))
    assert len(advanced) == len(rows) == 3
    for job, row in zip(some, rows, strict=True):
        assert row.shape == job.shape
        best = min(filter(None, (clock(job.with_tile(t)) for t in (job.tile, *tuning.candidates(job.shape)))))
        assert clock(job.with_tile(row.tile)) == best


def test_a_shape_that_no_tile_fits_is_left_to_the_rule():
    assert tuning.tune(jobs()[:1], lambda call: None) == []


@pytest.mark.parametrize("kind", tile_table.DTYPE_CLASSES)
@pytest.mark.parametrize("width", [4, 26, 208, 2048])
def test_candidates_are_many_and_valid(kind, width):
    found = list(tuning.candidates(Shape("pointwise", (9, 0), kind, width, width, 1000)))
    assert len(found) == len(set(found)) > 5 and all(tile.block_n <= max(16, 2 * width) for tile in found)


def test_tuning_needs_a_gpu(capsys):
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "CUDA device" in capsys.readouterr().err
