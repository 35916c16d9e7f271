"""`explain`: one line per block, true for the example's or the last call's shapes, and nothing left behind."""

import copy
import json

import pytest
import torch
from helpers import randomize
from official_style import Bottle2neck as OfficialBottle2neck
from official_style import Res2Net
from torch import nn
from tree import ROOT

from res2net_fused import BlockReport, Bottle2neck, accelerate, explain
from res2net_fused.backends import policy

IMAGES = torch.randn(2, 3, 33, 47)
NAMES = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0"]


def model():
    return accelerate(randomize(Res2Net()).eval())


def test_not_run_yet():
    reports = explain(model())
    assert [r.name for r in reports] == NAMES
    assert all(r.fused is None and r.backend == "" and r.reason == "not run yet" for r in reports)
    assert "0 of 5 blocks fused" in str(reports)


def test_example_inputs_give_the_plan_for_their_shapes():
    reports = explain(model(), IMAGES)
    assert all(isinstance(r, BlockReport) and r.fused is True for r in reports)
    assert all(r.backend in ("reference", "cpu") for r in reports)
    # stem stride 2: 17x24; the stage blocks' own input sizes
    sizes = {"layer1.0": "(2, 4x3, 17, 24)", "layer2.0": "(2, 4x4, 17, 24)", "layer2.1": "(2, 4x4, 9, 12)"}
    plans = {r.name: r.plan for r in reports}
    for name, size in sizes.items():
        assert size in plans[name]
    assert "5 of 5 blocks fused" in str(reports)


def test_without_example_inputs_it_is_about_the_last_call():
    m = model()
    with torch.no_grad():
        m(IMAGES)
        m(torch.randn(1, 3, 16, 20))
    assert "(1, 4x3, 8, 10)" in explain(m)[0].plan
    explain(m, torch.randn(3, 3, 12, 12))
    assert "(3, 4x3, 6, 6)" in explain(m)[0].plan


def test_dtype_and_layout_are_in_the_plan():
    m = model().bfloat16().to(memory_format=torch.channels_last)
    plan = explain(m, IMAGES.bfloat16().contiguous(memory_format=torch.channels_last))[0].plan
    assert "bfloat16" in plan and "channels_last" in plan


def test_training_mode_tells_what_is_kept_for_backward():
    m = model().train()
    for report in explain(m, IMAGES):
        assert report.fused and "batch statistics" in report.plan and "MiB kept for backward instead of" in report.plan
    assert "5 of 5 blocks fused" in str(explain(m))


def test_the_table_has_a_line_for_each_block():
    m = model()
    m.layer3[0].relu = nn.SiLU()
    *_, last = lines = str(explain(m, IMAGES)).splitlines()
    rows = [line for line in lines if line.startswith("layer")]
    assert [row.split()[:2] for row in rows] == [[n, "no" if n == "layer3.0" else "yes"] for n in NAMES]
    assert "SiLU" in rows[-1] and last == "4 of 5 blocks fused"
    assert all(word in lines[0] for word in ("block", "fused", "backend", "reason"))
    assert repr(explain(m)) == str(explain(m))


def test_a_block_that_was_left_alone_and_one_added_later():
    m = model()

    class Doubled(OfficialBottle2neck):
        def forward(self, x):
            return 2 * super().forward(x)

    m.layer1.append(Doubled(32, 8))
    accelerate(m)
    m.layer1.append(OfficialBottle2neck(32, 8).eval())
    reports = {r.name: r for r in explain(m)}
    assert "no known recurrence" in reports["layer1.2"].reason and reports["layer1.2"].fused is False
    assert "accelerate" in reports["layer1.3"].reason and reports["layer1.3"].fused is False


def test_a_single_block_and_a_drop_in_block():
    block = Bottle2neck(32, 8).eval()
    (report,) = explain(block, torch.randn(1, 32, 4, 4))
    assert report.fused and report.name == ""
    assert "(model)" in str(explain(block))


def test_backend_and_who_asked_for_it(monkeypatch):
    m = accelerate(model(), backend="reference")
    assert all(r.backend == "reference" and "backend='reference'" in r.reason for r in explain(m, IMAGES))
    accelerate(m)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "reference")
    assert all("RES2NET_FUSED_BACKEND=reference" in r.reason for r in explain(m, IMAGES))


def test_backends_that_no_gpu_has_run_are_experimental(monkeypatch):

    m = model()
    monkeypatch.setitem(policy.EXPERIMENTAL, "reference", "experimental: never measured on a GPU")
    accelerate(m, backend="reference")
    assert all(r.reason.endswith("'reference'; experimental: never measured on a GPU") for r in explain(m, IMAGES))
    m.train()
    assert all(r.reason.endswith("; experimental: never measured on a GPU") for r in explain(m, IMAGES))
    monkeypatch.delitem(policy.EXPERIMENTAL, "reference")
    assert all("experimental" not in r.reason for r in explain(m, IMAGES))


def test_experimental_is_what_no_committed_record_has_measured():
    from res2net_fused.backends import policy

    results = ROOT / "benchmarks" / "results"
    records = [json.loads(path.read_text()) for path in results.glob("*/*.json")]
    measured = {
        row["backend"]
        for record in records
        for row in record.get("rows", ())
        if row["device"].startswith("cuda") and row.get("backend") in ("cuda", "triton")
    }
    assert records and set(policy.EXPERIMENTAL) == {"cuda", "triton"} - measured
    readme = ROOT / "README.md"
    assert ("experimental" in readme.read_text().split("## Use it")[0]) == bool(policy.EXPERIMENTAL)


def test_auto_gives_the_reason_against_what_it_passed_over(monkeypatch):
    from res2net_fused.backends import selection

    monkeypatch.setitem(selection.AUTO_ORDER, "cpu", ("triton", "reference"))
    (report,) = explain(Bottle2neck(32, 8).double().eval(), torch.randn(1, 32, 4, 4, dtype=torch.float64))
    assert report.backend == "reference" and report.reason.startswith("triton: ")


def test_a_backend_that_cannot_run_is_reported(monkeypatch):
    block = Bottle2neck(32, 8).double().eval()
    explain(block, torch.randn(1, 32, 4, 4, dtype=torch.float64))
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "triton")
    (report,) = explain(block)
    assert report.fused is False and "cannot run" in report.reason


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_left_behind(training):
    m = model().train(training)
    m.layer1.append(nn.Dropout(0.5).train())
    state = copy.deepcopy(m.state_dict())
    modes = [module.training for module in m.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    explain(m, IMAGES)
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in m.modules()]
    for (key, a), b in zip(m.state_dict().items(), state.values(), strict=True):
        assert torch.equal(a, b), key
    assert all(p.grad is None for p in m.parameters())


def test_nothing_is_left_behind_when_the_model_raises():
    m = model().train()
    m.fc = nn.Linear(7, 7)
    state = copy.deepcopy(m.state_dict())
    with pytest.raises(RuntimeError):
        explain(m, IMAGES)
    for (key, a), b in zip(m.state_dict().items(), state.values(), strict=True):
        assert torch.equal(a, b), key


def test_results_are_right_after_explaining_in_training_mode():
    m = model().train()
    expected = copy.deepcopy(m).eval()(IMAGES)
    explain(m, IMAGES)
    assert torch.equal(m.eval()(IMAGES), expected)
