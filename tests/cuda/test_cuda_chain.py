"""The `cuda` backend on a GPU, against PyTorch in float64: every instance, odd sizes, graphs and streams."""

import pytest
import torch
from emulator.harness import TOLERANCES, Case, expected_of, make_tensors, plan_of, replace
from test_emulated_chain import HALVES, SETTINGS, SINGLES, WIDTHS
from test_emulated_cluster import SHARED, SHARED_SETTINGS

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends import native_cuda
from res2net_fused.chain import ChainProblem
from res2net_fused.parity import convolution_precision


def unavailable():
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    problem = ChainProblem(WIDTHS[0].config, torch.device("cuda"), torch.bfloat16, 1, 14, 14, 26, 3, True)
    return native_cuda.why_not(problem)


pytestmark = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "available")
ODD = [Case(26, 4, 3, 57, 33), Case(52, 4, 2, 29, 31), Case(104, 4, 5, 15, 13), Case(208, 4, 9, 7, 7), Case(14, 8, 2, 61, 129)]
# Wide groups in batches that fill a Hopper GPU: the wgmma kernel there.
FULL = [Case(52, 4, 64, 28, 28), Case(104, 4, 256, 14, 14), Case(48, 2, 32, 56, 56), Case(56, 8, 130, 14, 13)]
FULL += [Case(96, 3, 130, 15, 9), Case(208, 2, 257, 7, 7)]
PUBLISHED = [Case(w << i, s, 3, 56 >> i, 56 >> i) for w, s in ((26, 4), (14, 8), (48, 2)) for i in range(4)]
IN_TF32 = [case for case in SINGLES if not case.pad] + [Case(**{**c.__dict__, "dtype": torch.float32}) for c in ODD + PUBLISHED]
CASES = [case for case in WIDTHS + SETTINGS + ODD + PUBLISHED + FULL if not case.pad]
# Batches of one and two are what clusters share; the odd number of images leaves the last CTA with less than its part.
SMALL = [replace(case, images=images) for case in ODD + PUBLISHED for images in (1, 2)]
CLUSTERS = [case for case in SHARED + SHARED_SETTINGS if not case.pad]


def on_gpu(case, tensors):
    """x (N, s*w, H, W) channels-last, weights and biases."""
    x, weights, biases = tensors
    x = x.cuda().permute(0, 3, 1, 2)
    return x, [w.cuda() for w in weights], [b.cuda() for b in biases]


def run(case, tensors, **options):
    x, weights, biases = on_gpu(case, tensors)
    return hierarchical_conv2d(x, weights, biases, backend="cuda", **case.settings, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES + SMALL, ids=str)
def test_exact_for_integers(case, dtype, poisoned_memory):
    case = Case(**{**case.__dict__, "dtype": dtype})
    tensors = make_tensors(case, True, 1)
    out = run(case, tensors).permute(0, 2, 3, 1).cpu()
    assert torch.equal(out.double(), expected_of(case, *tensors))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ODD + PUBLISHED + SMALL + FULL, ids=str)
def test_close_for_random_numbers(case, dtype, poisoned_memory):
    case = Case(**{**case.__dict__, "dtype": dtype})
    tensors = make_tensors(case, False, 1)
    out = run(case, tensors).permute(0, 2, 3, 1).cpu().double()
    expected = expected_of(case, *tensors)
    assert (out - expected).norm() / expected.norm() < TOLERANCES[dtype]


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "random"])
@pytest.mark.parametrize("case", IN_TF32, ids=str)
def test_float32_is_multiplied_in_tf32(case, integers, poisoned_memory):
    tensors = make_tensors(case, integers, 1)
    with convolution_precision("tf32", "cuda"):
        out = run(case, tensors).permute(0, 2, 3, 1).cpu().double()
    expected = expected_of(case, *tensors)
    assert (out - expected).norm() <= (0 if integers else TOLERANCES[case.dtype]) * expected.norm()


def test_float32_is_refused_where_tf32_is_not_allowed():
    with convolution_precision("float32", "cuda"), pytest.raises(RuntimeError, match="fp32_precision is 'ieee'"):
        run(SINGLES[3], make_tensors(SINGLES[3], True, 1))


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="needs clusters")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CLUSTERS, ids=str)
def test_every_way_to_share_is_exact_for_integers(case, dtype, poisoned_memory, monkeypatch):
    """The launches that the emulator runs, cut by hand."""
    case = replace(case, dtype=dtype)
    monkeypatch.setattr(native_cuda, "plan_chain", lambda problem, limits: plan_of(case)._replace(**case.tile))
    tensors = make_tensors(case, True, 1)
    out = run(case, tensors).permute(0, 2, 3, 1).cpu()
    assert torch.equal(out.double(), expected_of(case, *tensors))


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
