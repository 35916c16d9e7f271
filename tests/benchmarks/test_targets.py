"""The targets of a record, and the results that the pages show."""

import json

import network_summary
import pytest
import render_results
from record import targets
from record_cases import environment, row

from res2net_fused.bench import results
from res2net_fused.testing.cases import STAGES

# Targets --------------------------------------------------------------------------------------------------------------


def by_name(rows):
    return {target.name: target for target in targets.targets(rows)}


def test_chain_targets():
    rows = [row(), row(provider="eager_channels_last", median_ms=5.5), row(provider="compile_max_autotune", median_ms=1.9)]
    found = by_name(rows)
    eager = found["chain 26w4s stage 1, batch 32, over eager_channels_last"]
    assert (eager.value, eager.bar, eager.outcome) == (5.5, 5.0, "pass")
    assert found["chain 26w4s stage 1, batch 32, over compile_max_autotune"].outcome == "FAIL"
    assert found["chain 26w4s stage 2, batch 32, over eager_channels_last"].outcome == "unmeasured"
    assert len([f for f in found if f.startswith("chain 26w4s") or f.startswith("chain 14w8s")]) == 16


@pytest.mark.parametrize("change", [{"run": 2}, {"graph": False}, {"dtype": "float16"}, {"batch": 1}, {"variant": "stage"}])
def test_ratios_are_taken_between_like_rows_of_one_run(change):
    rows = [row(), row(provider="eager_channels_last", median_ms=9.0) | change]
    assert by_name(rows)["chain 26w4s stage 1, batch 32, over eager_channels_last"].value is None


def test_blocks_are_summed_as_often_as_they_occur():
    peer = {("stage", 1): 10.0, ("normal", 3): 20.0}
    rows = []
    for variant in ("stage", "normal"):
        for stage in STAGES:
            case = {"workload": "block", "stage": stage, "variant": variant}
            slow = peer.get((variant, stage), 2.0)
            rows += [row(**case), row(**case, provider="compile", median_ms=99.0),
                     row(**case, provider="compile_max_autotune", median_ms=slow)]  # fmt: skip
    name = "blocks of Res2Net-50 26w4s summed, batch 32, over torch.compile"
    found = by_name(rows)[name]
    assert found.value == pytest.approx((10 + 3 * 2 + (2 + 3 + 2) * 2 + 5 * 20) / 16)
    assert by_name(rows[:-3])[name].value is None
    assert by_name(rows[:-3])[name].note == "missing: 1 of 8, such as normal block of stage 4"


def test_the_worst_of_48w2s_counts():
    rows = []
    for stage, batch, peer in ((1, 32, 1.5), (4, 256, 0.9), (2, 1, 1.2)):
        case = {"config": "48w2s", "stage": stage, "batch": batch}
        rows += [row(**case), row(**case, provider="compile", median_ms=peer)]
    found = by_name(rows)["chain 48w2s over torch.compile"]
    assert (found.value, found.outcome, found.note) == (0.9, "FAIL", "worst of 3: stage 4, batch 256")


def test_networks_are_compared_with_the_baseline():
    case = {"workload": "network", "config": "res2net50_14w8s", "stage": None, "batch": 256}
    rows = [row(**case, median_ms=4.0, yardstick_ms=5.0)]
    assert by_name(rows)["res2net50_14w8s, batch 256, over compiled ResNet-50"].value == 1.25
    assert "1.25x" in targets.target_table(targets.targets(rows))
    assert by_name([])["res2net50_26w4s, batch 32, over compiled ResNet-50"].outcome == "unmeasured"


def test_training_targets():
    case = {"workload": "train_step", "config": "res2net50_26w4s", "stage": None, "batch": 128, "graph": False}
    rows = [row(**case, provider="ours", median_ms=10.0, peak_mb=100.0),
            row(**case, provider="triton", median_ms=5.0, peak_mb=70.0),
            row(**case, provider="eager_channels_last", median_ms=10.0, peak_mb=100.0),
            row(**case, provider="compile", median_ms=6.0, peak_mb=90.0)]  # fmt: skip
    found = by_name(rows)
    assert found["res2net50_26w4s training step, batch 128, over eager_channels_last"].outcome == "pass"
    assert found["res2net50_26w4s training step, batch 128, over compile"].value == pytest.approx(1.2)
    assert found["res2net50_26w4s training peak memory, batch 128, over eager_channels_last"].value == pytest.approx(1 / 0.7)
    assert found["res2net50_14w8s training step, batch 256, over compile"].outcome == "unmeasured"


# Pages ----------------------------------------------------------------------------------------------------------------

CPU_NETWORK = """python benchmarks/cpu_network.py --batch 1
Some(R) Chip(R) Processor (AVX512), 2 threads, torch 2.13.0+cpu, medians in ms;
{}; ratios above 1: ours is faster
network          batch          ours     ms             over PyTorch  over openvino             over ResNet-50
---------------  -----  ------------  -----  -----------------------  -------------  -------------------------
res2net50_14w8s      1  ours_compile     35  2.00x (70.0 ms compile)      not timed  1.20x (42 ms compile)
res2net50_26w4s      1  ours_compile  34.91  1.53x (53.49 ms compile)  0.90x (31.51 ms)  1.20x (42 ms compile)
"""


def test_the_pages_show_the_committed_files():
    assert render_results.main(["--check"]) == 0


@pytest.fixture
def checkout(tmp_path):
    """A root with the two pages, and a record of a GPU."""
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/results.md"):
        (tmp_path / page).write_text(f"before\n{render_results.BEGIN}\nold\n{render_results.END}\nafter\n")
    rows = [
        row(stage=stage, provider=provider, graph=graph, median_ms=ms, roofline_share=0.5, workload=workload)
        for workload in ("chain", "block")
        for stage in STAGES
        for provider, graph, ms in (("ours_graph", True, 1.0), ("compile", False, 9.0), ("compile", True, 3.0 - stage / 2))
    ]
    rows.append(row(workload="block", stage=1, variant="stage", median_ms=100.0))
    network = {"workload": "network", "config": "res2net50_26w4s", "stage": None}
    rows.append(row(**network, median_ms=4.0, yardstick_ms=3.0))
    path = tmp_path / "benchmarks" / "results" / "some-gpu" / "record.json"
    results.write(path, environment(device="Some GPU", cuda="13.0", command="make record"), rows)
    return tmp_path


def test_pages_are_written_and_checked(checkout, capsys):
    arguments = ["--root", str(checkout)]
    assert render_results.main([*arguments, "--check"]) == 1
    assert render_results.main(arguments) == 0
    text = (checkout / "docs" / "results.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert "### Some GPU" in text and "CUDA 13.0" in text and "`make record`" in text
    line = next(line for line in text.splitlines() if line.startswith("| 26w4s"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "26w4s", "32", "bfloat16", "7", "4", "2.50 2.00 1.50 1.00", "50 50 50 50",
    ]  # fmt: skip
    assert "0.75" in next(line for line in text.split("## By record")[1].splitlines() if line.startswith("| res2net50_26w4s"))
    assert "(../benchmarks/results/some-gpu/record.png)" in text
    assert "\nold\n" not in (checkout / "README.md").read_text()
    assert render_results.main([*arguments, "--check"]) == 0
    (checkout / "benchmarks" / "results" / "some-gpu" / "record.png").unlink()
    assert render_results.main([*arguments, "--check"]) == 1
    assert "no plot" in capsys.readouterr().out


def test_whole_networks_are_read_from_both_kinds_of_file(checkout):
    """Each form of ours has a line of its own, with the ratios of its own run; the README shows one network."""
    folder = checkout / "benchmarks" / "results" / "chip"
    network = {"workload": "network", "stage": None, "batch": 1, "dtype": "float32", "device": "cpu", "graph": False}
    rows = [
        row(**network, config=config, provider=provider, median_ms=ms)
        for config, provider, ms in (
            ("res2net50_26w4s", "eager", 66.0), ("res2net50_26w4s", "openvino", 33.0), ("res2net50_26w4s", "ours", 44.0),
            ("resnet50", "eager", 55.0), ("resnet50", "openvino", 22.0),
        )
    ]  # fmt: skip
    results.write(folder / "bench.json", environment(device="Some(R) Chip(R) Processor (AVX512)"), rows)
    (folder / "networks.txt").write_text(CPU_NETWORK)
    assert render_results.main(["--root", str(checkout)]) == 0
    readme = (checkout / "README.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines()]
    assert ["Some Chip, AVX-512", "1", "`accelerate`, channels-last", "44.0 ms", "1.50x", "0.75x", "1.25x"] in lines
    assert ["Some Chip, AVX-512", "1", "`accelerate`, `freeze`, `torch.compile`", "34.9 ms", "1.53x", "0.90x", "1.20x"] in lines
    shown = (checkout / "docs" / "results.md").read_text()
    assert "res2net50_14w8s" in shown and "not timed" in shown and "14w8s" not in readme
    picture = checkout / "benchmarks" / "results" / "networks.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert render_results.main(["--root", str(checkout), "--check"]) == 0
    picture.unlink()
    assert render_results.main(["--root", str(checkout), "--check"]) == 1


def test_the_picture_shows_each_contender_of_one_run(tmp_path):
    (tmp_path / "networks.txt").write_text(CPU_NETWORK)
    run = network_summary.from_text(tmp_path / "networks.txt")
    groups = [
        ((4, "26w4s"), {"pytorch": 53.49, "openvino": 31.51, "ours": 34.91}),
        ((8, "14w8s"), {"pytorch": 70.0, "ours": 35.0}),
    ]
    assert network_summary.bars([run]) == [("Some Chip, AVX-512, 2 cores, batch 1", 42.0, groups)]


@pytest.mark.parametrize("change", [("1.53x", "fast"), (", 2 threads", ""), ("network  ", "model  "), ("PyTorch", "Caffe")])
def test_a_text_of_another_form_is_named(checkout, capsys, change):
    path = checkout / "benchmarks" / "results" / "chip" / "networks.txt"
    path.parent.mkdir()
    path.write_text(CPU_NETWORK.replace(*change))
    assert render_results.main(["--root", str(checkout)]) == 2
    assert "networks.txt" in capsys.readouterr().err


def test_bad_records_and_pages_are_named(checkout, capsys):
    (checkout / "docs" / "results.md").write_text("no markers")
    assert render_results.main(["--root", str(checkout)]) == 2
    path = checkout / "benchmarks" / "results" / "x" / "bad.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([]))
    assert render_results.main(["--root", str(checkout)]) == 2
    err = capsys.readouterr().err
    assert "results.md needs the lines" in err and "bad.json" in err


def test_markdown_columns_are_aligned():
    table = render_results.markdown_table(["a", "long head"], [["first", "1"]])
    assert table == "| a     | long head |\n| :---- | --------: |\n| first |         1 |"
