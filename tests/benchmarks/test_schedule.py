"""What a record measures, in which order, in which time, and the floors of the roofline."""

import pytest
import torch
from record import roofline, runner, schedule
from record.schedule import Budget
from record_cases import conditions

from res2net_fused.bench import results
from res2net_fused.bench.work import Work, least_work, least_work_of_network, rotation_count
from res2net_fused.testing.cases import STAGES, Case, WidthScale

# Order and time -------------------------------------------------------------------------------------------------------


def test_what_the_targets_need_comes_first_and_jax_last():
    cases = schedule.schedule("cuda")
    assert [(u.workload, str(u.config), u.stage) for u in cases[:8]] == [
        ("chain", config, stage) for config in ("26w4s", "14w8s") for stage in STAGES
    ]
    # (of bf16, batch 32) before the other batches; those and networks before fp16; training next to last
    where = {}
    for i, case in enumerate(cases):
        kind = "jax" if case.candidates[0][0] == "jax" else case.workload
        where.setdefault((kind, case.batch, case.dtype), []).append(i)
    half_from = min(i for (_, _, dtype), found in where.items() if dtype == "float16" for i in found)
    first_jax = min(where["jax", 32, "bfloat16"])
    assert max(where["chain", 256, "bfloat16"]) < half_from < min(where["train_step", 128, "bfloat16"]) < first_jax
    assert first_jax > max(max(found) for (kind, _, _), found in where.items() if kind != "jax")
    assert min(where["network", 32, "bfloat16"]) < min(where["chain", 256, "bfloat16"])


def test_the_record_is_complete():
    cases = schedule.schedule("cuda")
    keys = [key for case in cases for key in case.keys("cuda")]
    assert len(set(keys)) == len(keys)
    assert {name for case in cases for name, _ in case.candidates} <= set(results.PROVIDERS)
    timed = {(u.workload, u.config_name, u.stage, u.batch, u.dtype) for u in cases}
    for batch in (1, 32, 256):
        for dtype in ("bfloat16", "float16"):
            for config in ("26w4s", "14w8s", "48w2s", "26w8s", "64w1s"):
                assert {(w, config, stage, batch, dtype) for w in ("chain", "block") for stage in STAGES} <= timed
                if config != "64w1s":  # which is timed beside each of them
                    assert ("network", f"res2net50_{config}", None, batch, dtype) in timed
    assert [u for u in cases if u.variant == "stage" and u.batch in (32, 256) and str(u.config) == "26w4s"]
    first = cases[0].candidates
    for graphed in ("ours_graph", "compile_max_autotune", "eager_channels_last", "compile", "triton", "cuda"):
        assert (graphed, True) in first
    assert {("ours", False), ("eager", False)} <= set(first)


def test_parts_are_taken_out_of_the_whole():
    chains = schedule.schedule("cuda", ["chain"])
    assert {case.workload for case in chains} == {"chain"}
    assert chains == [case for case in schedule.schedule("cuda") if case.workload == "chain"]


def test_time_is_judged_by_what_came_before():
    now = [100.0]
    budget = Budget(2, started=90.0, clock=lambda: now[0])
    assert (budget.elapsed, budget.left) == (10.0, 110.0)
    assert budget.fits("chain") and not budget.fits("network")
    budget.note("network", 80.0)
    assert budget.expected("network") == 100.0 and budget.fits("network")
    now[0] = 111.0
    assert not budget.fits("network")
    for _ in range(3):
        budget.note("network", 8.0)
    assert budget.expected("network") == 10.0


# Roofline -------------------------------------------------------------------------------------------------------------

H200 = roofline.Rates(4300, {"bfloat16": 790})


FLOORS = [("26w4s", 1, 9.7), ("26w4s", 2, 4.9), ("14w8s", 1, 10.5), ("48w2s", 1, 9.0)]  # of an H200


@pytest.mark.parametrize("config, stage, microseconds", FLOORS)
def test_floor_of_a_chain(config, stage, microseconds):
    case = Case("chain", WidthScale.parse(config), stage, 32, "bfloat16", "cpu")
    module = case.module()
    shape = (32, case.channels, case.input_size, case.input_size)
    work = least_work(module, shape, "bfloat16")
    assert work.flops == case.problem(module).flops
    assert work.activations == 2 * 2 * torch.Size(shape).numel()
    assert work.parameters >= 2 * sum(w.numel() for w in module.weights)
    assert 1e3 * roofline.floor_ms([work], H200, "bfloat16") == pytest.approx(microseconds, rel=0.02)


def test_floor_of_a_strided_block_counts_its_shortcut():
    case = Case("block", WidthScale(26, 4), 2, 3, "float32", "cpu", "stage")
    work = least_work(case.module(), (3, 256, 56, 56), "float32")
    assert work.activations == 4 * 3 * (256 * 56**2 + 512 * 28**2)
    products = 256 * 208 * 56**2 + (9 * 3 * 52**2 + 208 * 512 + 256 * 512) * 28**2
    assert work.flops == 2 * 3 * products


def test_floor_is_the_larger_of_moving_and_multiplying():
    rates = roofline.Rates(100, {"float32": 10})
    assert roofline.floor_ms([Work(10**9, 0, 0)], rates, "float32") == pytest.approx(10)
    assert roofline.floor_ms([Work(6 * 10**8, 4 * 10**8, 10**12)], rates, "float32") == pytest.approx(100)


def test_network_is_stem_blocks_and_head():
    network = runner.build_network(WidthScale(26, 4), "float32", conditions())
    parts = least_work_of_network(network, (2, 3, 64, 64), "float32")
    assert len(parts) == 1 + 4 + 1
    whole = least_work(network, (2, 3, 64, 64), "float32")
    assert sum(part.flops for part in parts) == whole.flops
    assert sum(part.parameters for part in parts) == whole.parameters


def test_inputs_rotate_past_the_cache():
    l2 = 50 * 2**20
    assert rotation_count(2 * l2, l2) == 1
    assert rotation_count(2 * l2 - 1, l2) == 2
    assert rotation_count(160_000, l2) * 160_000 >= 2 * l2
    assert rotation_count(1, None) == 4


def test_rates_are_measured():
    rates = roofline.measure_rates("cpu", ["float32"], quick=True)
    assert rates.copy_gb_s > 0 and rates.matrix_tflops["float32"] > 0
