"""`res2net-fused bench` as a whole: what goes wrong costs its contender alone; a call goes on where the last one stopped."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from res2net_fused import cli
from res2net_fused.backends import choices
from res2net_fused.backends.choices_file import Row
from res2net_fused.backends.reference import BACKEND as reference_backend
from res2net_fused.bench import candidates, neighbours, providers, results, run, runner, supervise
from res2net_fused.bench.supervise import AGAIN
from res2net_fused.testing import cases

SPEED_UP = re.compile(r"\d\.\d\dx")
FILE = "bench-cpu.json"


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """Runs bench on the chain and the block of 14w8s at stage 4; exit status, what it printed, and the file."""
    monkeypatch.setattr(cases, "STAGES", (4,))
    monkeypatch.setattr(run, "_draw", lambda data, path: None)
    before = torch.get_num_threads()

    def bench(*arguments):
        common = ["bench", "--quick", "--batch", "1", "--device", "cpu", "--no-network", "--threads", "1"]
        status = cli.main([*common, "--configs", "14w8s", "--out", str(tmp_path), *arguments])
        return status, capsys.readouterr().out, results.read(tmp_path / FILE)

    yield bench
    torch.set_num_threads(before)


@pytest.fixture
def timed(monkeypatch):
    """The cases that were timed."""
    seen, time = [], runner.Runner.time

    def noted(self, case):
        seen.append(str(case))
        return time(self, case)

    monkeypatch.setattr(runner.Runner, "time", noted)
    return seen


def cells(data):
    return {(row["workload"], row["provider"]) for row in data["rows"]}


@pytest.mark.parametrize(("mode", "backend"), [(None, "cpu"), ("tuned", "reference")])
def test_what_was_measured_here_decides_no_published_figure(bench, choices_table, monkeypatch, mode, backend):
    """But where RES2NET_FUSED_CHOICE asks for it, and then the file says so."""
    case = cases.Case("chain", cases.WidthScale(14, 8), 4, 1, "float32", "cpu")
    problem = case.problem(case.module())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    machine = choices.machine(torch.device("cpu"))
    torch.set_num_threads(threads)
    ms = {"reference": 1.0, "cpu": 2.0}
    choices.record([Row(machine, choices.kind_of("inference", problem), choices.size_of(problem), "reference", ms, {})])
    if mode is not None:
        monkeypatch.setenv(choices.MODE_VARIABLE, mode)
    _, _, data = bench()
    assert {row["backend"] for row in data["rows"] if (row["workload"], row["provider"]) == ("chain", "ours")} == {backend}
    assert data["environment"]["choice"] == (mode or "predicted") and choices.mode() == "tuned"


def test_neighbours_keep_a_processor_busy_each_while_cases_are_timed(bench, monkeypatch, tmp_path):
    """And no longer, also where timing raises; the file has a name of its own, and says how many there were."""
    alive, time = [], runner.Runner.time
    started, popen = [], subprocess.Popen

    def noted(self, case):
        alive.append([one.poll() for one in started])
        return time(self, case)

    def start(command, **options):
        process = popen(command, **options)
        if neighbours._SPIN in command:
            started.append(process)
        return process

    monkeypatch.setattr(runner.Runner, "time", noted)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(run, "_time_networks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench("--busy", "2")
    assert alive == [[None, None]] * 2 and [one.poll() for one in started] == [0, 0]
    data = results.read(tmp_path / "bench-cpu-busy2.json")
    assert data["environment"]["settings"]["busy"] == 2 and data["rows"]


def replaced(monkeypatch, name, wrap):
    """The provider with the model that `wrap` makes of its own."""
    own = providers.PROVIDERS[name]
    build = lambda module, backend: wrap(own.build(module, backend))  # noqa: E731
    monkeypatch.setitem(providers.PROVIDERS, name, replace(own, build=build))


EVERYTHING = {(workload, name) for workload in ("chain", "block") for name in ("eager", "eager_channels_last", "ours")}

# Faults ---------------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Raises from call number `good` on, of blocks alone."""

    def __init__(self, model, good):
        super().__init__()
        self.model, self.good, self.calls = model, good, 0

    def forward(self, x):
        self.calls += 1
        if x.shape[1] == 2048 and self.calls > self.good:
            raise RuntimeError("it broke")
        return self.model(x)


@pytest.mark.parametrize("good", [0, 1, 5], ids=["warming up", "being checked", "being timed"])
def test_a_fault_costs_its_contender_alone(bench, monkeypatch, good):
    replaced(monkeypatch, "eager_channels_last", lambda model: Broken(model, good))
    status, printed, data = bench()
    assert status == 1
    assert cells(data) == EVERYTHING - {("block", "eager_channels_last")}
    assert data["environment"]["failures"] == {
        "block 14w8s stage 4 batch 1 float32, eager_channels_last": "RuntimeError: it broke"
    }
    assert "failed, block 14w8s stage 4 batch 1 float32, eager_channels_last: RuntimeError: it broke" in printed
    assert len(SPEED_UP.findall(printed)) == 2  # of the chain and of the block


def test_a_fault_of_the_build_costs_its_contender_alone(bench, monkeypatch):
    def refuse(model):
        raise KeyError("no such compiler")

    replaced(monkeypatch, "eager", refuse)
    status, _, data = bench()
    assert status == 1 and cells(data) == {cell for cell in EVERYTHING if cell[1] != "eager"}
    assert all("KeyError" in reason for reason in data["environment"]["failures"].values())


def test_no_speed_up_on_a_red_gate(bench, monkeypatch):
    """What is not verified is not timed, whoever it is."""
    right = reference_backend.forward

    def forward(problem, x, *rest):
        out = right(problem, x, *rest)
        out[:, -1] += 0.01
        return out

    monkeypatch.setattr(reference_backend, "forward", forward)
    status, printed, data = bench("--backend", "reference")
    assert status == 1
    assert cells(data) == {cell for cell in EVERYTHING if cell[1] != "ours"}
    assert len(data["environment"]["failures"]) == 2
    assert all(re.search(r"relative error is .*; at most", why) for why in data["environment"]["failures"].values())
    assert "relative error is" in printed and not SPEED_UP.search(printed)


def test_a_peer_that_computes_something_else_is_not_timed(bench, monkeypatch):
    replaced(monkeypatch, "eager", lambda model: lambda x: model(x) * 1.001)
    status, _, data = bench()
    assert status == 1 and cells(data) == {cell for cell in EVERYTHING if cell[1] != "eager"}


def test_memory_that_nobody_wrote_is_not_timed(bench, monkeypatch):
    """A kernel that is not launched leaves what lies there, which may be what the last call left."""
    own = candidates.fused

    def fused(module, backend):
        model = own(module, backend)
        return lambda x: (model(x), torch.empty_like(x))[1]

    monkeypatch.setattr(candidates, "fused", fused)
    _, _, data = bench()
    assert not {("chain", "ours"), ("block", "ours")} & cells(data) and len(data["environment"]["failures"]) == 2


def test_a_backend_that_can_run_nothing_is_refused_before(bench, timed, tmp_path):
    with pytest.raises(FileNotFoundError):
        bench("--backend", "cuda")
    assert not timed and not list(tmp_path.iterdir())


# Several calls --------------------------------------------------------------------------------------------------------


def test_the_file_grows_case_by_case(bench, monkeypatch, tmp_path):
    """The call that is interrupted in its second case leaves the first one's rows, and the next call adds the others."""
    time, calls = runner.Runner.time, []

    def interrupted(self, case):
        calls.append(str(case))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return time(self, case)

    monkeypatch.setattr(runner.Runner, "time", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench()
    first = results.read(tmp_path / FILE)
    assert cells(first) == {cell for cell in EVERYTHING if cell[0] == "chain"}
    status, _, data = bench()
    assert status == 0 and cells(data) == EVERYTHING and not data["environment"]["failures"]
    assert [row for row in data["rows"] if row["workload"] == "chain"] == first["rows"]
    assert [name.split()[0] for name in calls] == ["chain", "block", "block"]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_whoever_ran_when_a_process_died_is_not_tried_again(bench, timed, tmp_path):
    bench()
    data = json.loads((tmp_path / FILE).read_text())
    data["rows"] = [row for row in data["rows"] if row["workload"] == "chain"]
    (tmp_path / FILE).write_text(json.dumps(data))
    name = "block 14w8s stage 4 batch 1 float32, eager"
    (tmp_path / f"{FILE}.running").write_text(json.dumps({"count": 7, "names": [name], "limit_s": 9}))
    timed.clear()
    status, printed, data = bench()
    assert status == 1 and len(timed) == 1
    assert cells(data) == EVERYTHING - {("block", "eager")}
    assert f"failed, {name}: its process ended while it ran" in printed
    timed.clear()
    status, printed, data = bench()  # goes on: nothing is left
    assert status == 1 and not timed and "--again" in printed and cells(data) == EVERYTHING - {("block", "eager")}
    status, _, data = bench("--again")
    assert status == 0 and len(timed) == 2 and cells(data) == EVERYTHING and not data["environment"]["failures"]


@pytest.mark.parametrize("arguments, file", [((), None), (("--backend", "reference"), None), ((), "no JSON"), ((), "{}")])
def test_what_is_complete_or_something_else_is_measured_anew(bench, timed, tmp_path, arguments, file):
    """The old file is kept."""
    bench()
    if file is not None:
        (tmp_path / FILE).write_text(file)
    before = (tmp_path / FILE).read_bytes()
    timed.clear()
    status, _, data = bench(*arguments)
    assert status == 0 and len(timed) == 2 and cells(data) == EVERYTHING
    assert (tmp_path / f"{FILE}.before").read_bytes() == before


# Child processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def supervised(monkeypatch):
    """Whoever is supervised runs in this process, as often as it asks for, as on a GPU; gives the commands."""
    commands = []

    def supervised(command, path, **_):
        commands.append(command)
        while (status := ended(command[3:])) == AGAIN:
            pass
        return status

    def ended(arguments):
        try:
            return cli.main(arguments)
        except SystemExit as left:
            return left.code

    monkeypatch.setattr(run.BenchOptions, "cuda", property(lambda self: True))
    monkeypatch.setattr(run, "supervise", supervised)
    monkeypatch.setattr(run.native, "cuda_library", run.native.cpu_library)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    return commands


def test_a_lost_context_ends_its_process_alone(bench, monkeypatch, supervised, timed):
    def lose(x):
        if x.shape[1] == 2048:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    replaced(monkeypatch, "eager", lambda model: lambda x: lose(x) or model(x))
    status, printed, data = bench()
    assert status == 1
    ((command),) = supervised
    assert command[1:4] == ["-m", "res2net_fused", "bench"] and command[-1] == "--child"
    assert cells(data) == EVERYTHING - {("block", "eager")}
    assert [name.split()[0] for name in timed] == ["chain", "block", "block"]  # the second process begins with the block
    (reason,) = data["environment"]["failures"].values()
    assert "illegal memory access" in reason and "the CUDA context is lost" in printed
    assert data["environment"]["command"].endswith("--configs 14w8s --out " + command[-2])
    assert len(data["environment"]["runs"]) == 2


def test_what_a_child_refuses_is_the_exit_status(bench, monkeypatch, supervised):
    monkeypatch.setattr(run, "supervise", lambda command, path, **_: supervise.REFUSED)
    status, printed, data = bench()
    assert status == 2 and not data["rows"] and "Nothing was timed" in printed
