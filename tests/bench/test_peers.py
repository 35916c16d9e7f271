"""ONNX Runtime and OpenVINO as peers, whole networks in one run, and their ratios; fakes stand for runtimes that are absent."""

import importlib.util
import sys
import time
import types
from dataclasses import replace

import cpu
import pytest
import torch
from helpers import relative_error
from record import schedule
from record_cases import conditions

from res2net_fused import _timing as timing
from res2net_fused import cli
from res2net_fused.bench import floor, network_runner, networks, outcome, plot, providers, results, run, runner, runtimes
from res2net_fused.bench.network_runner import NetworkRunner, TurnConditions
from res2net_fused.bench.networks import DEFAULT_MODELS, NetworkCase
from res2net_fused.bench.record_file import Record
from res2net_fused.bench.timed_case import TimedCase
from res2net_fused.models.registry import list_models, model_name
from res2net_fused.testing import parity
from res2net_fused.testing.cases import Case, WidthScale
from res2net_fused.testing.parity import ParityReport

CASE = Case("block", WidthScale(14, 4), 4, 2, "float32", "cpu")


@pytest.fixture
def fake(monkeypatch):
    """Runtimes that are there and compute the module times `factor`; gives what was exported."""
    exported = []

    def install(factor=1.0):
        monkeypatch.setattr(runtimes, "why_not", lambda name, dtype: None)
        monkeypatch.setattr(runtimes, "export", lambda module, x, path: exported.append((module, tuple(x.shape))))
        for name in list(runtimes.RUNTIMES):
            monkeypatch.setitem(
                runtimes.RUNTIMES, name, lambda path, x, out, threads: lambda x, module=exported[-1][0]: module(x) * factor
            )
        return exported

    return install


@pytest.fixture
def one_thread():
    """What is not about speed need not wait at barriers between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_installed(monkeypatch):
    found = importlib.util.find_spec
    absent = ("onnx", "onnxscript", "onnxruntime", "openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))


# Runtimes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_a_model_is_exported_once_and_called(name, fake):
    exported = fake()
    module, inputs = CASE.module(), CASE.inputs(2)
    contender = providers.contender(name, module, inputs)
    outputs = [contender.run() for _ in range(2)]
    assert [shape for _, shape in exported] == [tuple(inputs[0].shape)]
    for x, out in zip(inputs, outputs, strict=True):
        assert relative_error(out, module(x)) <= 1e-6
    assert all(x.is_contiguous() for x in contender.inputs)


def test_a_model_that_computes_something_else_is_an_error(fake):
    fake(factor=1 + 1e-3)
    contender = providers.contender("openvino", CASE.module(), CASE.inputs())
    for _ in range(2):  # also at the second call
        with pytest.raises(RuntimeError, match="openvino computes something else: relative error 0.001"):
            contender.run()


def test_nan_is_an_error(fake):
    fake(factor=float("nan"))
    with pytest.raises(RuntimeError, match="relative error nan"):
        providers.contender("onnxruntime", CASE.module(), CASE.inputs()).run()


def test_inputs_that_would_be_copied_are_refused(fake):
    fake()
    model = runtimes.ExportedModel("onnxruntime", CASE.module())
    (x,) = CASE.inputs()
    model(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.double(), x[:1]):
        with pytest.raises(ValueError, match="onnxruntime was given a module for contiguous"):
            model(other)


def test_what_is_absent_says_so(nothing_installed, capsys):
    assert runtimes.why_not("openvino", "float32").startswith("not installed (openvino, onnx, onnxscript): pip install")
    assert set(providers.unavailable("cpu")) == set(runtimes.RUNTIMES)
    assert providers.unavailable("cuda")["tensorrt"].startswith("not installed (torch_tensorrt): pip install")
    assert not set(providers.select("cpu", "network", "all")) & set(runtimes.RUNTIMES)
    with pytest.raises(ImportError, match="onnxruntime: not installed"):
        providers.contender("onnxruntime", CASE.module(), CASE.inputs())
    rows = [network_row(provider=name) for name in ("eager", "ours")]
    outcome.print_outcome({"environment": results.environment("cpu", "x"), "rows": rows}, providers.unavailable("cpu"))
    out = capsys.readouterr().out
    assert "not timed, onnxruntime: not installed" in out and "not timed, openvino: not installed" in out


def test_runtimes_are_timed_where_they_are_installed(fake):
    fake()
    for workload in ("chain", "block", "network"):
        for peers in ("default", "all"):
            assert set(runtimes.RUNTIMES) <= set(providers.select("cpu", workload, peers))
            assert not set(runtimes.RUNTIMES) & set(providers.select("cpu", workload, peers, quick=True))
            assert not set(runtimes.RUNTIMES) & set(providers.select("cuda", workload, peers))
    of_networks = set(providers.select("cpu", "network", "all"))
    assert {"eager", "eager_channels_last", "compile_freezing", "ours_compile"} <= of_networks
    assert "ours_compile" not in providers.select("cpu", "block", "all")


def test_half_types_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "float32 only, not in bfloat16" in runtimes.why_not("openvino", "bfloat16")
    assert runtimes.why_not("openvino", "float32") is None


def test_versions_name_every_runtime():
    found = runtimes.versions()
    assert set(found) == set(runtimes.RUNTIMES)
    assert all(found.values())
    assert set(runtimes.versions("cuda:1")) == {"torch_tensorrt"}


def test_every_provider_has_a_colour_and_a_place_in_files():
    assert set(providers.PROVIDERS) <= set(results.PROVIDERS)
    assert set(results.PROVIDERS) <= set(plot._COLOURS)


@pytest.fixture
def tensorrt(monkeypatch):
    """A torch_tensorrt that runs what was traced; gives the options that it was compiled with."""
    seen = []

    def backend(graph, inputs, *, options):
        seen.append(options)
        return graph.forward

    found = importlib.util.find_spec
    specification = lambda name, *rest: name if name == "torch_tensorrt" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", specification)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    torch._dynamo.register_backend(backend, "torch_tensorrt")
    runtimes.why_not_tensorrt.cache_clear()
    yield seen
    runtimes.why_not_tensorrt.cache_clear()
    torch._dynamo.backends.registry._COMPILER_FNS.pop("torch_tensorrt", None)
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tensorrt_builds_the_module_in_its_own_precision(tensorrt, precision):
    (x,) = CASE.inputs()
    with parity.convolution_precision(precision, "cuda"):
        contender = providers.contender("tensorrt", CASE.module(), [x])
        assert relative_error(contender.run(), CASE.module()(x)) <= 1e-6
    (options,) = tensorrt
    assert options["disable_tf32"] is (precision == "float32") and options["use_explicit_typing"]
    assert options["pass_through_build_failures"]  # PyTorch does not run in its place


def test_a_tensorrt_that_cannot_be_imported_says_why(monkeypatch, tensorrt):
    monkeypatch.delitem(sys.modules, "torch_tensorrt")  # the specification is no real one
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(OSError("libnvinfer.so.10 not found")))
    reason = providers.unavailable("cuda")["tensorrt"]
    assert "cannot be imported" in reason and "libnvinfer" in reason
    assert "tensorrt" not in providers.select("cuda", "block", "all")
    with pytest.raises(ImportError, match="libnvinfer"):
        providers.contender("tensorrt", CASE.module(), CASE.inputs())


@pytest.mark.slow
@pytest.mark.parametrize("name", runtimes.RUNTIMES)
@pytest.mark.parametrize("workload, variant", [("chain", "normal"), ("block", "normal"), ("block", "stage")])
def test_real_runtimes(name, workload, variant):
    reason = runtimes.why_not(name, "float32")
    if reason is not None:
        pytest.skip(reason)
    case = Case(workload, WidthScale(14, 4), 4, 2, "float32", "cpu", variant)
    module, inputs = case.module(), case.inputs(2)
    contender = providers.contender(name, module, inputs)
    outputs = [contender.run() for _ in range(2)]
    for x, out in zip(inputs, outputs, strict=True):  # the first one is not overwritten by the second
        assert relative_error(out, module(x)) <= 1e-5


# Threads of others ----------------------------------------------------------------------------------------------------


def test_runs_wait_for_the_threads_of_others(monkeypatch):
    events = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: events.append("sleep"))
    monkeypatch.setattr(timing, "_LONG_MS", 0.0)  # every run is a long one: none is repeated

    def plain(x):
        events.append("plain")

    def foreign(x):
        events.append("foreign")

    contenders = {f.__name__: timing.Contender(f, [torch.ones(1)]) for f in (plain, foreign)}
    timing.measure(contenders, "cpu", seconds=0, min_repeats=1, warm_up=0)
    assert "sleep" not in events
    foreign.own_threads = True
    events.clear()
    timing.measure(contenders, "cpu", seconds=0, min_repeats=1, warm_up=0)
    assert events[-4:] == ["sleep", "plain", "sleep", "foreign"]
    monkeypatch.setattr(timing, "_LONG_MS", 1e9)  # every run is a short one: timed after one that wakes the threads
    timing.measure(contenders, "cpu", seconds=0, min_repeats=1, warm_up=0)
    assert events[-6:] == ["sleep", "plain", "plain", "sleep", "foreign", "foreign"]
    assert runtimes.ExportedModel.own_threads


def test_every_round_advances():
    rounds = []
    contenders = {"a": timing.Contender(lambda x: time.sleep(0), [torch.ones(1)])}
    timing.measure(contenders, "cpu", seconds=0, min_repeats=4, advance=lambda: rounds.append(1))
    assert len(rounds) == 4


# Networks -------------------------------------------------------------------------------------------------------------


def small_case(name="res2net50_26w4s"):
    """One block a stage on small images, not compared yet."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    network = networks.calibrate(networks.random_network(name, (1, 1, 1, 1)), images).requires_grad_(False)
    return NetworkCase(name, "float32", network, images)


def test_models():
    assert DEFAULT_MODELS == ("res2net50_26w4s", "res2net50_14w8s", "resnet50")
    assert networks.spelt("se_res2next29_6c_24w_4s") == networks.spelt("se_res2next29_6c24w4s") == "se_res2next29_6c24w4s"
    assert [model_name(networks.spelt(name)) for name in list_models()] == list_models()
    images = small_case().batch(5)
    assert images.shape[0] == 5 and torch.equal(images[:2], images[2:4]) and not torch.equal(images[0], images[1])
    assert small_case().batch(1).shape[0] == 1


@pytest.fixture
def time_networks(tmp_path, one_thread):
    """Networks timed at one batch by providers of these names: the outcome, and the record."""

    def run(cases, batch, names, repeats):
        record = Record(tmp_path / "record.json", results.environment("cpu", "x"))
        record.begin_run()
        conditions = TurnConditions("cpu", "auto", False, None, 1, seconds=0, rounds=(repeats, repeats))
        found = NetworkRunner(conditions, record).time_networks(cases, batch, providers.candidates(names, "cpu"))
        assert not record.running
        record.close()
        return found, record

    return run


def test_networks_take_turns(fake, time_networks):
    fake()
    cases = [small_case(name) for name in DEFAULT_MODELS]
    names = ["eager", "onnxruntime", "ours"]
    found, _ = time_networks(cases, 3, names, repeats=2)
    assert not found.failures
    results.validate({"environment": results.environment("cpu", "x"), "rows": found.rows})
    assert {(row["config"], row["provider"], row["batch"], row["repeats"]) for row in found.rows} == {
        (model, name, 3, 2) for model in DEFAULT_MODELS for name in names
    }
    assert all(0 <= row["error"] < 1e-4 for row in found.rows)
    assert {row["backend"] for row in found.rows if row["provider"] == "ours"} == {"cpu"}
    assert all(case.parity.ok and case.coverage == "4 of 4" for case in cases)


@pytest.mark.parametrize("provider", ["ours", "eager_channels_last"])
@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_network_that_is_wrong_as_timed_fails_alone(provider, fault, monkeypatch, time_networks):
    right = providers.PROVIDERS[provider]

    def build(module, backend):
        model = right.build(module, backend)
        return (lambda x: model(x) * 1.01) if fault == "wrong" else None

    monkeypatch.setitem(providers.PROVIDERS, provider, replace(right, build=build))
    found, record = time_networks([small_case()], 2, ["eager", "eager_channels_last", "ours"], repeats=1)
    ((name, reason),) = record.failures.items()
    assert name == f"network res2net50_26w4s batch 2 float32, {provider}"
    assert ("relative error is 0.01;" if fault == "wrong" else "TypeError") in reason
    assert {row["provider"] for row in found.rows} == {"eager", "eager_channels_last", "ours"} - {provider}


def test_ours_is_not_timed_on_a_network_whose_features_are_wrong(monkeypatch, time_networks):
    """At no batch; its peers are."""
    case, compare = small_case(), networks.compare

    def compare_wrong(case, backend):
        case = compare(case, backend)
        case.parity[0] = replace(case.parity[0], error=0.5)

    monkeypatch.setattr(network_runner, "compare", compare_wrong)
    for batch in (1, 2):
        found, record = time_networks([case], batch, ["eager", "ours"], repeats=1)
        assert [row["provider"] for row in found.rows] == ["eager"]
        assert "relative error is 0.5" in record.failures[f"network res2net50_26w4s batch {batch} float32, ours"]


def network_row(**changes):
    row = {"workload": "network", "config": "res2net50_26w4s", "stage": None, "batch": 8, "dtype": "float32", "device": "cpu"}
    row |= {"provider": "eager", "median_ms": 6.0, "p20_ms": 5.0, "p80_ms": 7.0, "peak_mb": 1.0}
    return row | changes


def network_rows(batch=8):
    times = {"eager": 9.0, "compile_freezing": 6.0, "onnxruntime": 3.0, "openvino": 2.0, "ours": 5.0, "ours_compile": 4.0}
    rows = [network_row(provider=name, median_ms=ms, batch=batch) for name, ms in times.items()]
    rows += [network_row(config="resnet50", provider=name, median_ms=ms - 1, batch=batch) for name, ms in times.items()]
    return rows


def test_ratios():
    _, found = networks.network_ratios(network_rows())
    assert (found.model, found.batch, found.provider, found.ms) == ("res2net50_26w4s", 8, "ours_compile", 4.0)
    assert {name: found.ratio(name) for name in ("pytorch", "onnxruntime", "openvino", "resnet50")} == {
        "pytorch": 1.5, "onnxruntime": 0.75, "openvino": 0.5, "resnet50": 1.25,
    }  # fmt: skip
    assert found.others["resnet50"] == (5.0, "compile_freezing")


def test_ratios_of_every_form():
    rows = [*network_rows(), network_row(provider="ours_plain", median_ms=3.5, batch=8)]
    found = networks.network_ratios(rows)
    assert {form.provider: form.ms for form in found} == {"ours_plain": 3.5, "ours": 5.0, "ours_compile": 4.0}


def test_ratios_are_taken_within_a_batch():
    rows = [row for row in network_rows() if row["config"] != "resnet50"] + [network_row(config="resnet50", batch=1)]
    _, found = networks.network_ratios(rows)
    assert found.ratio("resnet50") is None
    line = networks.ratio_table([found]).splitlines()[-1]
    assert line.endswith("not timed") and "1.50x (6 ms compile_freezing)" in line


def test_options_of_networks(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(run, "run_bench", lambda options, out, command, **_: seen.append(options) or 0)
    for arguments, models, batches in (
        ([], DEFAULT_MODELS, (1, 8)),
        (["--model", "dla60_res2net,res2net50_14w_8s,res2net50_14w8s"], ("dla60_res2net", "res2net50_14w8s"), (1, 8)),
        (["--model", "all"], tuple(map(networks.spelt, list_models())), (1, 8)),
        (["--model", "resnet50,res2net50_14w8s", "--batch", "4"], ("resnet50", "res2net50_14w8s"), (4,)),
        (["--model-batch", "2", "--batch", "4"], DEFAULT_MODELS, (2,)),
        (["--quick"], ("res2net50_26w4s",), (2,)),
        (["--no-network"], (), (1, 8)),
    ):
        assert cli.main(["bench", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 0
        assert seen[-1].models == models
        assert seen[-1].model_batches == batches
    with pytest.raises(SystemExit):
        cli.main(["bench", "--model", "resnet18"])
    error = capsys.readouterr().err
    assert "'resnet18'; allowed are" in error and all(name in error for name in (*list_models(), "all"))


def test_the_record_of_a_cpu_has_the_peers():
    cases = schedule.schedule("cpu")
    for workload in ("chain", "block", "network"):
        for batch in (1, 8):
            found = [case for case in cases if (case.workload, case.batch) == (workload, batch)]
            assert found
            for case in found:
                assert {"compile_freezing", "onnxruntime", "openvino", "ours"} <= {name for name, _ in case.candidates}
    assert not {"onnxruntime", "openvino"} & {name for case in schedule.schedule("cuda") for name, _ in case.candidates}


def test_a_record_says_which_peers_are_not_installed(nothing_installed, tmp_path):
    candidates = (("ours", False), ("openvino", False))
    case = TimedCase("chain", WidthScale(26, 4), 4, "normal", 1, "float32", candidates)
    record = Record(tmp_path / "record.json", results.environment("cpu", "record"))
    outcome = runner.Runner(conditions(), record).time(case)
    assert [row["provider"] for row in outcome.rows] == ["ours"] and not outcome.failures
    ((name, reason),) = outcome.absent.items()
    assert name.endswith(", openvino") and reason.startswith("not installed (openvino")


# The script -----------------------------------------------------------------------------------------------------------

ENVIRONMENT = {"device": "x", "threads": 2, "torch": "2", "peers": {"openvino": "1"}}


@pytest.mark.parametrize(
    "bars, status, below",
    [
        ({"bar_pytorch": 1.5, "bar_peer": 0.5, "bar_resnet": 1.25}, 0, 0),
        ({"bar_pytorch": 1.51, "bar_peer": None, "bar_resnet": None}, 1, 2),
        ({"bar_pytorch": None, "bar_peer": 0.6, "bar_resnet": None}, 1, 2),
        ({"bar_pytorch": None, "bar_peer": None, "bar_resnet": 1.3}, 1, 2),
        ({"bar_pytorch": None, "bar_peer": None, "bar_resnet": None}, 0, 0),
    ],
)
def test_bars_hold_for_every_network_and_batch(capsys, bars, status, below):
    found = networks.network_ratios(network_rows(1) + network_rows(8))
    assert cpu.report(found, ENVIRONMENT, bars) == status
    assert capsys.readouterr().out.count("below its bar") == below


def test_a_peer_that_was_not_timed_is_below_its_bar(capsys):
    rows = [row for row in network_rows() if row["provider"] != "openvino"]
    bars = {"bar_pytorch": None, "bar_peer": 0.1, "bar_resnet": None}
    assert cpu.report(networks.network_ratios(rows), ENVIRONMENT, bars) == 1
    assert "over openvino: not timed" in capsys.readouterr().out


def test_the_script_needs_its_peers_for_a_bar(nothing_installed, capsys):
    assert cpu.main(["networks", "--bar-peer", "1"]) == 2
    printed = capsys.readouterr()
    assert "not timed, openvino: not installed" in printed.out
    assert "--bar-peer needs onnxruntime and openvino" in printed.err


@pytest.mark.usefixtures("one_thread")
def test_the_script_times_and_writes(nothing_installed, monkeypatch, tmp_path, capsys):
    passed = ParityReport([])
    monkeypatch.setattr(ParityReport, "ok", property(lambda self: self is passed))
    cases = {name: small_case(name) for name in DEFAULT_MODELS}
    for case in cases.values():
        case.parity = passed
    monkeypatch.setattr(networks, "prepare_network", lambda name, *_: cases[name])
    monkeypatch.setattr(floor, "measure_rates", lambda sizes: floor.Rates(dict.fromkeys([*sizes, floor.SQUARE], 1e9), 1e9))
    path = tmp_path / "network.json"
    assert cpu.main(["networks", "--batch", "1", "2", "--repeats", "1", "--no-compile", "--out", str(path)]) == 0
    data = results.read(path)
    assert {(row["config"], row["batch"], row["provider"]) for row in data["rows"]} == {
        (model, batch, name)
        for model in DEFAULT_MODELS
        for batch in (1, 2)
        for name in ("eager", "eager_channels_last", "ours_plain", "ours")
    }
    assert {row["sgemm_floor_ms"] > 0 and row["own_sizes_floor_ms"] > 0 for row in data["rows"]} == {True}
    assert set(data["environment"]["peers"]) == set(runtimes.RUNTIMES)
    out = capsys.readouterr().out
    assert out.count("not timed, ") == 2 and "res2net50_14w8s" in out
    passed = None  # from here on every gate is red
    assert cpu.main(["networks", "--batch", "1"]) == 1
    assert "parity gate is red" in capsys.readouterr().out


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu.main(["--help"])
    assert stopped.value.code == 0
    assert "python benchmarks/cpu.py networks --bar-pytorch" in capsys.readouterr().out
