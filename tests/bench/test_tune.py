"""`res2net-fused tune` with launches and a clock that are made up, and faults planted: nothing here needs a GPU or compiles."""

import json

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from res2net_fused._timing import Contender, Timing
from res2net_fused.backends.triton.launch import KernelCall
from res2net_fused.backends.triton.tiles import DTYPE_CLASSES, Row, Shape, Tile, read, write
from res2net_fused.bench import tune, turns
from res2net_fused.testing.cases import DEFAULT_CONFIGS, Case, WidthScale, cases
from res2net_fused.testing.parity import ParityReport, ParityRow

pytestmark = pytest.mark.usefixtures("user_table")

CASE = Case("block", WidthScale(26, 4), 4, 1, "float16", "cpu")


def jobs():
    return list(tune.jobs(cases(("block",), [WidthScale(26, 4)], [1], "float16", "cpu")))


def test_jobs_are_the_distinct_launches_of_the_blocks():
    found = jobs()
    assert len({job.shape for job in found}) == len(found)
    assert {job.shape.kernel for job in found} == {"step", "pointwise"}
    assert {job.shape.width for job in found if job.shape.kernel == "step"} == {26, 52, 104, 208}


def test_another_tile_covers_the_same_work():
    for job in jobs():
        call = job.with_tile(Tile(16, 16, 16, 1, 2))
        columns = call.arguments.get("OUT_CHANNELS" if job.shape.kernel == "pointwise" else "CHANNELS")
        tasks = 1 if job.shape.kernel == "pointwise" else call.arguments["STEPS"] + call.arguments["PASSES"]
        assert call.programs == tasks * -(-call.arguments["pixels"] // 16) * -(-columns // 16)
        assert job.with_tile(job.tile).programs == job.call.programs


@pytest.mark.parametrize("kind", DTYPE_CLASSES)
@pytest.mark.parametrize("width", [4, 26, 208, 2048])
def test_sensible_tiles_are_many_and_valid(kind, width):
    found = list(tune.sensible_tiles(Shape("pointwise", (9, 0), kind, width, width, 1000)))
    assert len(found) == len(set(found)) > 5 and all(tile.block_n <= max(16, 2 * width) for tile in found)


def test_candidates_are_near_and_fit():
    for job in jobs():
        near, fitting = tune.candidates(job), tune.candidates(job, 30_000)
        assert near[0] == fitting[0] == job.tile and len(near) == len(set(near)) > 5
        assert set(fitting[1:]) < set(near) <= {job.tile, *tune.sensible_tiles(job.shape)}
        tile = Tile(64, 64, 64, 4, 4)
        assert tile not in fitting[1:]  # 48 KB for three of its stages


def test_the_default_takes_minutes():
    found = list(tune.jobs(cases(("block",), DEFAULT_CONFIGS, [32], "bfloat16", "cpu", ("normal", "stage"))))
    text = tune.arithmetic(found, 227 * 1024, 16)
    assert text.startswith("67 shapes; of 28,782 sensible tiles 1,899 fit") and text.endswith("about 6 minutes"), text


# Measuring ------------------------------------------------------------------------------------------------------------


def tile_of(call):
    return Tile(*(call.arguments[f"BLOCK_{x}"] for x in "MNK"), call.options["num_warps"], call.options["num_stages"])


def key_of(call):
    """A launch's kernel, and its tile."""
    return call.arguments.get("OUT_CHANNELS") if "IN_CHANNELS" in call.arguments else "step", tile_of(call)


class World:
    """Launches write ones; `faults`: what happens to a tile of a shape instead, an error or a value."""

    def __init__(self, table):
        self.table, self.faults, self.compiling, self.timed, self.written = table, {}, {}, [], []

    def launch(self, call):
        value = self.faults.get(key_of(call), 1.0)
        if isinstance(value, Exception):
            raise value
        for name in ("out", "scratch"):
            if value is not None and call.arguments.get(name) is not None:
                call.arguments[name].fill_(value)

    def compile(self, call):
        error = self.compiling.get(key_of(call))
        if error:
            raise error

    def measure(self, contenders, device, **_):
        """The narrower the faster; the present tiles are among the slower ones."""
        found = {}
        for tile in contenders:
            contenders[tile].run()
            ms = float(tile.block_m * tile.block_n + tile.block_k + tile.warps + tile.stages)
            found[tile] = Timing(ms, ms, ms, 1, 0.0)
        self.timed.append(set(found))
        return found

    def tune(self, case=CASE):
        """Whether a new process has to go on, and what the record says then."""
        again = tune.measure_tiles([case], "cpu", self.table, "tune", 60, float("inf"))
        return again, json.loads(self.table.with_name("tiles.tuning.json").read_text())["environment"]["failures"]


@pytest.fixture
def world(monkeypatch, user_table):
    world = World(user_table)
    write(user_table, [])
    monkeypatch.setattr(KernelCall, "launch", lambda call: world.launch(call))
    monkeypatch.setattr(tune, "GraphedContender", lambda model, inputs, _: Contender(model, inputs))
    monkeypatch.setattr(tune.Tuner, "_compile_one", lambda _, call: world.compile(call))
    monkeypatch.setattr(tune, "shared_memory", lambda _: None)
    monkeypatch.setattr(tune, "check_case", lambda *_: ParityReport())
    monkeypatch.setattr(turns, "measure", world.measure)
    return world


def block():
    return [job for job in tune.block_jobs(CASE) if isinstance(job, tune.Job)]


def quickest(job, but=()):
    tiles = [tile for tile in tune.candidates(job) if tile not in but]
    return min(tiles, key=lambda t: t.block_m * t.block_n + t.block_k + t.warps + t.stages)


def test_the_fastest_tile_of_each_shape_is_kept_at_once(world, monkeypatch):
    lengths = []
    monkeypatch.setattr(tune, "write", lambda table, rows: lengths.append(len(rows)) or write(table, rows))
    expected = {job.shape: quickest(job) for job in block()}
    assert world.tune() == (False, {})
    assert {row.shape: row.tile for row in read(world.table)} == expected
    assert lengths == [1, 2, 3] and len(world.timed) == 3  # conv1, the chain, conv3


def test_what_the_table_has_is_not_measured_again(world):
    (first, *others) = {job.shape: job for job in block()}.values()
    write(world.table, [Row(first.shape, first.tile)])
    world.tune()
    assert len(world.timed) == len(others) and Row(first.shape, first.tile) in read(world.table)
    world.tune()
    assert len(world.timed) == len(others)


@pytest.mark.parametrize("value", [1.03, float("nan"), None], ids=["other", "nan", "nothing"])
def test_a_wrong_tile_is_never_chosen(world, value):
    """None: it writes nothing, where what it should have written lies there already."""
    job = block()[0]
    world.faults[key_of(job.with_tile(quickest(job)))] = value
    again, failures = world.tune()
    assert not again and all("something else than the present tile" in reason for reason in failures.values())
    assert list(failures) == [tune._name(job.shape, quickest(job))]
    assert Row(job.shape, quickest(job, but=[quickest(job)])) in read(world.table)
    assert quickest(job) not in world.timed[0]


ERRORS = [RuntimeError("LLVM failed"), torch.OutOfMemoryError("CUDA out of memory"), ValueError("expected a power of two")]


@pytest.mark.parametrize("where", ["compiling", "faults"])
@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_tile_that_fails_fails_alone(world, where, error):
    job = block()[0]
    getattr(world, where)[key_of(job.with_tile(quickest(job)))] = error
    again, failures = world.tune()
    assert not again and str(error) in failures[tune._name(job.shape, quickest(job))]
    assert Row(job.shape, quickest(job, but=[quickest(job)])) in read(world.table) and len(read(world.table)) == 3


def test_a_tile_that_does_not_fit_is_no_failure(world):
    job = block()[0]
    world.faults[key_of(job.with_tile(quickest(job)))] = OutOfResources(300_000, 232_448, "shared memory")
    assert world.tune() == (False, {}) and len(read(world.table)) == 3


def test_a_lost_context_asks_for_a_process_that_goes_on(world):
    job = block()[1]
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    world.faults[key_of(job.with_tile(quickest(job)))] = error
    name, next_best = tune._name(job.shape, quickest(job)), quickest(job, but=[quickest(job)])
    again, failures = world.tune()
    assert again and list(failures) == [name] and len(read(world.table)) == 1
    again, failures = world.tune()
    assert not again and list(failures) == [name]
    assert Row(job.shape, next_best) in read(world.table) and len(read(world.table)) == 3


def test_present_tiles_that_are_wrong_are_no_baseline(world, monkeypatch):
    miss = ParityRow("block", "26w4s", "4 normal", 1, "triton", "float16", 0.5, 1e-4, 2e-3)
    monkeypatch.setattr(tune, "check_case", lambda *_: ParityReport([miss]))
    again, failures = world.tune()
    assert not again and len(failures) == 3 and "the present tiles are wrong" in next(iter(failures.values()))
    assert read(world.table) == [] and world.timed == []


def test_a_compiler_that_ended_the_process_is_called_tile_by_tile(world, monkeypatch):
    """Which of the tiles it was is not known where all compile at once."""
    record = tune.open_record(world.table, "cpu", "tune")
    record.mark(f"compiling all tiles for {CASE}", limit_s=1)
    record.close()
    running = []
    compile_one = lambda tuner, call: running.append((tuner.record.running, tile_of(call)))  # noqa: E731
    monkeypatch.setattr(tune.Tuner, "_compile_one", compile_one)
    again, failures = world.tune()
    assert not again and len(failures) == 1 and len(read(world.table)) == 3
    assert all(len(names) == 1 and names[0].endswith(tune.tile_name(tile)) for names, tile in running)


def test_a_table_of_another_version_is_kept(world, capsys):
    world.table.write_text('{"version": 9}')
    assert tune._known(world.table) == []
    kept = world.table.with_name("tiles.json.before")
    assert kept.read_text() == '{"version": 9}' and not world.table.exists()
    assert str(kept) in capsys.readouterr().err
    world.table.write_text("[]")
    tune._known(world.table)
    assert kept.read_text() == '{"version": 9}' and world.table.with_name("tiles.json.before1").read_text() == "[]"


def test_tiles_need_a_gpu(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA device"):
        tune.run_tune([], "cpu", tmp_path / "tiles.json", "tune", [], 1.0, False)
