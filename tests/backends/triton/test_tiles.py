"""The tables of tiles: nothing here needs a GPU or compiles anything."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from res2net_fused.backends.triton.step_plan import default_tile, plan_steps, step_shape
from res2net_fused.backends.triton.tiles import Row, Shape, Tile, lookup, merge, read, write
from res2net_fused.testing.cases import WidthScale, cases

SHAPE = Shape("step", (9, 0), "half", 26, 26, 32 * 56 * 56)
TILE = Tile(64, 32, 32, 4, 3)


pytestmark = pytest.mark.usefixtures("user_table")


def test_the_nearest_row_answers(user_table):
    near, far = replace(SHAPE, pixels=SHAPE.pixels * 2), replace(SHAPE, pixels=SHAPE.pixels // 3)
    write(user_table, [Row(far, Tile(16, 16, 16, 1, 2)), Row(near, TILE)])
    assert lookup(SHAPE) == TILE
    assert lookup(replace(SHAPE, pixels=far.pixels)) == Tile(16, 16, 16, 1, 2)


@pytest.mark.parametrize(
    "changes", [{"kernel": "pointwise"}, {"capability": (8, 0)}, {"dtype": "tf32"}, {"width": 64}, {"pixels": 100}], ids=str
)
def test_what_is_not_near_does_not_answer(changes):
    assert SHAPE.distance(replace(SHAPE, **changes)) == math.inf


def test_a_plan_takes_its_tile_from_the_tables_and_says_so(user_table):
    case = cases(("chain",), [WidthScale(26, 4)], [32], "bfloat16", "cpu")[0]
    problem = replace(case.problem(case.module()), device=torch.device("cuda"))
    untuned = plan_steps(problem, (9, 0))
    assert untuned.tile_source == "rule" and untuned.tile == default_tile(problem, (9, 0), "ieee", untuned.images)
    other = Tile(32, 16, 16, 2, 2)
    write(user_table, [Row(step_shape(problem, (9, 0), "ieee", untuned.images), other)])
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
        assert lookup(SHAPE) is None  # the rule decides
    assert "tuned tiles are not used" in caplog.text
