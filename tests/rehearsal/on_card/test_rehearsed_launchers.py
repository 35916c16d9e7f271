"""The CUDA library's operators and launchers over the stand-in for the CUDA runtime (tests/support/card/cuda_runtime)."""

import ctypes
import os

import card
import pytest
import torch
from card import CARDS, cuda_library
from helpers import relative_error, run_together

from res2net_fused._native import library as native
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.cuda import packing as cuda_packing
from res2net_fused.backends.cuda import plan as launch_plan
from res2net_fused.chain import reference
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.testing.parity import convolution_precision

OWN = card.Settings.of(os.environ["STAND_IN_CARD"])
# Devices of these tests, behind those that torch has; the library prepares each kernel once for each.
SHARED, STALE, FAILING, JIT, NO_CODE, A100 = range(2, 8)
MOST = CARDS["H100"].shared_per_block
OUT_OF_MEMORY, TOO_MANY_RESOURCES, INVALID_VALUE, INVALID_FUNCTION, NO_IMAGE = 2, 701, 1, 98, 209


@pytest.fixture(scope="module")
def cards():
    assert native.cuda_library().loaded, native.cuda_library().reason
    runtime = cuda_library.runtime(cuda_library.build(card.BUILD / "cuda_library"))
    own = [CARDS[OWN.card].limits] * OWN.count
    runtime.set_cards([*own, *[CARDS["H100"].limits] * (A100 - len(own)), CARDS["A100"].limits])
    runtime.loaded_ptx(80, JIT)
    runtime.loaded_ptx(0, NO_CODE)
    yield runtime
    runtime.set_cards(own)


@pytest.fixture
def runtime(cards):
    cards.clear()
    yield cards
    cards.clear()
    cards.set_device(0)


@pytest.fixture
def launch(runtime):
    """launch(device, instance, shared bytes, parts=1, overlaps=False): the error of that launch in bf16, of blocks of one
    warp(group).
    """
    library = ctypes.CDLL(str(runtime.path))

    def by_hand(device, instance, shared_bytes, parts=1, overlaps=False):
        runtime.set_device(device)
        warps = 4 if instance.startswith("wgmma") else 1
        bf16 = launch_plan.TYPES[torch.bfloat16]
        return library.stand_in_launch_by_hand(instance.encode(), bf16, 16, warps, shared_bytes, parts, overlaps, None)

    return by_hand


# Launchers


@pytest.mark.parametrize("instance", ["d2c4t4", "cluster_c4t2", "wgmma_c7t2"])
def test_shared_memory_is_allowed_to_the_most_of_the_device_and_once(instance, runtime, launch):
    """Two threads, as two stages of a network that run at once: neither takes from the other what it was allowed."""
    sizes = 227040, 214464
    run_together(*[lambda size=size: [launch(SHARED, instance, size) for _ in range(100)] for size in sizes])
    assert sorted({launch.shared_bytes for launch in runtime.launches()}) == sorted(sizes)
    assert len(runtime.launches()) == 200
    limits = runtime.shared_limits_set()
    assert set(limits) == {(SHARED, MOST)} and len(limits) <= 2  # both may be the first
    assert launch(SHARED, instance, MOST) == 0 and launch(SHARED, instance, MOST + 1) == INVALID_VALUE
    assert runtime.shared_limits_set() == limits


@pytest.mark.parametrize("instance", ["d1c2t4", "cluster_c2t2", "wgmma_c6t2"])
def test_an_error_of_others_is_neither_reported_nor_removed(instance, runtime, launch):
    runtime.plant_stale_error(OUT_OF_MEMORY)
    for _ in range(2):  # the first prepares the kernel
        assert launch(STALE, instance, 50000) == 0
    assert runtime.last_error() == OUT_OF_MEMORY and len(runtime.launches()) == 2


@pytest.mark.parametrize("instance", ["d1c2t4", "cluster_c2t2", "wgmma_c6t2"])
def test_an_error_of_ours_does_not_stay_for_the_next_caller(instance, runtime, launch):
    runtime.fail_next_launch(TOO_MANY_RESOURCES)
    assert launch(FAILING, instance, 50000) == TOO_MANY_RESOURCES and runtime.last_error() == 0
    assert launch(FAILING, instance, MOST + 1) == INVALID_VALUE and runtime.last_error() == 0
    assert launch(NO_CODE, instance, 50000) == NO_IMAGE and runtime.last_error() == 0  # while it is prepared
    assert launch(FAILING, instance, 50000) == 0
    assert [launch.instance for launch in runtime.launches()] == [instance]


def test_a_context_that_ended_stays_so(runtime, launch):
    runtime.fail_next_launch(700)
    assert launch(FAILING, "d2c4t4", 50000) == 700 and runtime.last_error() == 700
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        native.device_limits(FAILING)


@pytest.mark.parametrize("instance", launch_plan.CLUSTER_INSTANCES)
def test_clusters_run_where_the_code_has_their_instructions(instance, runtime, launch):
    assert launch(SHARED, instance, 50000, parts=4) == 0
    for device in (JIT, A100):
        assert launch(device, instance, 50000, parts=4) == INVALID_FUNCTION and runtime.last_error() == 0
        assert launch(device, instance, 50000) == 0  # parts that send nothing
    assert [(launch.device, launch.cluster) for launch in runtime.launches()] == [(SHARED, 4), (JIT, 1), (A100, 1)]


@pytest.mark.parametrize("instance", ["d2c4t4", "cluster_c4t2", "wgmma_c7t2"])
def test_launches_overlap_where_code_and_driver_can_do_so(instance, runtime, launch):
    parts = 4 if "cluster" in instance else 1
    assert launch(SHARED, instance, 50000, parts, overlaps=True) == launch(SHARED, instance, 50000, parts) == 0
    for device in (JIT, A100):  # whose code does not wait for what the kernel before it writes
        assert launch(device, instance, 50000, overlaps=True) == 0
    runtime.driver(12020)
    assert launch(SHARED, instance, 50000, parts, overlaps=True) == 0
    expected = [(SHARED, True), (SHARED, False), (JIT, False), (A100, False), (SHARED, False)]
    assert [(launch.device, launch.overlaps) for launch in runtime.launches()] == expected


# What a plan is told of a device


def problem(dtype=torch.bfloat16, device=0, width=26, scale=4, rows=7, columns=9):
    return ChainProblem(ChainConfig(), torch.device("cuda", device), dtype, 2, rows, columns, width, scale - 1, True)


def test_code_compiled_from_older_ptx_gets_a_plan_without_clusters(runtime):
    usual, jit = native.device_limits(SHARED), native.device_limits(JIT)
    assert (usual.code, jit.code) == (90, 80) and usual[:7] == jit[:7]
    assert launch_plan.plan_chain(problem(), usual).channel_parts > 1
    plan = launch_plan.plan_chain(problem(), jit)
    assert launch_plan.INSTANCE_NAMES[plan.instance] in launch_plan.STRIP_INSTANCES


def test_a_device_without_code_is_refused_with_the_remedy(runtime):
    limits = native.device_limits(NO_CODE)
    assert limits.code == 0 and runtime.last_error() == 0
    with pytest.raises(ValueError, match="holds no code for compute capability 9.0; .*RES2NET_FUSED_CUDA_ARCHS"):
        launch_plan.plan_chain(problem(), limits)


def test_a_query_of_no_device_leaves_nothing_behind(runtime):
    with pytest.raises(RuntimeError, match="CUDA device 4096 cannot be queried: invalid device ordinal"):
        native.device_limits(4096)
    assert runtime.last_error() == 0 and torch.cuda.current_device() == 0


# The operator


def tensors(p):
    """x and an out that nobody wrote (N, C, H, W), weights, biases."""
    shape = (p.batch, p.scale * p.width, p.height, p.width_pixels)
    x = torch.randn(shape).to(p.device, p.dtype).contiguous(memory_format=torch.channels_last)
    weights = [(torch.randn(p.width, p.width, 3, 3) / (3 * p.width**0.5)).to(p.device, p.dtype) for _ in range(p.steps)]
    biases = [torch.randn(p.width).to(p.device, p.dtype) for _ in range(p.steps)]
    return x, torch.full_like(x, torch.nan), weights, biases


def call(p, x, out, packed):
    slots = (cuda_chain.Slots(t, t.shape[1], p.width) for t in (x, out))
    cuda_chain.launch_chain(p, *slots, packed, p.width)


@pytest.mark.parametrize("which", ["weight", "bias", "out"])
def test_tensors_of_two_cards_are_refused_by_name(which, runtime):
    p = problem()
    x, out, *parameters = tensors(p)
    given = dict(zip(("weight", "bias"), cuda_packing.pack(*parameters, p.config), strict=True), out=out)
    given[which] = given[which].to("cuda:1")
    with pytest.raises(RuntimeError, match=f"{which}: on cuda:1; expected cuda:0, where x is"):
        call(p, x, given["out"], [given["weight"], given["bias"]])
    assert runtime.launches() == []


@pytest.mark.parametrize("which, offset, bytes", [("weight", 1, 16), ("weight", 4, 16), ("bias", 1, 8)])
def test_weights_that_no_copy_can_read_are_refused_by_name(which, offset, bytes, runtime):
    p = problem()
    x, out, *parameters = tensors(p)
    given = dict(zip(("weight", "bias"), cuda_packing.pack(*parameters, p.config), strict=True))
    whole = given[which].flatten()
    given[which] = torch.cat([whole[:offset], whole])[offset:]
    with pytest.raises(RuntimeError, match=f"{which}: expected memory that is aligned to {bytes} bytes"):
        call(p, x, out, list(given.values()))
    assert runtime.launches() == []


def test_a_failing_launch_raises_its_own_error_and_the_next_runs(runtime):
    p = problem(device=1)
    x, out, *parameters = tensors(p)
    packed = cuda_packing.pack(*parameters, p.config)
    runtime.plant_stale_error(OUT_OF_MEMORY)
    call(p, x, out, packed)
    runtime.fail_next_launch(TOO_MANY_RESOURCES)
    with pytest.raises(RuntimeError, match="could not be launched: too many resources requested for launch"):
        call(p, x, out, packed)
    stream = torch.cuda.Stream(1)
    with torch.cuda.stream(stream):
        call(p, x, out, packed)
    plain, aside = runtime.launches()
    assert (plain.device, plain.stream) == (1, 0) and aside == plain._replace(stream=stream.cuda_stream) and aside.stream != 0
    assert torch.cuda.current_device() == 0


KERNELS = {
    "shared": problem(), "half": problem(torch.float16, width=14, scale=8), "wide": problem(width=52, rows=14),
    "tf32": problem(torch.float32), "odd": problem(torch.float32, width=27),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_the_operator_runs_the_kernel_that_it_launches(name, runtime):
    """From tensors through plan, packing and arguments to the kernel's own source, in the emulator."""
    p = KERNELS[name]
    x, out, weights, biases = tensors(p)
    expected = reference.hierarchical_conv2d(x.double(), [w.double() for w in weights], [b.double() for b in biases], p.config)
    runtime.execute(True)
    with convolution_precision("tf32", "cuda"):
        call(p, x, out, cuda_packing.pack(weights, biases, p.config))
    [launch] = runtime.launches()
    plan = launch_plan.plan_chain(p, native.device_limits(0))
    assert launch[:5] == (launch_plan.INSTANCE_NAMES[plan.instance], launch.dtype, plan.ctas, plan.threads, plan.shared_bytes)
    assert launch.overlaps == (OWN.card == "H100")
    assert launch.dtype == {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}[p.dtype]
    # Measured worst: 3e-3 in bf16, 4e-4 in fp16, 6e-4 in TF32: each y is rounded, and read by the next convolution.
    assert relative_error(out, expected) <= {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-3}[p.dtype]
