"""The launch plan of the native CUDA backend and the choice it leads to; no GPU needed."""

import itertools
from dataclasses import replace

import pytest
import torch
from tree import ROOT

from res2net_fused._native import library
from res2net_fused.backends import choices, selection
from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.cuda import packing as cuda_packing
from res2net_fused.backends.cuda import plan as launch_plan
from res2net_fused.backends.cuda.plan import LIMITS, plan_chain
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.testing.parity import convolution_precision

needs_library = pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason or "loaded")
CONFIGS = {"26w4s": (26, 4), "14w8s": (14, 8), "48w2s": (48, 2)}
STAGES = ((0, 56), (1, 28), (2, 14), (3, 7))
WIDE_FOR_100_KIB = (28, 56, 104, 208, 384)  # of float32: either a long chain with its halo, or wide
ODD = [(2, 2, 1, 1, 1), (30, 3, 5, 1, 999), (64, 4, 1, 333, 3), (128, 8, 3, 17, 31), (256, 2, 2, 9, 9), (384, 4, 1, 7, 7)]


def problem(batch, width, scale, height, columns, dtype=torch.bfloat16, device="cuda", **settings):
    config = ChainConfig(**settings)
    steps = scale - (config.passthrough != "none")
    return ChainProblem(config, torch.device(device), dtype, batch, height, columns, width, steps, True)


def published(batches=(1, 32, 256), dtype=torch.bfloat16):
    for (width, scale), (stage, size), batch in itertools.product(CONFIGS.values(), STAGES, batches):
        yield problem(batch, width << stage, scale, size, size, dtype)


def limits_hold(plan, limits):
    name = launch_plan.INSTANCE_NAMES[plan.instance]
    instance_warps = {"d1c2t4": 16, "d2c4t4": 12, "d3c6t4": 8, "d4c7t4": 8, "d0c7t2": 12, "cluster_c7t2": 12}
    instance_warps |= {"wgmma_c12t2": 12, "wgmma_c14t2": 8}
    warps = instance_warps.get(name, 16)
    if name in launch_plan.WGMMA_INSTANCES:
        assert limits.capability_major == 9 and plan.warps_m % 4 == 0
    assert 32 <= plan.threads <= 32 * warps and plan.threads == 32 * plan.warps_m * plan.warps_n * plan.warps_k
    assert 0 < plan.shared_bytes <= limits.shared_per_block_optin
    resident = plan.ctas_per_multiprocessor
    assert resident >= 1
    assert resident * (plan.shared_bytes + 1024) <= limits.shared_per_multiprocessor
    registers = min(255, 65536 // (32 * warps) // 8 * 8)
    assert resident * plan.threads * registers <= limits.registers_per_multiprocessor
    assert plan.slices % 3 == 0 and 2 <= plan.stages <= 4
    assert 1 <= plan.ctas < 2**31


def parts_hold(plan, p, limits):
    """What the launcher demands of CTAs that share their work, and clusters of at most 8 of them, from sm_90 on."""
    parts = plan.row_parts * plan.channel_parts
    assert plan.ctas % parts == 0
    if "cluster" not in launch_plan.INSTANCE_NAMES[plan.instance]:
        assert parts * plan.warps_k == 1
        return
    columns = int(launch_plan.INSTANCE_NAMES[plan.instance].removeprefix("cluster_c").partition("t")[0])
    assert plan.channel_parts == -(-p.width // (8 * plan.warps_n * columns))
    if p.config.hierarchical and p.steps > 1:
        assert 2 <= parts <= 8 and limits.capability_major >= 9
        # A cluster runs within one group of 16 multiprocessors or more.
        assert 16 * plan.ctas_per_multiprocessor >= parts
    if plan.row_parts > 1:
        assert plan.images == 1 and not plan.whole and plan.columns == p.width_pixels
        assert plan.row_parts == -(-p.height // plan.rows) and plan.rows >= p.config.dilation


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", LIMITS)
def test_every_plan_fits_the_device(device, dtype):
    limits = LIMITS[device]
    for p in published(dtype=dtype):
        if dtype == torch.float32 and limits.shared_per_block_optin < 2**17 and p.width in WIDE_FOR_100_KIB:
            with pytest.raises(ValueError, match="shared memory"):  # two strips and the weights in flight are too much
                plan_chain(p, limits)
            continue
        plan = plan_chain(p, limits)
        limits_hold(plan, limits)
        parts_hold(plan, p, limits)
        computed = plan.ctas // plan.channel_parts * plan.images * plan.rows * plan.columns
        assert computed >= p.batch * p.output_height * p.output_width
        assert 9 * -(-p.width * dtype.itemsize // 32) % plan.slices == 0
        assert dtype != torch.float32 or launch_plan.INSTANCE_NAMES[plan.instance].startswith("d0")
        assert plan.flops == p.flops and plan.mma_flops >= plan.flops
        assert plan.loaded_bytes * 1.01 >= p.steps * p.batch * p.height * p.width_pixels * p.width * dtype.itemsize
        assert plan.nanoseconds > 2000 and plan.steps_nanoseconds > 2000


@needs_library
@pytest.mark.parametrize("device", LIMITS)
def test_plans_behind_the_first_cut_the_images_otherwise_and_are_no_faster(device):
    limits = LIMITS[device]
    for p in published(batches=(1, 32)):
        plans = [plan_chain(p, limits, rank) for rank in range(5)]
        assert plans[0] == plan_chain(p, limits)
        assert [plan.nanoseconds for plan in plans] == sorted(plan.nanoseconds for plan in plans)
        distinct = list(dict.fromkeys(plans))
        assert plans[len(distinct) - 1 :] == [distinct[-1]] * (6 - len(distinct)), "behind the last the last"
        for plan in distinct:
            limits_hold(plan, limits)
            parts_hold(plan, p, limits)
    with pytest.raises(RuntimeError, match="rank: -1"):
        plan_chain(p, limits, -1)


@needs_library
def test_a_measurement_tries_several_plans_that_are_no_slower_by_half(monkeypatch):
    monkeypatch.setattr(cuda_chain, "device_limits", lambda device: LIMITS["sm_90"])
    p = problem(32, 104, 4, 14, 14)
    ways = cuda_chain.ways(p)
    assert ways[:3] == ("cuda", "cuda:1", "cuda:2") and len(set(ways)) == len(ways) <= 6
    assert cuda_chain.ways(problem(256, 14, 8, 56, 56))[0] == "cuda"
    for rank, way in enumerate(ways):
        with choices.pinned(way):
            assert cuda_chain.chosen_plan(p) == plan_chain(p, LIMITS["sm_90"], rank)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", LIMITS)
def test_odd_shapes_get_a_plan_or_a_reason(device, dtype):
    for width, scale, batch, height, columns in ODD:
        try:
            p = problem(batch, width, scale, height, columns, dtype)
            plan = plan_chain(p, LIMITS[device])
        except ValueError as error:
            assert "shared memory" in str(error)
        else:
            limits_hold(plan, LIMITS[device])
            parts_hold(plan, p, LIMITS[device])


@needs_library
@pytest.mark.parametrize(
    "device, shared",
    [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True), ("sm_120", True)],
)
def test_small_calls_are_shared_by_clusters_where_there_are_any(device, shared):
    for width, size in ((52, 28), (104, 14), (208, 7)):
        plan = plan_chain(problem(1, width, 4, size, size), LIMITS[device])
        assert ("cluster" in launch_plan.INSTANCE_NAMES[plan.instance]) == shared


@needs_library
@pytest.mark.parametrize("device", ["sm_90", "sm_100", "sm_120"])
def test_code_without_the_instructions_of_clusters_gets_none(device):
    """What the driver compiles from PTX for older devices."""
    limits = LIMITS[device]
    for p in published(batches=(1,)):
        assert "cluster" not in name_of(plan_chain(p, limits._replace(code=80))) or p.steps == 1
    with pytest.raises(ValueError, match=r"no code for compute capability \d+\.0; build it where RES2NET_FUSED_CUDA_ARCHS"):
        plan_chain(p, limits._replace(code=0))


@needs_library
@pytest.mark.parametrize(
    "capability, rates", [((8, 7), 86), ((8, 8), 89), ((10, 3), 100), ((11, 0), 100), ((12, 1), 120), ((13, 0), 120)]
)
def test_an_unknown_card_gets_the_rates_of_the_nearest_and_the_plan_says_so(capability, rates):
    p = problem(256, 26, 4, 56, 56)
    major, minor = capability
    plan = plan_chain(p, LIMITS["sm_86"]._replace(capability_major=major, capability_minor=minor, code=80))
    note = f"rates of sm_{rates}, the nearest known to sm_{major}{minor}"
    assert note in launch_plan.describe(plan, p.dtype)
    known = plan_chain(p, LIMITS["sm_86"]._replace(capability_major=rates // 10, capability_minor=rates % 10, code=80))
    assert (plan.nanoseconds, plan.steps_nanoseconds) == (known.nanoseconds, known.steps_nanoseconds)
    assert "rates" not in launch_plan.describe(known, p.dtype)


@needs_library
def test_small_blackwell_has_rates_of_its_own():
    """An RTX 5090 moves 1.8 TB/s and multiplies 512 numbers a cycle and multiprocessor; not what a B200 does."""
    plan = plan_chain(problem(256, 26, 4, 56, 56), LIMITS["sm_120"])
    assert plan.rates == plan.capability == 120
    assert plan.nanoseconds >= plan.dram_bytes / 1.8e12 * 1e9
    assert plan.nanoseconds >= plan.mma_flops / (512 * 170 * 2.41e9) * 1e9


@needs_library
@pytest.mark.parametrize("device", ["sm_90", "sm_100"])
@pytest.mark.parametrize("settings", [{"dilation": 2}, {"dilation": 3}, {"passthrough": "first"}, {"hierarchical": False}])
def test_shared_plans_fit_whatever_the_settings(device, settings):
    for width, batch, size in itertools.product((26, 52, 104, 208), (1, 2, 5, 32), (5, 7, 14, 28)):
        p = problem(batch, width, 4, size, size + 1, **settings)
        try:
            plan = plan_chain(p, LIMITS[device])
        except ValueError as error:
            assert "shared memory" in str(error) and width == 208 and size == 28
            continue
        limits_hold(plan, LIMITS[device])
        parts_hold(plan, p, LIMITS[device])


@needs_library
def test_bytes_and_flops_are_those_of_the_tensors():
    p = problem(32, 26, 4, 56, 56)
    plan = plan_chain(p, LIMITS["sm_90"])
    tensor = 32 * 56 * 56 * 104 * 2
    weights = 3 * 9 * 2 * 4 * 256  # steps, taps, depths, columns, bytes of a fragment
    assert plan.dram_bytes == 2 * tensor + weights
    assert plan.flops == 2 * 9 * 26 * 26 * 3 * 32 * 56 * 56


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", LIMITS)
def test_no_prediction_is_shorter_than_what_bounds_it(device, dtype):
    for p in published(dtype=dtype):
        if dtype == torch.bfloat16 or p.width not in WIDE_FOR_100_KIB:
            plan = plan_chain(p, LIMITS[device])
            assert plan.nanoseconds > max(plan.bounds()) and min(plan.bounds()) > 0


@needs_library
def test_the_bound_of_the_tensor_cores_is_that_of_the_busiest_multiprocessor():
    for p in published():
        plan = plan_chain(p, LIMITS["sm_90"])
        cycles = 1.05 if launch_plan.INSTANCE_NAMES[plan.instance] in launch_plan.WGMMA_INSTANCES else 1.55
        products = -(-plan.ctas // 132) * plan.mma_flops / plan.ctas / (2 * 16 * 8 * 16)
        assert plan.tensor_nanoseconds == pytest.approx(products * cycles / 1.7, abs=1)


@needs_library
def test_a_block_is_planned_with_its_padded_groups():
    chain = problem(32, 14, 8, 56, 56)
    block = replace(chain, around=(256, 256))
    first = replace(block, config=ChainConfig(passthrough="first"))
    dense, padded, copied = (plan_chain(p, LIMITS["sm_90"]) for p in (chain, block, first))
    weights, pixels = 7 * 9 * 2 * 256, 32 * 56 * 56
    # In and out, in half precision; conv1 writes the group that passes, unless it is the first.
    assert dense.dram_bytes == weights + 2 * 2 * 8 * 14 * pixels
    assert padded.dram_bytes == weights + 2 * 2 * 7 * 16 * pixels
    assert copied.dram_bytes == weights + 2 * 2 * 8 * 16 * pixels
    groups = [launch_plan.copied_group(p) for p in (chain, block, first)]
    assert groups == [7, None, 0]
    # x of every convolution but the first is copied behind another one's products: lines of 56 pixels, two fewer for each
    # convolution that has eaten its halo. 14 channels are two copies of 16 bytes, or seven of 4, at 13 instructions each.
    assert padded.rows == dense.rows == 14 and padded.ctas_per_multiprocessor == 1
    copies = sum(14 + 2 * (7 - step) for step in range(1, 7)) * 56 * (7 - 2) / 32
    assert dense.issue_nanoseconds - padded.issue_nanoseconds == pytest.approx(copies * 13 / 4 / 1.7, abs=2)


@needs_library
def test_a_pass_of_few_tiles_takes_the_time_of_the_warps_that_have_one():
    plan = plan_chain(replace(problem(32, 26, 4, 56, 56), around=(256, 256)), LIMITS["sm_90"])
    # The last convolution has 398 positions, 7 tiles of 64: two of the five warps have one in its second pass.
    assert (plan.rows, plan.columns, plan.warps_m, plan.ctas_per_multiprocessor) == (7, 56, 5, 2)
    assert 23_000 < plan.nanoseconds < 23_500, "24,100 if all five were waited for"


@needs_library
def test_float32_moves_twice_the_bytes_for_the_same_flops():
    half, single = (plan_chain(problem(32, 26, 4, 56, 56, dtype), LIMITS["sm_90"]) for dtype in (torch.float16, torch.float32))
    assert single.flops == half.flops
    tensor, weights = 32 * 56 * 56 * 104 * 4, 3 * 9 * 4 * 4 * 256  # of 8 input channels each: twice the depths
    assert single.dram_bytes == 2 * tensor + weights
    assert single.nanoseconds > half.nanoseconds and single.steps_nanoseconds > half.steps_nanoseconds


@needs_library
def test_float32_takes_odd_widths():
    assert plan_chain(problem(1, 27, 4, 14, 14, torch.float32), LIMITS["sm_90"]).packed_columns == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_float32_follows_the_setting_of_cudnn(dtype):
    p = problem(1, 26, 4, 56, 56, dtype)
    with convolution_precision("tf32", "cuda"):
        assert cuda_chain.precision_refusal(p) is None
    with convolution_precision("float32", "cuda"):
        reason = cuda_chain.precision_refusal(p)
    assert reason is None if dtype == torch.float16 else "cudnn.conv.fp32_precision is 'ieee'" in reason


@needs_library
def test_large_maps_are_cut_into_strips_and_small_ones_kept_whole():
    assert not plan_chain(problem(256, 26, 4, 56, 56), LIMITS["sm_90"]).whole
    small = plan_chain(problem(256, 208, 4, 7, 7), LIMITS["sm_90"])
    assert small.whole
    wide = plan_chain(problem(1, 104, 4, 64, 4096), LIMITS["sm_90"])
    assert wide.columns < 4096


@needs_library
@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"width": 27}, "27 channels; in half precision an even number"),
        ({"width": 1024}, "1024 channels; at most 512"),
        ({"dtype": torch.float64}, "torch.float64; this backend runs torch.float16, torch.bfloat16, torch.float32"),
        ({"groups": 2}, "groups is 2"),
        ({"height": 20000, "columns": 20000}, "an image of x has 102400000000 bytes, .* at most 1073741824"),
        ({"height": 2**15 + 1}, "the height of x is 32769; at most 32768"),
        ({"columns": 2**20 + 1}, "the width of x is 1048577; at most 1048576"),
        ({"batch": 2**30 + 1}, "the batch is 1073741825; at most 1073741824"),
        ({"batch": 2**30}, "x has 53876069761024 bytes, its groups padded to 16; at most 17592186044416"),
        # dense, an image would be of 2^30 bytes, but the block pads groups of 2 channels to 8
        ({"width": 2, "height": 2**13, "columns": 2**13}, "an image of x has 4294967296 bytes"),
        ({"dilation": 4000}, "shared memory"),
        ({"dilation": 30000, "scale": 9, "columns": 100000, "height": 1}, "shared memory"),
        ({"dilation": 2**31 - 1}, "dilation is .*; at most 32768"),
    ],
)
def test_what_cannot_run_says_why(changed, reason):
    arguments = {"batch": 1, "width": 26, "scale": 4, "height": 14, "columns": 14} | changed
    with pytest.raises(ValueError, match=reason):
        plan_chain(problem(**arguments), LIMITS["sm_90"])


@needs_library
def test_no_grid_has_more_blocks_than_may_be_launched():
    """Narrow groups with wide halos: small parts of many images, of which a batch less has a plan."""
    shape = {"width": 2, "scale": 3, "height": 2**15, "columns": 512, "dilation": 6}
    with pytest.raises(ValueError, match="x has 21845 images, whose parts are more than the 2147483647 blocks of a launch"):
        plan_chain(problem(21845, **shape), LIMITS["sm_86"])
    assert 2**30 < plan_chain(problem(15000, **shape), LIMITS["sm_86"]).ctas < 2**31


@needs_library
def test_old_devices_are_refused():
    with pytest.raises(ValueError, match=r"7\.5; at least 8\.0"):
        plan_chain(problem(1, 26, 4, 14, 14), LIMITS["sm_80"]._replace(capability_major=7, capability_minor=5))


@needs_library
@pytest.mark.parametrize("dtype, odd", [(torch.bfloat16, 0), (torch.float32, 0), (torch.float32, 1)], ids=str)
def test_python_packs_for_the_instance_that_the_plan_chooses(dtype, odd):
    for width in range(2 + odd, 513, 2):
        plan = plan_chain(problem(1, width, 2, 3, 3, dtype), LIMITS["sm_90"])
        assert cuda_packing.packed_columns(width, dtype) == plan.packed_columns, width


def name_of(plan):
    return launch_plan.INSTANCE_NAMES[plan.instance]


WGMMA = [(52, 4, 28), (104, 4, 14), (48, 2, 56), (56, 8, 14), (96, 2, 28), (208, 4, 7)]


@needs_library
@pytest.mark.parametrize("width, scale, size", WGMMA)
def test_wide_groups_run_on_wgmma_where_there_is_any(width, scale, size):
    p = problem(256, width, scale, size, size)
    limits = LIMITS["sm_90"]
    plan = plan_chain(p, limits)
    assert name_of(plan) in launch_plan.WGMMA_INSTANCES and name_of(plan) in launch_plan.describe(plan, p.dtype)
    without = plan_chain(p, limits._replace(wgmma=0))  # the library holds no code for sm_90a
    assert name_of(without) not in launch_plan.WGMMA_INSTANCES and without.nanoseconds > plan.nanoseconds
    assert without.packed_columns == plan.packed_columns
    for device in ("sm_80", "sm_89", "sm_100", "sm_120"):
        assert name_of(plan_chain(p, LIMITS[device])) not in launch_plan.WGMMA_INSTANCES


@needs_library
@pytest.mark.parametrize(
    "changed", [{"width": 26}, {"dtype": torch.float32}, {"stride": 2, "hierarchical": False, "pool": "avg3"}], ids=str
)
def test_wgmma_is_for_wide_groups_in_half_precision_without_a_stride(changed):
    arguments = {"batch": 256, "width": 52, "scale": 4, "height": 28, "columns": 28} | changed
    plan = plan_chain(problem(**arguments), LIMITS["sm_90"])
    assert name_of(plan) not in launch_plan.WGMMA_INSTANCES


def test_python_names_the_instances_of_the_table():
    import re

    table = ROOT / "csrc/cuda/plan/instances.h"
    rows = re.findall(r"X\((d\w+), (\d+), (\d+), (\d+), (\d+)\)", table.read_text())
    others = tuple(re.findall(r"X\(((?:cluster|wgmma)_\w+), ", table.read_text()))
    assert (*(row[0] for row in rows), *others) == launch_plan.INSTANCE_NAMES
    assert others == launch_plan.CLUSTER_INSTANCES + launch_plan.WGMMA_INSTANCES
    assert tuple(row[0] for row in rows) == launch_plan.STRIP_INSTANCES
    assert tuple((int(row[1]), int(row[2])) for row in rows) == cuda_packing._INSTANCE_DEPTHS_COLUMNS


def test_the_line_for_explain_names_the_cut_and_the_prediction():
    plan = launch_plan.Plan(
        1, 14, 56, 1, 0, 4, 1, 18, 2, 1, 1, 1, 128, 128, 182784, 1, 4, 1, 1, 1, 1, 27123, 63000, 90, 90, 1, 1, 1, 1
    )
    assert ", tf32, 128 CTAs" in launch_plan.describe(plan, torch.float32)
    line = launch_plan.describe(plan, torch.bfloat16)
    assert "parts" not in line and "4x1 warps" in line
    cluster = launch_plan.INSTANCE_NAMES.index("cluster_c4t2")
    shared = launch_plan.describe(plan._replace(instance=cluster, row_parts=2, channel_parts=3, warps_k=5), torch.bfloat16)
    assert "cluster_c4t2" in shared and "in 2 row x 3 channel parts" in shared and "4x1x5 warps" in shared
    assert "d2c4t4" in line and "128 CTAs of 14x56 pixels" in line and "predicted 27 us, per step 63 us" in line


# The choice between backends


class Stub:
    name = "stub"

    def __init__(self, why=None, rather=None):
        self.why, self.rather = why, rather

    def why_not(self, problem):
        return self.why

    def why_not_auto(self, problem):
        return self.rather


@pytest.mark.parametrize(
    "cuda, triton, chosen",
    [
        (Stub(), Stub(), "cuda"),
        (Stub(rather="slower"), Stub(), "triton"),
        (Stub(rather="slower"), Stub(why="no triton"), "cuda"),  # rather than the reference
        (Stub(why="no kernel"), Stub(why="no triton"), "reference"),
        (Stub(why="no kernel"), Stub(), "triton"),
    ],
)
def test_auto_prefers_the_faster_prediction(monkeypatch, cuda, triton, chosen):
    stubs = {"cuda": cuda, "triton": triton}
    real = selection.get_backend
    monkeypatch.setattr(selection, "get_backend", lambda name: stubs.get(name) or real(name))
    assert selection.choose(problem(1, 26, 4, 56, 56)).name == chosen


def test_auto_keeps_to_the_backend_that_the_weights_are_packed_for(monkeypatch):
    stubs = {"cuda": Stub(rather="slower"), "triton": Stub()}
    real = selection.get_backend
    monkeypatch.setattr(selection, "get_backend", lambda name: stubs.get(name) or real(name))
    p = problem(1, 26, 4, 56, 56)
    assert selection.choose(p, layout="cuda").name == "cuda"
    assert selection.choose(p, layout="plain").name == "triton"
    assert selection.choose(p, layout="reference").name == "triton"  # which needs no packing
    stubs["cuda"].why = "no kernel"
    assert selection.choose(p, layout="cuda").name == "triton"


@needs_library
def test_auto_goes_on_where_a_size_is_too_large_and_says_so(monkeypatch):
    """A GPU is only made believe."""
    pytest.importorskip("triton")
    monkeypatch.setattr(library, "cuda_library", library.cpu_library)
    monkeypatch.setattr(cuda_chain, "device_limits", lambda device: LIMITS["sm_90"])
    monkeypatch.setattr(triton_backend.availability, "capability", lambda device: (9, 0))
    high = selection.choose(problem(1, 26, 4, 2**15 + 1, 56))
    assert high.name == "triton" and high.reason == "cuda: the height of x is 32769; at most 32768 is allowed"
    huge = selection.choose(problem(1, 26, 4, 2**15, 2**17))
    assert huge.name == "reference"
    assert "cuda: an image of x has 1099511627776 bytes" in huge.reason
    assert "triton: an image of x gives 32768x131072 output pixels; at most 2147482624 are allowed" in huge.reason
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run .*: the height of x is 32769; at most 32768"):
        selection.choose(problem(1, 26, 4, 2**15 + 1, 56), "cuda")


def test_tensors_elsewhere_are_refused():
    assert "x is on cpu" in cuda_chain.why_not(problem(1, 26, 4, 56, 56, device="cpu"))


# Reading x as it lies


def test_pixel_pitch_accepts_dense_pixels_and_slices_of_them():
    x = torch.zeros(2, 104, 5, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert cuda_chain.pixel_pitch(x) == 104
    wide = torch.zeros(2, 208, 5, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert cuda_chain.pixel_pitch(wide[:, 104:]) == 208
    assert cuda_chain.pixel_pitch(wide[:1, :104]) == 208
    assert cuda_chain.pixel_pitch(wide[:, :104, :1]) is None  # a row is missing between two images
    assert cuda_chain.pixel_pitch(wide[:1, :104, :1, :1]) == 104  # one pixel
    assert cuda_chain.pixel_pitch(wide[:, 1:105]) is None  # not aligned to 4 bytes
    assert cuda_chain.pixel_pitch(wide[:, :104, :, ::2]) is None
    odd = torch.zeros(2, 81, 5, 7).contiguous(memory_format=torch.channels_last)
    assert cuda_chain.pixel_pitch(odd) == 81 and cuda_chain.pixel_pitch(odd[:, 27:]) == 81
    assert cuda_chain.pixel_pitch(odd.half()) is None
    assert cuda_chain.pixel_pitch(x.contiguous()) is None
    assert cuda_chain.pixel_pitch(wide[:, :104].expand(2, 104, 5, 7).flip(0)[:, :, :, :6]) is None


@needs_library
def test_the_recorded_predictions_are_those_of_the_plan():
    """Run `res2net-fused info --kernels` and renew the file after a change to the model or to the search."""

    from res2net_fused._tables import format_table
    from res2net_fused.backends.cuda.kernel_report import prediction_table

    head, *rows = prediction_table()
    recorded = ROOT / "benchmarks/results/cuda_chain_predictions.txt"
    assert recorded.read_text().partition("\n\n")[2] == format_table(head, rows, left=3) + "\n"
