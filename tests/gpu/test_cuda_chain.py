"""The `cuda` backend on a GPU, against PyTorch in float64: every instance, odd sizes, graphs and streams."""

import pytest
import torch
from emulated_cases import HALVES, SETTINGS, SINGLES
from emulator.harness import expected_of, make_tensors, replace, tolerance
from gpu_cases import (
    CUT,
    FULL,
    IN_BLOCKS,
    ODD,
    PLANNED,
    PLANNED_TF32,
    PUBLISHED,
    RUNS_KERNELS,
    SMALL,
    TIMED,
    affordable,
    launch_of,
    problem_of,
)
from helpers import assert_close

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.cuda import packing as cuda_packing
from res2net_fused.backends.cuda import plan as launch_plan
from res2net_fused.chain import reference
from res2net_fused.chain.tolerances import FORWARD
from res2net_fused.testing.parity import convolution_precision

CHECKED = 3  # images of a large batch that are compared with float64: the first, one in the middle and the last


@pytest.fixture(autouse=True)
def usable():
    problem = problem_of(PUBLISHED[0])
    why = cuda_chain.why_not(problem)
    if why is not None:
        pytest.skip(why)


def skip_where_refused(case):
    """The plan's reason, on a card that has too little shared memory for the call."""
    try:
        return launch_of(case, launch_plan.device_limits(torch.device("cuda")))
    except ValueError as error:
        pytest.skip(str(error))


def on_gpu(case, tensors):
    """x (N, s*w, H, W) channels-last, weights and biases."""
    x, weights, biases = tensors
    x = x.cuda().permute(0, 3, 1, 2)
    return x, [w.cuda() for w in weights], [b.cuda() for b in biases]


def run(case, tensors, **options):
    x, weights, biases = on_gpu(case, tensors)
    return hierarchical_conv2d(x, weights, biases, backend="cuda", **case.settings, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", PLANNED, ids=str)
def test_exact_for_integers(case, dtype, poisoned_memory):
    case = replace(affordable(case) if case in FULL else case, dtype=dtype)
    skip_where_refused(case)
    tensors = make_tensors(case, True, 1)
    out = run(case, tensors).permute(0, 2, 3, 1).cpu()
    assert torch.equal(out.double(), expected_of(case, *tensors))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ODD + PUBLISHED + SMALL + FULL, ids=str)
def test_close_for_random_numbers(case, dtype, poisoned_memory):
    case = replace(affordable(case) if case in FULL else case, dtype=dtype)
    skip_where_refused(case)
    tensors = make_tensors(case, False, 1)
    out = run(case, tensors).permute(0, 2, 3, 1).cpu().double()
    expected = expected_of(case, *tensors)
    assert (out - expected).norm() / expected.norm() < tolerance(case)


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "random"])
@pytest.mark.parametrize("case", PLANNED_TF32, ids=str)
def test_float32_is_multiplied_in_tf32(case, integers, poisoned_memory):
    skip_where_refused(case)
    tensors = make_tensors(case, integers, 1)
    with convolution_precision("tf32", "cuda"):
        out = run(case, tensors).permute(0, 2, 3, 1).cpu().double()
    expected = expected_of(case, *tensors)
    assert (out - expected).norm() <= (0 if integers else tolerance(case)) * expected.norm()


def test_float32_is_refused_where_tf32_is_not_allowed():
    with convolution_precision("float32", "cuda"), pytest.raises(RuntimeError, match="fp32_precision is 'ieee'"):
        run(SINGLES[3], make_tensors(SINGLES[3], True, 1))


@pytest.mark.parametrize("case", CUT, ids=str)
def test_every_way_to_cut_a_call_is_exact_for_integers(case, poisoned_memory, monkeypatch):
    """The launches that the emulator runs, of all three kernels: cut by hand, and in padded slots as a block has them."""
    plan = skip_where_refused(case)
    monkeypatch.setattr(cuda_chain, "plan_chain", lambda *_: plan)
    tensors = make_tensors(case, True, 1)
    with convolution_precision("tf32" if case.dtype == torch.float32 else "", "cuda"):
        out = run_in_slots(case, tensors) if case.pad else run(case, tensors)
    assert torch.equal(out.permute(0, 2, 3, 1).cpu().double(), expected_of(case, *tensors))


def run_in_slots(case, tensors):
    """The groups of x and of the output lie `pad` channels apart: NaN, or zeros where those of the output are filled."""
    if not RUNS_KERNELS:
        pytest.skip("no kernel runs on this stand-in card, and only whole calls are answered")
    x, weights, biases = on_gpu(case, tensors)
    pitch, problem = case.width + case.pad, problem_of(case)
    channels = case.scale * pitch

    def slots(height, columns, value):
        shape = case.images, channels, height, columns
        data = torch.full(shape, value, dtype=case.dtype, device="cuda").contiguous(memory_format=torch.channels_last)
        return cuda_chain.Slots(data, channels, pitch), data.unflatten(1, (case.scale, pitch))

    source, x_slots = slots(case.height, case.columns, 0.0 if case.fill else torch.nan)
    target, out_slots = slots(problem.output_height, problem.output_width, torch.nan)
    x_slots[:, :, : case.width] = x.unflatten(1, (case.scale, case.width))
    packed = cuda_packing.pack(weights, biases, case.config)
    cuda_chain.launch_chain(problem, source, target, packed, pitch if case.fill else case.width)
    padding = out_slots[:, :, case.width :]
    assert (padding == 0).all() if case.fill else padding.isnan().all()
    return out_slots[:, :, : case.width].flatten(1, 2)


@pytest.mark.parametrize("case", TIMED, ids=str)
def test_the_calls_that_are_timed(case, poisoned_memory):
    """The published chains at the record's batches."""
    skip_where_refused(affordable(case))
    assert_close_at_full_size(affordable(case))


@pytest.mark.parametrize("case", IN_BLOCKS, ids=str)
def test_the_launches_of_blocks_that_are_timed(case, poisoned_memory, monkeypatch):
    """Those that `info --kernels` predicts, where a block's chain is cut otherwise than the chain alone."""
    case = affordable(case)
    plan, alone = (skip_where_refused(one) for one in (case, replace(case, fill=False)))
    if plan.launch_arguments() == alone.launch_arguments():
        pytest.skip("launched as the chain alone")
    monkeypatch.setattr(cuda_chain, "plan_chain", lambda *_: plan)
    assert_close_at_full_size(case)


def assert_close_at_full_size(case):
    generator = torch.Generator("cuda").manual_seed(1)
    shape = case.images, case.scale * case.width, case.height, case.columns
    x = torch.randn(shape, generator=generator, device="cuda", dtype=case.dtype).relu_()
    x = x.contiguous(memory_format=torch.channels_last)
    size = case.width, case.width, 3, 3
    weights = [
        torch.randn(size, generator=generator, device="cuda", dtype=case.dtype) / (4.5 * case.width) ** 0.5
        for _ in range(case.steps)
    ]
    biases = [torch.randn(case.width, generator=generator, device="cuda") for _ in range(case.steps)]
    dtype = "tf32" if case.dtype == torch.float32 else str(case.dtype)[6:]
    with convolution_precision(dtype, "cuda"):
        out = hierarchical_conv2d(x, weights, biases, backend="cuda")
    some = sorted({0, case.images // 2, case.images - 1})[:CHECKED]
    exact = [w.double() for w in weights], [b.double() for b in biases]
    expected = reference.hierarchical_conv2d(x[some].double(), *exact, case.config)
    assert_close(out[some], expected, FORWARD[dtype].limit)


@pytest.mark.parametrize("case", [ODD[0], ODD[2], SETTINGS[0]], ids=str)
def test_other_layouts_give_the_same(case):
    tensors = make_tensors(case, False, 1)
    x, weights, biases = on_gpu(case, tensors)
    expected = hierarchical_conv2d(x, weights, biases, backend="cuda", **case.settings)
    wide = torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), torch.nan, dtype=x.dtype, device="cuda")
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, x.shape[1] :] = x
    for other in (x.contiguous(), wide[:, x.shape[1] :], x.flip(3).flip(3)):
        out = hierarchical_conv2d(other, weights, biases, backend="cuda", **case.settings)
        assert torch.equal(out, expected)


def test_runs_on_the_current_stream_and_in_a_graph():
    case = PUBLISHED[0]
    x, weights, biases = on_gpu(case, make_tensors(case, False, 1))
    expected = hierarchical_conv2d(x, weights, biases, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = hierarchical_conv2d(x, weights, biases, backend="cuda")
    stream.synchronize()
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = hierarchical_conv2d(static, weights, biases, backend="cuda")
    for scale in (1, 2):
        static.copy_(x * scale)
        graph.replay()
        assert torch.equal(out, hierarchical_conv2d(x * scale, weights, biases, backend="cuda"))
