"""The table of what was measured: its file, what is looked up in it, and when it counts."""

import json
import logging
import multiprocessing
from dataclasses import replace

import pytest
import torch

import res2net_fused as rf
from res2net_fused.backends import choices, choices_file
from res2net_fused.backends.choices_file import Contents, Row, merged, read, update
from res2net_fused.backends.selection import choose
from res2net_fused.chain.config import Chain1dConfig, ChainConfig
from res2net_fused.chain.problem import Chain1dProblem, ChainProblem

PROBLEM = ChainProblem(ChainConfig(), torch.device("cpu"), torch.float32, 2, 14, 14, 26, 3, True, (256, 256))


def row_of(problem, choice="cpu", passes="inference", **ms):
    ms = ms or {"own": 2.0, "cpu": 1.0, "reference": 3.0}
    machine, kind = choices.machine(problem.device), choices.kind_of(passes, problem)
    return Row(machine, kind, choices.size_of(problem), choice, ms, dict.fromkeys(ms, 1e-7))


def test_what_is_recorded_is_found_here_and_by_later_processes(choices_table):
    assert choices.lookup("inference", PROBLEM) is None
    row = row_of(PROBLEM)
    choices.record([row])
    found = choices.lookup("inference", PROBLEM)
    assert found.row == row and found.exact and found.backend == "cpu" and not found.runs_own
    assert read(choices_table).choices == (row,)
    choices.forget()
    assert choices.lookup("inference", PROBLEM).row == row
    assert choices.lookup("gradients", PROBLEM) is None, "another kind of passes"


@pytest.mark.parametrize(
    "changes",
    [
        {"config": ChainConfig(dilation=2)}, {"dtype": torch.bfloat16}, {"width": 24}, {"steps": 4}, {"channels_last": False},
        {"around": (64, 256)}, {"around": None},
    ],
    ids=str,
)  # fmt: skip
def test_another_kind_of_call_is_not_answered(choices_table, changes):
    choices.record([row_of(PROBLEM)])
    assert choices.lookup("inference", replace(PROBLEM, **changes)) is None


def test_the_nearest_size_answers_and_says_so(choices_table):
    small, large = replace(PROBLEM, batch=1, height=7, width_pixels=7), replace(PROBLEM, batch=64, height=56, width_pixels=56)
    choices.record([row_of(small, "cpu"), row_of(large, "own", own=1.0, cpu=2.0)])
    near_small, near_large = choices.lookup("inference", PROBLEM), choices.lookup("inference", replace(large, batch=16))
    assert (near_small.choice, near_large.choice) == ("cpu", "own") and not near_small.exact
    assert "1x7x7, the nearest" in str(near_small)
    assert "nearest" not in str(choices.lookup("inference", small))


def test_calls_along_rows_have_a_kind_of_their_own(choices_table):
    problem = Chain1dProblem(Chain1dConfig(2, "last", "zeros"), torch.device("cpu"), torch.float32, 4, 200, 64, 7, 3)
    choices.record([row_of(problem, "own", own=1.0, cpu=2.0)])
    assert choices.lookup("inference", replace(problem, length=300)).runs_own
    assert choices.lookup("inference", replace(problem, kernel_size=5)) is None


def test_other_machines_and_threads_are_not_believed(choices_table):
    choices.record([replace(row_of(PROBLEM), machine="another processor, torch 1.0")])
    assert choices.lookup("inference", PROBLEM) is None
    threads = torch.get_num_threads()
    choices.record([row_of(PROBLEM)])
    try:
        torch.set_num_threads(threads + 1)
        assert choices.lookup("inference", PROBLEM) is None
    finally:
        torch.set_num_threads(threads)


def test_a_backend_is_chosen_as_measured_unless_it_cannot_run(choices_table):
    choices.record([row_of(PROBLEM, "reference", reference=1.0, cpu=2.0)])
    found = choose(PROBLEM)
    assert found.name == "reference" and "measured here in ms: reference 1, cpu 2" in found.reason
    assert choose(PROBLEM, "cpu").name == "cpu", "who asks is not argued with"
    choices.record([row_of(PROBLEM, "cuda", cuda=1.0)])
    assert choose(PROBLEM).name in ("cpu", "reference"), "the table is data: no kernel runs where it cannot"


@pytest.mark.parametrize("mode, counts", [("", True), ("tuned", True), ("measured", True), ("own", True), ("predicted", False)])
def test_modes(choices_table, monkeypatch, mode, counts):
    choices.record([row_of(PROBLEM, "reference", reference=1.0)])
    monkeypatch.setenv(choices.MODE_VARIABLE, mode)
    assert (choices.lookup("inference", PROBLEM) is not None) == counts


def test_a_mode_that_is_none_is_named(choices_table, monkeypatch):
    choices.record([row_of(PROBLEM)])
    monkeypatch.setenv(choices.MODE_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="RES2NET_FUSED_CHOICE='fastest': allowed are 'tuned', 'predicted', 'measured', 'own'"):
        choose(PROBLEM)


# The file --------------------------------------------------------------------------------------------------------------

GOOD = {
    "machine": "m", "call": "c", "size": [1, 2, 3], "choice": "cpu:direct", "ms": {"own": 2, "cpu:direct": 1.5}, "errors": {},
}  # fmt: skip


def text_of(**changes):
    return json.dumps({"version": 1, "choices": [GOOD | changes], "tiles": []})


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no table of choices"),
        (text_of()[:50], "is no table of choices"),
        ("[" * 100_000, "is no table of choices"),
        ("[]", "an object with 'version'"),
        ('{"version": 2}', "version is 2; this package reads version 1"),
        ('{"version": 1, "choices": {}}', "must be lists"),
        ('{"version": 1, "choices": [3]}', r"choices\[0\] is a int"),
        (text_of(machine=3), "machine=3"),
        (text_of(choice="__import__('os')"), "choice="),
        (text_of(choice="cpu:slow"), "choice='cpu:slow'"),
        (text_of(size=[1, 0, 3]), "size="),
        (text_of(size=[1]), "size="),
        (text_of(size=[1, 2.0, 3]), "size="),
        (text_of(ms={"cpu:direct": float("nan")}), "ms="),
        (text_of(ms={"cpu:direct": True}), "ms="),
        (text_of(ms={"rm": 1}), "ms="),
        (text_of(ms={"own": 1}), "no time of its choice"),
        (text_of(errors={"own": -1}), "errors="),
    ],
)
def test_a_damaged_file_is_named_warned_of_once_and_not_lost(choices_table, text, message, caplog):
    choices_table.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(choices_table)
    with caplog.at_level(logging.WARNING, "res2net_fused"):
        choices.forget()
        assert all(choices.lookup("inference", replace(PROBLEM, batch=n)) is None for n in (1, 2, 3))
    assert len([r for r in caplog.records if "is not used" in r.message]) == 1
    choices.record([row_of(PROBLEM)])
    assert read(choices_table).choices == (row_of(PROBLEM),)
    assert choices_table.with_name("choices.json.unreadable").read_text() == text


def test_a_file_that_cannot_be_written_costs_a_warning(choices_table, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(choices_file.PATH_VARIABLE, str(tmp_path / "file" / "choices.json"))
    with caplog.at_level(logging.WARNING, "res2net_fused"):
        choices.record([row_of(PROBLEM)])
    assert "not kept for other processes" in caplog.text
    assert choices.lookup("inference", PROBLEM).choice == "cpu", "for this process it is"


def _writes(path, first, count):
    for i in range(first, first + count):
        row = Row("m", "c", (i, 1, 1), "own", {"own": 1.0}, {})
        update(path, lambda old, row=row: Contents(merged(old.choices, [row]), old.tiles))


def test_processes_that_write_at_once_lose_nothing(choices_table):
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    writers = [context.Process(target=_writes, args=(choices_table, 1 + 20 * i, 20)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(row.size[0] for row in read(choices_table).choices) == list(range(1, 61))


def test_a_shipped_table_is_loaded_and_the_users_own_stands(choices_table, tmp_path):
    shipped = tmp_path / "shipped.json"
    larger = replace(PROBLEM, batch=64)
    rows = row_of(PROBLEM, "own", own=1.0), row_of(larger, "own", own=1.0), replace(row_of(PROBLEM), machine="another")
    update(shipped, lambda old: Contents(tuple(rows)))
    choices.record([row_of(PROBLEM)])
    assert rf.load_choices(shipped) == 2
    assert choices.lookup("inference", PROBLEM).choice == "cpu" and choices.lookup("inference", larger).choice == "own"
    assert len(read(choices_table).choices) == 1, "it is this process's alone"
    shipped.write_text("{")
    with pytest.raises(ValueError, match="is no table of choices"):
        rf.load_choices(shipped)


def test_tiles_and_choices_share_the_file(choices_table, monkeypatch):
    tiles = pytest.importorskip("res2net_fused.backends.triton.tiles")
    tile = tiles.Row(tiles.Shape("step", (9, 0), "half", 26, 26, 900), tiles.Tile(64, 32, 32, 4, 3))
    choices.record([row_of(PROBLEM)])
    tiles.write(tiles.user_path(), [tile])
    choices.record([row_of(replace(PROBLEM, batch=1))])
    assert tiles.user_path() == choices_table and tiles.read(choices_table) == [tile] and tiles.lookup(tile.shape) == tile.tile
    monkeypatch.setenv(choices.MODE_VARIABLE, "predicted")
    assert tiles.lookup(tile.shape) is None
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(choices_table))  # which somebody asked for
    tiles.forget()
    assert tiles.lookup(tile.shape) == tile.tile
    assert len(read(choices_table).choices) == 2
    tiles.forget()


def test_fake_tensors_of_a_device_that_is_not_there(choices_table):
    choices.record([row_of(PROBLEM)])
    if not torch.cuda.is_available():
        assert choices.lookup("inference", replace(PROBLEM, device=torch.device("cuda", 0))) is None
