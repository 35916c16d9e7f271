"""Measured choices on a stand-in card: wrong kernels are never used, slow ones not chosen, a table replaces no comparison."""

import math

import pytest
import torch
from helpers import randomize, relative_error

from res2net_fused import Bottle2neck, accelerate, explain, tune
from res2net_fused._timing import Timing
from res2net_fused.backends import choices, measuring
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.cuda.plan import device_limits, plan_chain
from res2net_fused.backends.selection import get_backend
from res2net_fused.backends.triton import tiles
from res2net_fused.bench import tune as bench_tune
from res2net_fused.chain.tolerances import FORWARD
from res2net_fused.tuning import marked
from res2net_fused.tuning import tune as tuning
from res2net_fused.tuning.marked import record_beside_table

MS = {"own": 5.0, "reference": 4.0, "triton": 1.0, "cuda": 2.0}


@pytest.fixture(autouse=True)
def planted(monkeypatch, choices_table, as_in_a_new_process):
    """Milliseconds by choice, in a process that has tried no kernel."""
    times = dict(MS)

    def measure(trials, device, **options):
        for trial in trials.values():
            trial.run()
        return {name: Timing(times.get(name, 9.0), 1, 1, 1, 0) for name in trials}

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(tuning, "measure", measure)
    return times


def block():
    return accelerate(randomize(Bottle2neck(64, 16, baseWidth=64, scale=4)).half().eval().to("cuda"))


def images(batch=4):
    return torch.randn(batch, 64, 8, 8, dtype=torch.float16).to("cuda").contiguous(memory_format=torch.channels_last)


def run(model, x):
    with torch.no_grad():
        return model(x)


def spoil(monkeypatch, name, how):
    backend = get_backend(name)
    own = backend.block_forward

    def spoiled(*arguments):
        out = own(*arguments)
        how(out)
        return out

    monkeypatch.setattr(backend, "block_forward", spoiled)
    monkeypatch.setattr(backend, "prepared_block", lambda *_: None)


def test_the_fastest_is_chosen_and_what_is_slow_is_not(planted):
    b, x = block(), images()
    (call,) = tune(b, x, progress=False).calls
    assert call.choice == "triton" and set(MS) <= set(call.ms)
    run(b, x)
    assert explain(b)[0].backend == "triton" and "measured here in ms: triton 1, cuda 2" in explain(b)[0].reason
    planted.update(triton=8.0)
    (call,) = tune(b, images(2), progress=False).calls
    assert call.choice == "cuda"
    run(b, images(2))
    assert explain(b)[0].backend == "cuda"


@pytest.mark.parametrize(
    "how", [lambda out: out.mul_(1.1), lambda out: out[0, :1].fill_(math.nan)], ids=["scaled", "unwritten"]
)
def test_a_kernel_with_wrong_numbers_is_never_used(how, monkeypatch, caplog):
    torch.manual_seed(1)
    b, x = block(), images()
    right = run(b, x)
    spoil(monkeypatch, "triton", how)
    (call,) = tune(b, x, progress=False).calls
    assert call.choice == "cuda" and "triton" not in call.ms and any(note.startswith("triton: ") for note in call.notes)
    for _ in range(3):
        assert relative_error(run(b, x), right) < 2 * FORWARD["float16"].limit
    assert explain(b)[0].backend == "cuda"


def test_a_table_of_another_process_replaces_no_comparison(monkeypatch, as_in_a_new_process):
    torch.manual_seed(1)
    b, x = block(), images()
    right = run(b, x)
    tune(b, x, progress=False)
    choices.forget()  # a later process, with another compiler or driver
    as_in_a_new_process()
    spoil(monkeypatch, "triton", lambda out: out.mul_(1.1))
    assert choices.lookup("inference", b._res2net_fused.last_problem).backend == "triton"
    fresh = block()
    fresh.load_state_dict(b.state_dict())
    for _ in range(3):
        assert relative_error(run(fresh, x), right) < 2 * FORWARD["float16"].limit
    assert explain(fresh)[0].backend != "triton"


def test_tiles_are_measured_before_the_block(monkeypatch):
    kept = tiles.Tile(16, 32, 16, 1, 2)
    monkeypatch.setattr(bench_tune, "candidates", lambda job, limit=None: [job.tile, kept])
    b, x = block(), images()
    (call,) = tune(b, x, progress=False).calls
    assert "tiles of 2 launches measured" in call.notes and call.choice == "triton"
    assert len(tiles.read(tiles.user_path())) == 2
    run(b, x)
    assert "(tuned)" in explain(b)[0].plan


def test_a_call_that_ended_an_earlier_process_is_left_out():
    b = block()
    (call,) = tune(b, images(4), progress=False).calls
    name = f"a call of {call.call}".replace("(4, ", "(3, ")
    record = record_beside_table("cuda")
    record.mark(name, limit_s=1)  # as a process that was killed leaves it
    record.close()
    (call,) = tune(b, images(3), progress=False).calls
    assert not call.ms and name.endswith(call.call) and call.notes[0].startswith("its process ended while it ran; ")
    (call,) = tune(b, images(2), progress=False).calls
    assert call.choice == "triton"


def test_a_lost_context_ends_tuning_and_is_kept(monkeypatch):
    b = block()

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as broken:
        broken.setattr(marked.torch.cuda, "synchronize", lost)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            tune(b, images(4), progress=False)
    assert "illegal memory access" in str(record_beside_table("cuda").failures)


def test_other_plans_of_the_cuda_kernel_are_tried(planted):
    planted.update({"cuda:1": 0.5, "cuda:2": 0.7})
    b, x = block(), images()
    (call,) = tune(b, x, progress=False).calls
    assert call.choice == "cuda:1" and {"cuda", "cuda:1"} <= set(call.ms)
    run(b, x)
    assert explain(b)[0].backend == "cuda" and "cuda:1 0.5" in explain(b)[0].reason
    problem = b._res2net_fused.last_problem
    plans = [plan_chain(problem, device_limits(problem.device), rank) for rank in (0, 1)]
    assert cuda_chain.chosen_plan(problem) == plans[1] != plans[0]
    run(b, images(3))  # of another size the first plan is another one
    other = b._res2net_fused.last_problem
    assert cuda_chain.chosen_plan(other) == plan_chain(other, device_limits(other.device))
