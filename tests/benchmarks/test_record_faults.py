"""What a record does with candidates that are wrong, raise, hang or end their process: planted on the CPU."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import record.__main__ as recorder
import torch
from record import roofline
from record import runner as record_networks
from record_cases import ROOT, conditions, quick_case, record_runner, run_child

from res2net_fused import _timing as timing
from res2net_fused.bench import candidates, results, runner, supervise, training, turns
from res2net_fused.bench.timed_case import TimedCase
from res2net_fused.testing.cases import WidthScale
from res2net_fused.testing.cuda_errors import poisons_context

# What is wrong is not timed -------------------------------------------------------------------------------------------


def wrong(monkeypatch, backend, factor=1.001):
    """What a backend of ours computes is off by a thousandth."""
    right = candidates.fused

    def planted(module, name):
        model = right(module, name)
        return model if name != backend else lambda x: model(x) * factor

    monkeypatch.setattr(candidates, "fused", planted)


CANDIDATES = tuple((name, False) for name in ("ours", "reference", "cpu"))
BACKENDS = TimedCase("chain", WidthScale(26, 4), 4, "normal", 1, "float32", CANDIDATES)


def test_a_miss_bars_its_backend_alone(timed, record, monkeypatch):
    wrong(monkeypatch, "cpu")
    outcome = record_runner(record).time(BACKENDS)
    assert timed == [{"reference"}]  # auto takes cpu
    assert set(outcome.failures) == {f"{BACKENDS}, ours", f"{BACKENDS}, cpu"} == set(record.failures)
    assert "relative error is 0.001; at most 5e-06" in outcome.failures[f"{BACKENDS}, cpu"]


def test_a_backend_by_name_leaves_the_others_checked(timed, record, monkeypatch):
    wrong(monkeypatch, "cpu")
    outcome = record_runner(record, backend="reference").time(BACKENDS)
    assert timed == [{"ours", "reference"}] and set(outcome.failures) == {f"{BACKENDS}, cpu"}


def test_a_peer_has_to_compute_the_same(timed, record, monkeypatch):
    provider = runner.PROVIDERS["eager_channels_last"]
    planted = replace(provider, build=lambda module, _: lambda x: module(x) * 1.001)
    monkeypatch.setitem(runner.PROVIDERS, "eager_channels_last", planted)
    outcome = record_runner(record).time(quick_case("chain"))
    assert timed == [{"ours"}] and len(outcome.failures) == 1


class Replay(timing.Contender):
    """A graph that holds nothing, or whose only result is that of its capture."""

    outputs_of: str

    def __init__(self, model, inputs, min_calls=1):
        super().__init__(model, inputs)
        self._kept = super().outputs()

    def run(self):
        return None

    def outputs(self):
        return [torch.full_like(out, float("nan")) for out in self._kept] if self.outputs_of == "nobody" else self._kept


@pytest.mark.parametrize("outputs_of", ["nobody", "the capture"])
def test_an_empty_graph_is_no_result(timed, record, monkeypatch, outputs_of):
    monkeypatch.setattr(Replay, "outputs_of", outputs_of, raising=False)
    monkeypatch.setattr(runner, "GraphedContender", Replay)
    case = replace(quick_case("chain"), candidates=(("ours", True), ("ours", False)))
    outcome = record_runner(record).time(case)
    assert [r["graph"] for r in outcome.rows] == [False]
    assert "wrong 3 normal" in outcome.failures[f"{case}, ours in a CUDA graph"]


@pytest.mark.parametrize("image", [0, 21, 39])
def test_all_images_of_a_batch_are_looked_at(timed, record, monkeypatch, image):
    """A batch as it is timed; one image that nobody wrote."""
    right = candidates.fused

    def planted(module, name):
        model, seen = right(module, name), []

        def call(x):
            seen.append(len(x))
            assert set(seen) == {40}
            out = model(x).clone()
            out[image, 5, 0, 0] = float("nan")
            return out

        return call

    monkeypatch.setattr(candidates, "fused", planted)
    outcome = record_runner(record).time(replace(quick_case("chain"), stage=4, batch=40))
    assert timed == [{"eager_channels_last"}] and "wrong" in next(iter(outcome.failures.values()))


def test_a_wrong_compiled_network_is_noticed(timed, record, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda x: network(x) * 1.001)
    timer = record_runner(record)
    monkeypatch.setattr(timer, "_compiles", lambda case: True)
    outcome = timer.time(quick_case("network"))
    assert compiled is not torch.compile and timed == [{"eager_channels_last"}]
    assert "wrong logits" in outcome.failures[f"{quick_case('network')}, ours"]


def test_a_network_whose_blocks_are_not_fused_is_not_timed(timed, record, monkeypatch):
    monkeypatch.setattr(record_networks, "accelerate", lambda network, _: network)
    outcome = record_runner(record).time(quick_case("network"))
    assert timed == [{"eager_channels_last"}] and "fused" in next(iter(outcome.failures.values()))


def test_training_is_checked_at_its_own_batch(timed, record, monkeypatch):
    """The second weight's gradient is off by a thousandth where the batch is the one that is timed."""
    own, seen = training.TrainingStep.gradients, set()

    def planted(step, x, grad=None):
        out, *gradients = own(step, x, grad)
        if step.forward.backend is not None and len(x) == 6:
            gradients[2] *= 1.001
        seen.add(len(x))
        return out, *gradients

    monkeypatch.setattr(training.TrainingStep, "gradients", planted)
    case = replace(quick_case("train_chain"), batch=6)
    outcome = record_runner(record).time(case)
    assert timed == [{"eager_channels_last"}] and "wrong 4 normal, gradients" in outcome.failures[f"{case}, ours"]
    assert seen == {3, 6}  # float64 and eager's error are taken of the different ones


@pytest.mark.parametrize("always", [False, True], ids=["flipped ReLU", "wrong kernel"])
def test_gradients_that_a_flipped_relu_explains_are_compared_on_other_images(timed, record, monkeypatch, always):
    """A block's are off by a hundredth on the first images, as where rounding decides a ReLU otherwise, or on all."""
    own, make, compared, modules = training.TrainingStep.gradients, candidates.training_module, [], []

    def planted(step, x, grad=None):
        out, *gradients = own(step, x, grad)
        if grad is not None and modules and step.forward is modules[0]:
            compared.append(x)
            if always or len(compared) == 1:
                gradients[3] *= 1.01
        return out, *gradients

    def noted(case, name, backend):
        module = make(case, name, backend)
        if name == "ours":
            modules.append(module)
        return module

    monkeypatch.setattr(training.TrainingStep, "gradients", planted)
    monkeypatch.setattr(candidates, "training_module", noted)
    case = quick_case("train_block")
    outcome = record_runner(record).time(case)
    if always:
        assert timed == [{"eager_channels_last"}] and len(compared) == 6
        assert "wrong 4 normal, gradients" in outcome.failures[f"{case}, ours"]
    else:
        assert timed == [{"eager_channels_last", "ours"}] and not outcome.failures and len(compared) >= 2
    assert not torch.equal(compared[0], compared[1])


@pytest.mark.parametrize("always", [False, True], ids=["flipped ReLU", "wrong kernel"])
def test_a_step_that_a_flipped_relu_explains_is_compared_on_other_images(timed, record, monkeypatch, always):
    """All of a network's gradients are off by three hundredths where it is compared first, or always."""
    right, steps = candidates.training_network, []

    def planted(network, name, backend):
        model = right(network, name, backend)
        if name == "ours":
            model.register_forward_pre_hook(lambda _, images: steps.append(images[0]))
            for parameter in model.parameters():  # the first step is no comparison, but warms up
                parameter.register_hook(lambda grad: 1.03 * grad if always or len(steps) == 2 else grad)
        return model

    monkeypatch.setattr(candidates, "training_network", planted)
    case = replace(quick_case("train_step"), candidates=(("ours", False),))
    outcome = record_runner(record).time(case)
    if always:
        assert "wrong gradients: its relative error is 0.03" in outcome.failures[f"{case}, ours"] and len(steps) == 7
    else:
        assert not outcome.failures and len(steps) >= 3
    assert not torch.equal(steps[1], steps[2]) and steps[1].shape == steps[2].shape


def test_copies_of_images_train_as_a_whole_batch():
    """What the checks rest on: float64 of the few images is float64 of the batch."""
    case = replace(candidates.module_case(quick_case("train_chain"), conditions()), batch=8)
    (x,) = training.plain(case).inputs()
    copies = training.Copies(x, 8)
    assert copies.count == 2 and not torch.equal(copies.index, torch.arange(8) % 4)
    exact = training.training_module(case, "eager_channels_last", "").double()
    few, grad = copies.few.double(), torch.randn(exact(copies.few.double()).shape, dtype=torch.float64)
    step = training.TrainingStep(exact, "float32")
    out, of_x, *gradients = step.gradients(few, grad)
    whole, of_whole, *of_parameters = step.gradients(copies.spread(few), copies.spread(grad))
    assert copies.error(whole, out) < 1e-13 and copies.error(of_whole, of_x) < 1e-12
    for a, b in zip(of_parameters, gradients, strict=True):
        torch.testing.assert_close(a, 2 * b)
    assert torch.equal(copies.first(whole), whole[[int((copies.index == i).nonzero()[0]) for i in range(4)]])


def test_a_wrong_training_step_is_not_timed_under_its_own_name(timed, record, monkeypatch):
    """`cpu` asked for by name, where `ours` is right: its step does not move one layer's parameters."""
    right = candidates.training_network

    def planted(network, name, backend):
        model = right(network, name, backend)
        if name == "cpu":
            model.get_parameter("layer1.0.conv1.weight").register_hook(lambda grad: 3 * grad)
        return model

    monkeypatch.setattr(candidates, "training_network", planted)
    case = replace(quick_case("train_step"), candidates=(("ours", False), ("cpu", False)))
    outcome = record_runner(record).time(case)
    assert [r["provider"] for r in outcome.rows if r["config"] != "resnet50"] == ["ours"]
    assert "wrong gradients" in outcome.failures[f"{case}, cpu"]


# Faults ---------------------------------------------------------------------------------------------------------------

FAULTS = {
    "compile error": RuntimeError("at 10:4: expected a power of two"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "CUDA": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "Triton": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
}


def plant(monkeypatch, error, after):
    """Ours of the first case raises at this call."""
    right = candidates.fused

    def planted(module, name):
        model, calls = right(module, name), []

        def call(x):
            calls.append(x)
            if len(calls) == after and x.shape[-1] == 14:
                raise error
            return model(x)

        return call

    monkeypatch.setattr(candidates, "fused", planted)


# The first call warms up, then each of 4 inputs is checked and the first again, from poisoned memory; the last ones are timed.
@pytest.mark.parametrize("fault, after", [("memory", 1), ("compile error", 3), ("memory", 8), ("CUDA", 1), ("Triton", 8)])
def test_a_fault_is_a_recorded_failure(tmp_path, timed, monkeypatch, fault, after):
    error, path = FAULTS[fault], tmp_path / "record.json"
    plant(monkeypatch, error, after)
    lost = poisons_context(error)
    assert run_child(path, "--part", "chain") == (supervise.AGAIN if lost else 0)
    if lost:  # nothing else of this process counts
        assert len(results.read(path)["rows"]) == 0
        assert run_child(path, "--part", "chain") == 0
    data = results.read(path)
    assert [(r["stage"], r["provider"]) for r in data["rows"]] == [
        (3, "eager_channels_last"), (4, "ours"), (4, "eager_channels_last"),
    ]  # fmt: skip
    ((name, reason),) = data["environment"]["failures"].items()
    assert name == f"{quick_case('chain')}, ours" and str(error) in reason


def test_what_all_contestants_share_fails_for_all(tmp_path, timed, monkeypatch):
    def inputs(shape, *_):
        if shape[-1] == 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(shape, *_)

    own = runner.random_tensors
    monkeypatch.setattr(runner, "random_tensors", inputs)
    assert run_child(tmp_path / "record.json", "--part", "chain") == 0
    data = results.read(tmp_path / "record.json")
    assert {r["stage"] for r in data["rows"]} == {4} and len(data["environment"]["failures"]) == 2


def test_rates_that_cannot_be_measured_stop_nothing(tmp_path, timed, monkeypatch):
    monkeypatch.setattr(roofline, "measure_rates", lambda *_: 1 / 0)
    assert run_child(tmp_path / "record.json", "--part", "chain") == 0
    data = results.read(tmp_path / "record.json")
    assert len(data["rows"]) == 4 and recorder.RATES in data["environment"]["failures"]


PLANTED = """
import os, signal, sys, time
if "--child" in sys.orig_argv:
    import torch
    from res2net_fused.bench import candidates, runner
    right = candidates.case_builders

    def planted(case, module, conditions):
        build = right(case, module, conditions)

        def at(name, graph):
            model = build(name, graph)
            if name != "ours":
                return model
            where = case.workload, case.stage, case.variant
            if where == ("chain", 3, "normal"):
                os.kill(os.getpid(), signal.SIGKILL)
            if where == ("chain", 4, "normal"):
                time.sleep(600)
            if where == ("block", 4, "normal"):
                raise RuntimeError("CUDA error: unspecified launch failure")
            return candidates.Model(lambda x: model.call(x) * 1.001, model.facts)

        return at

    runner.case_builders = planted
"""


@pytest.mark.slow  # a minute; each fault alone is above
def test_a_call_goes_on_behind_whatever_ends_its_processes(tmp_path):
    """SIGKILL, a hang, a lost context and a wrong result, each in its case; then a second call."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    path = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "record"), "--device", "cpu", "--quick", "--no-build"]
    command += ["--part", "chain", "--part", "block", "--limit", "12", "--out", str(path)]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    data = results.read(path)
    assert [r["provider"] for r in data["rows"]] == ["eager_channels_last"] * 4
    reasons = list(data["environment"]["failures"].values())
    for reason, words in zip(reasons, ("SIGKILL", "hung for 12 s", "unspecified launch failure", "wrong 4 stage"), strict=True):
        assert words in reason
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 1 and "0 cases to go" in again.stdout and "SIGKILL" in again.stdout
    assert results.read(path)["rows"] == data["rows"]
    assert [p.name for p in tmp_path.glob("record*")] == ["record.json"]


def test_whoever_is_timed_is_marked(record):
    """Each of them, in every round; and nobody behind them."""
    seen = []

    class Contender(timing.Contender):
        def run(self):
            seen.append((self.model(None), record.running))

    contenders = {name: Contender(lambda _, name=name: name, [torch.zeros(1)]) for name in ("a", "b")}
    names = {name: f"case, {name}" for name in contenders}
    settings = {"seconds": 0, "min_repeats": 2, "max_repeats": 2, "warm_up": 1}
    with turns.noted(record, [], turns.Outcome(), 10):
        turns.take_turns(contenders, names, record, turns.Outcome(), "cpu", 10, settings)
    assert len(seen) == 6 and all(running == [names[name]] for name, running in seen) and not record.running
