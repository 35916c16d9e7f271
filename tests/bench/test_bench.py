"""The benchmark's parts: what it times, how it counts memory, and the files it writes. Nothing here is timed."""

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from res2net_fused import _timing as timing
from res2net_fused.backends.selection import FIRST_CHOICE
from res2net_fused.bench import (
    network_runner,
    networks,
    outcome,
    plot,
    providers,
    results,
    run,
    runner,
    runtimes,
    sample_images,
    training,
)
from res2net_fused.bench.record_file import Record
from res2net_fused.models.registry import list_models
from res2net_fused.models.res2net import Res2Net
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
from res2net_fused.testing import cases
from res2net_fused.testing.cases import DEFAULT_CONFIGS, Case, WidthScale
from res2net_fused.testing.parity import relative_error

# Workloads ------------------------------------------------------------------------------------------------------------


def multiply_adds(config: WidthScale) -> int:
    """A normal block of stage 1 at one pixel."""
    w, s = config.width, config.scale
    return 256 * w * s + 9 * w * w * max(1, s - 1) + w * s * 256


@pytest.mark.parametrize("scale", range(1, 9))
def test_scales_have_equal_flops(scale):
    target = multiply_adds(WidthScale(64, 1))
    assert multiply_adds(WidthScale.from_scale(scale)) == pytest.approx(target, rel=0.03)


def test_published_configs():
    assert [str(config) for config in cases.DEFAULT_CONFIGS] == ["64w1s", "48w2s", "26w4s", "14w8s"]
    assert WidthScale.parse("26w_4s") == WidthScale.parse("26w4s") == WidthScale(26, 4)


@pytest.mark.parametrize("text", ["", "26", "w4s", "26w0s", "0w4s", "26w4s,14w8s", "-26w4s"])
def test_bad_config(text):
    with pytest.raises(ValueError, match="26w4s"):
        WidthScale.parse(text)


@pytest.mark.parametrize("workload", ["chain", "block"])
@pytest.mark.parametrize("variant", cases.VARIANTS)
@pytest.mark.parametrize("stage", cases.STAGES)
def test_every_case_runs_at_its_stage(workload, variant, stage):
    case = Case(workload, WidthScale(14, 4), stage, 1, "float32", "cpu", variant)
    module, inputs = case.module(), case.inputs(2)
    out = module(inputs[0])
    size = (56, 28, 14, 7)[stage - 1]
    planes = (64, 128, 256, 512)[stage - 1]
    assert tuple(out.shape) == (1, 4 * (14 * planes // 64) if workload == "chain" else 4 * planes, size, size)
    assert not torch.equal(*inputs)
    assert torch.equal(case.module()(inputs[0]), out)  # the same parameters at every call
    ours = cases.fused(module, "reference")(inputs[0])
    assert (ours - out).norm() <= 1e-5 * out.norm()
    assert case.problem(module).width == 14 * planes // 64


# Measuring ------------------------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    calls = []
    inputs = [torch.full((1,), float(i)) for i in range(3)]
    contenders = {name: timing.Contender(lambda x, name=name: calls.append((name, x.item())), inputs) for name in ("a", "b")}
    timings = timing.measure(contenders, "cpu", seconds=0, min_repeats=6, warm_up=0)
    assert all(timing.repeats == 6 for timing in timings.values())
    rounds = calls[-12:]
    pairs = ["".join(name for name, _ in rounds[i : i + 2]) for i in range(0, 12, 2)]
    assert set(pairs) == {"ab", "ba"}, "nobody is always the first"
    assert sorted(x for name, x in rounds if name == "a") == [0, 0, 1, 1, 2, 2]


def test_runs_are_bounded():
    contenders = {"a": timing.Contender(lambda x: x, [torch.ones(1)])}
    found = timing.measure(contenders, "cpu", seconds=1e9, max_repeats=7)["a"]
    assert found.repeats == 7
    assert 0 <= found.p20_ms <= found.median_ms <= found.p80_ms


def test_peak_memory_counts_what_is_alive_at_once():
    def model(x):
        for _ in range(5):
            y = torch.empty(1000, dtype=torch.float64)  # one after the other, freed in between
            del y
        a, b = torch.empty(10_000), torch.empty(10_000)
        return a + b

    contender = timing.Contender(model, [torch.ones(1_000_000)])
    assert timing.peak_mb(contender, "cpu") == pytest.approx(3 * 40_000 / 1e6, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("provider, graph", [("ours", False), ("ours_graph", True), ("eager_channels_last", True)])
def test_graphs_replay_the_same_results(provider, graph):
    case = Case("block", WidthScale(14, 8), 4, 2, "float16", "cuda")
    module, inputs = case.module(), case.inputs(3)
    contender = providers.contender(provider, module, inputs, graph=graph)
    found = timing.measure({provider: contender}, "cuda", seconds=0)[provider]
    assert found.peak_mb > 0
    for out, x in zip(contender.outputs(), inputs, strict=True):
        assert relative_error(out, module.double()(x.double())) < 1e-2


# Providers ------------------------------------------------------------------------------------------------------------


def test_selection_of_peers(monkeypatch):
    monkeypatch.setattr(runtimes, "why_not", lambda name, dtype: "not installed")
    assert providers.select("cpu", "chain", "default") == ["eager", "eager_channels_last", "ours"]
    assert providers.select("cpu", "block", "default") == ["eager", "eager_channels_last", "compile", "ours"]
    assert "compile" not in providers.select("cpu", "block", "default", quick=True)
    assert "compile_max_autotune" in providers.select("cuda", "chain", "all")
    assert "compile_max_autotune" not in providers.select("cpu", "chain", "all")
    assert "compile_freezing" not in providers.select("cpu", "block", "default")


@pytest.mark.parametrize("installed", [False, True])
def test_peers_on_a_gpu_are_captured_and_fold_as_ours_does(monkeypatch, installed):
    monkeypatch.setattr(runtimes, "why_not_tensorrt", lambda: None if installed else "not installed")
    for workload in ("chain", "block", "network"):
        found = providers.candidates(providers.select("cuda", workload, "default"), "cuda")
        captured = {name for name, graph in found if graph}
        assert {"eager_channels_last", "ours_graph"} <= captured and ("ours", False) in found
        assert ("compile_freezing" in captured) == (workload != "chain")  # chains are folded for everybody
        assert ("compile" in captured) == (workload == "block")
        assert ("tensorrt" in captured) == installed
    assert providers.unavailable("cuda") == ({} if installed else {"tensorrt": "not installed"})
    assert {name for name, _ in found} >= {"compile_freezing", "ours_compile"}  # of networks, compiled on both sides
    quick = {name for name, _ in providers.candidates(providers.select("cuda", "network", "default", quick=True), "cuda")}
    assert quick == {"eager", "eager_channels_last", "ours_plain", "ours", "ours_graph"}
    everybody = providers.select("cpu", "network", "all")
    assert providers.candidates(everybody, "cpu") == tuple((name, False) for name in everybody)


@pytest.mark.parametrize("workload", ["chain", "block"])
@pytest.mark.parametrize("name", ["eager", "eager_channels_last", "ours"])
def test_providers_compute_the_same_and_change_nothing(workload, name):
    case = Case(workload, WidthScale(14, 8), 4, 2, "float32", "cpu")
    module, (x,) = case.module(), case.inputs()
    before = copy.deepcopy(module.state_dict())
    expected = module(x)
    contender = providers.contender(name, module, [x])
    assert (contender.run() - expected).norm() <= 1e-5 * expected.norm()
    channels_last = contender.inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert channels_last == (name != "eager")
    assert x.is_contiguous()
    assert type(module) in (ReferenceBottle2neck, cases.ReferenceChain)
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) and before[key].stride() == after[key].stride() for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["chain", "block"])
@pytest.mark.parametrize("name", ["compile", "compile_freezing"])
def test_compiled_providers(workload, name):
    case = Case(workload, WidthScale(14, 4), 4, 2, "float32", "cpu")
    module, (x,) = case.module(), case.inputs()
    providers.forget_compiled()
    out = providers.contender(name, module, [x]).run()
    assert (out - module(x)).norm() <= 1e-5 * out.norm()


@pytest.mark.slow
def test_freezing_freezes():
    """Frozen convolutions are oneDNN's, on weights packed beforehand."""
    from torch._inductor.utils import run_and_get_code

    case = Case("block", WidthScale(14, 4), 4, 2, "float32", "cpu")
    for name, frozen in (("compile", False), ("compile_freezing", True)):
        providers.forget_compiled()
        contender = providers.contender(name, case.module(), case.inputs())
        _, (code,) = run_and_get_code(contender.run)
        assert ("mkldnn._convolution_pointwise" in code) == frozen, name


# Results and plot -----------------------------------------------------------------------------------------------------


def example_row(**changes):
    row = {"workload": "block", "config": "26w4s", "stage": 1, "batch": 8, "dtype": "float32", "device": "cpu"}
    row |= {"provider": "eager", "median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 3, "peak_mb": 4.0}
    return row | changes


def example_file():
    rows = [
        example_row(workload=workload, config=config, stage=stage, provider=provider, median_ms=ms)
        for workload in ("chain", "block")
        for stage in (1, 2, 3, 4)
        for config, ms in (("48w2s", 2.0), ("26w4s", 2.5), ("14w8s", 4.0))
        for provider in ("eager", "ours")
    ]
    rows.append(example_row(workload="network", config="res2net50_26w4s", stage=None))
    return {"environment": results.environment("cpu", "res2net-fused bench"), "rows": rows}


def test_results_round_trip(tmp_path):
    data = example_file()
    path = tmp_path / "new folder" / "results.json"
    results.write(path, data["environment"], data["rows"])
    assert results.read(path) == data
    assert data["environment"]["torch"] == torch.__version__
    assert data["environment"]["device"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"median_ms": float("nan")}, "median_ms"),
        ({"median_ms": -1.0}, "median_ms"),
        ({"p80_ms": "3"}, "p80_ms"),
        ({"stage": "1"}, "stage"),
        ({"batch": True}, "batch"),
        ({"workload": "blocks"}, "allowed are 'chain'"),
        ({"provider": "magic"}, "allowed are 'eager'"),
        ({"peak_mb": None}, "peak_mb"),
    ],
)
def test_bad_rows_are_refused(tmp_path, change, message):
    data = example_file()
    data["rows"][3] |= change
    with pytest.raises(ValueError, match=rf"rows\[3\].*{message}"):
        results.write(tmp_path / "results.json", data["environment"], data["rows"])
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"bad\.json is no result file"):
        results.read(tmp_path / "bad.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"environment": {}, "rows": []}', '{"environment": 1, "rows": {}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is no result file"):
        results.read(tmp_path / "other.json")


@pytest.mark.parametrize("field", [*results.ROW_FIELDS])
def test_missing_fields_are_named(field):
    data = example_file()
    del data["rows"][0][field]
    with pytest.raises(ValueError, match=field):
        results.validate(data)


def test_plot_is_a_picture(tmp_path):
    plot.plot(example_file(), tmp_path / "plot.png")
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws rows and gives the figure."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(rows):
        plot.plot({"environment": example_file()["environment"], "rows": rows}, tmp_path / "plot.png")
        return plt.gcf()

    yield draw
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize(
    "cases",
    [
        [("block", 3, "26w4s")],
        [("chain", 1, "26w4s"), ("chain", 1, "14w8s"), ("block", 4, "26w4s")],
        [(workload, stage, "26w4s") for workload in ("chain", "block", "train_chain") for stage in (1, 2, 3, 4)],
    ],
    ids=["one", "few", "all"],
)
def test_no_panel_is_empty_and_nothing_is_cut_off(drawn, cases):
    """Every provider in both forms, which is the longest legend, and a device with a long name."""
    forms = [(name, graph) for name in plot._COLOURS for graph in (False, True)]
    figure = drawn([
        example_row(workload=workload, stage=stage, config=config, provider=name, graph=graph, median_ms=1.0 + i)
        for workload, stage, config in cases
        for i, (name, graph) in enumerate(forms)
    ])  # fmt: skip
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert len(panels) == len({case[:2] for case in cases})
    for axis in panels:
        bars, lines = len(axis.patches), sum(len(line.get_xdata()) > 1 for line in axis.lines)
        assert (bars, lines) in ((len(forms), 0), (0, len(forms)))
    box = figure.bbox
    for what in (figure.legends[0], figure._suptitle, *(axis for axis in panels)):
        extent = what.get_tightbbox(figure.canvas.get_renderer()) if what in panels else what.get_window_extent()
        assert extent.x0 >= box.x0 and extent.x1 <= box.x1 and extent.y0 >= box.y0 and extent.y1 <= box.y1, what
    below = min(axis.get_tightbbox(figure.canvas.get_renderer()).y0 for axis in panels)
    assert figure.legends[0].get_window_extent().y1 <= below


def test_a_line_holds_one_form_of_a_provider(drawn):
    rows = [
        example_row(config=config, provider="compile", graph=graph, median_ms=ms)
        for graph, ms in ((False, 4.0), (True, 1.0))
        for config in ("48w2s", "26w4s")
    ]
    (axis,) = drawn(rows).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axis.lines} == {"compile": [4, 4], "compile*": [1, 1]}


def test_one_scale_is_drawn_as_bars(drawn):
    """A line of one point would leave the panel empty; a panel with two scales beside it keeps its lines."""
    rows = [example_row(stage=4, provider=provider, median_ms=ms) for provider, ms in (("eager", 4.0), ("ours", 1.0))]
    rows += [example_row(stage=1, config=config) for config in ("48w2s", "26w4s")]
    lines, bars = drawn(rows).axes
    assert [bar.get_height() for bar in bars.patches] == [4.0, 1.0]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["4"] and bars.get_ylim()[1] > 4.0
    assert not lines.patches and [list(line.get_xdata()) for line in lines.lines] == [[2, 4]]


def test_plot_of_networks_alone_is_refused(tmp_path):
    data = example_file()
    data["rows"] = data["rows"][-1:]
    with pytest.raises(ValueError, match="no chain"):
        plot.plot(data, tmp_path / "plot.png")


def test_table_compares_our_best_with_the_best_peer():
    rows = [
        example_row(provider=provider, median_ms=ms)
        for provider, ms in (("ours_graph", 1.0), ("eager", 9.0), ("compile", 3.0), ("ours", 2.0))
    ]
    head, _, line = outcome.outcome_table(rows).splitlines()
    assert line.split() == ["block", "26w4s", "1", "8", "float32", "9", "3", "2", "1", "3.00x", "compile"]
    assert head.split()[5:9] == ["eager", "compile", "ours", "ours_graph"]


def test_table_tells_forms_apart_and_names_the_backend():
    rows = [example_row(provider="compile", graph=graph, median_ms=ms) for graph, ms in ((True, 1.5), (False, 3.0))]
    rows += [
        example_row(provider="ours_graph", graph=True, median_ms=1.0, backend="triton", reason="cuda: not built"),
        example_row(stage=2, provider="ours", backend="triton", reason="cuda: not built"),
        example_row(stage=3, provider="ours", backend="cuda", reason=FIRST_CHOICE),
        example_row(stage=4, provider="compile"),
    ]
    head, _, *lines = outcome.outcome_table(rows).splitlines()
    assert head.split()[5:9] == ["compile", "compile*", "ours", "ours_graph"]
    assert lines[0].split()[5:] == ["3", "1.5", "-", "1", "1.50x", "compile*", "triton"]
    assert [line.split()[-3:] for line in lines[1:]] == [["-", "-", "triton"], ["-", "-", "cuda"], ["-", "-", "-"]]
    environment = {"failures": {"a": "it broke", "b": "it broke", "c": "wrong"}, "absent": {"d": "not installed"}}
    assert outcome.remarks(environment, rows, {"tensorrt": "not here"}) == [
        "not timed, tensorrt: not here",
        "backend triton (block 26w4s stage 1 and 1 more): cuda: not built",
        "not timed, d: not installed",
        "failed, a; b: it broke",
        "failed, c: wrong",
    ]


# Photographs ----------------------------------------------------------------------------------------------------------


def test_photographs():
    images = sample_images.sample_images()
    assert tuple(images.shape) == (2, 3, 224, 224)
    assert images.dtype == torch.float32
    assert images.min() >= -2.2 and images.max() <= 2.7  # of (0 ... 1 - mean) / deviation
    assert images.std() > 0.5
    assert not torch.equal(images[0], images[1])
    assert images[0, 2, :60].mean() > images[0, 2, 150:].mean()  # china.jpg: the sky is above


def test_calibration_takes_the_statistics_of_the_images():
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3))
    images = torch.randn(2, 3, 20, 20) * 3 + 1
    assert sample_images.calibrate(network, images) is network
    assert not network.training
    assert network[1].momentum == 0.3
    out = network(images)
    assert out.mean((0, 2, 3)).abs().max() < 1e-3
    assert (out.std((0, 2, 3)) - 1).abs().max() < 1e-2


@pytest.mark.slow
def test_network_on_photographs():
    case = networks.prepare_network("res2net50_26w_4s", "float32", "cpu", "reference")
    assert isinstance(case.network, Res2Net)
    assert case.parity.ok, f"\n{case.parity}"
    assert [row.stage for row in case.parity] == ["1 features", "2 features", "3 features", "4 features", "logits"]
    assert {row.backend for row in case.parity} == {"reference"}
    assert set(case.differences) == {row.stage for row in case.parity}
    assert all(0 <= difference < 1 for difference in case.differences.values())
    assert case.coverage == "16 of 16"


def test_many_networks_take_turns_in_groups(monkeypatch, tmp_path):
    """Every one is timed at every batch, and never are the copies of more in memory than fit."""
    calls = []

    def time_networks(timer, cases, batch, candidates):
        calls.append((batch, [case.name for case in cases]))
        return runner.Outcome()

    monkeypatch.setattr(network_runner.NetworkRunner, "time_networks", time_networks)
    monkeypatch.setattr(run, "plain_network", lambda name, *_: networks.NetworkCase(name, "float32", None, None))
    names = tuple(map(networks.spelt, list_models()))
    some = options(models=names, model_batches=(1, 8))
    with opened_timer(tmp_path) as timer:
        everything = {(name, batch) for name in names for batch in (1, 8)}
        run._time_networks(timer, some, everything)
        assert [name for _, group in calls for name in group] == [*names, *names]
        assert max(len(group) for _, group in calls) <= 6 < len(names)
        assert [batch for batch, _ in calls] == sorted(batch for batch, _ in calls) and {batch for batch, _ in calls} == {1, 8}
        calls.clear()
        run._time_networks(timer, some, {(names[7], 8)})  # with those that its times are compared with
        assert calls == [(8, list(names[6:12]))]
        calls.clear()
        run._time_networks(timer, some, set())
        assert not calls


# Training -------------------------------------------------------------------------------------------------------------


def options(**changes):
    models = ("res2net50_26w4s",)
    values = {"configs": DEFAULT_CONFIGS, "batches": (8, 1), "dtype": "float32", "device": "cpu", "models": models}
    return run.BenchOptions(**values | changes)


def test_what_is_trained():
    """By default what the figures are about, at one batch; a network's steps only when all is asked for."""
    some = options(train="default")
    seen = {(case.workload, str(case.config), case.batch) for case in some.trained_cases()}
    assert seen == {("train_chain", "26w4s", 8), ("train_chain", "14w8s", 8), ("train_block", "26w4s", 8)}
    assert len(some.trained_cases()) == 12 and not some.trained_networks()
    everything = options(train="all", peers="all")
    assert len(everything.trained_cases()) == 2 * 2 * 4 * 4 and everything.trained_networks() == ("res2net50_26w4s",)
    assert "compile" in everything.training_providers() and "compile" not in some.training_providers()
    assert options().trained_cases() == []


@contextmanager
def opened_timer(folder):
    """What times cases into a record of `folder`."""
    record = Record(folder / "bench-cpu.json", results.environment("cpu", "x"))
    record.begin_run()
    conditions = network_runner.TurnConditions("cpu", "auto", True, None, 1, seconds=0, rounds=(2, 2))
    try:
        yield network_runner.NetworkRunner(conditions, record)
    finally:
        record.close()


@pytest.mark.parametrize("workload", ["train_chain", "train_block"])
def test_training_is_timed_in_turn(workload, tmp_path):
    (case,) = options(quick=True).timed_cases([Case(workload, WidthScale(26, 4), 4, 1, "float32", "cpu")])
    with opened_timer(tmp_path) as timer:
        rows = timer.time(case).rows
    results.validate({"environment": dict.fromkeys(results.ENVIRONMENT_FIELDS), "rows": rows})
    assert [row["provider"] for row in rows] == ["ours", "eager", "eager_channels_last"]
    assert all(row["repeats"] == 2 and row["error"] <= row["allowed_error"] for row in rows)


def test_everybody_trains_the_same_chain():
    """From one seed: output, gradients, and the running statistics that a step leaves."""
    case = Case("train_chain", WidthScale(26, 4), 4, 1, "float32", "cpu")
    (x,) = training.plain(case).inputs()
    found = []
    for name in ("eager", "eager_channels_last", "ours", "reference"):
        module = training.training_module(case, name, "auto")
        step = training.TrainingStep(module, "float32")
        grad = torch.randn(step(x).shape, generator=torch.Generator().manual_seed(2))
        found.append([*step.gradients(x, grad)[:2], *(bn.running_var for bn in module.bns)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert relative_error(b, a.double()) < 1e-3  # masks may flip
