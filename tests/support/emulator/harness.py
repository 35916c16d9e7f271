"""Builds the chain kernel for the host, runs it under the emulator and compares it with PyTorch in float64.

Needs g++ 12 or newer, but for plans any compiler with C++20, and no built extension. Objects are cached under build/emulator.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import subprocess
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from res2net_fused._native import build_flags
from res2net_fused._native.library import DeviceLimits
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.cuda import packing as cuda_packing
from res2net_fused.backends.cuda import plan as launch_plan
from res2net_fused.chain import reference
from res2net_fused.chain.config import ChainConfig

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "emulator"
FLAGS = "-std=c++20 -fPIC -Wall -Wextra -Wno-unknown-pragmas".split()
# Kernels are sampled for speed at -O1: with -O2 they compile three times as long and run a tenth faster. What they leave
# uninitialised holds a pattern.
KERNEL_FLAGS = ("-O1", "-ftrivial-auto-var-init=pattern")
OLDER_CODE = (*KERNEL_FLAGS, "-DRES2NET_EMULATED_CODE=80")  # as compiled for devices without bulk copies
INSTANCES = build_flags.cuda_instances(ROOT)


def includes(csrc: pathlib.Path) -> list[str]:
    return [f"-I{csrc}", f"-I{HERE}"]


def compile_cached(sources: list[pathlib.Path], flags: list[str], csrc: pathlib.Path, suffix: str) -> pathlib.Path:
    """Compiles `sources` into one file named after everything that goes into it, unless that file is there already."""
    digest = hashlib.sha256(" ".join(flags).replace(str(csrc), "").encode())
    used = [HERE.glob("*.h"), HERE.glob("*.cpp"), csrc.glob("cuda/plan/*"), csrc.glob("cuda/chain/*")]
    for path in sorted(path for paths in used for path in paths):
        digest.update(path.name.encode() + path.read_bytes())
    target = BUILD / f"{sources[0].stem}-{digest.hexdigest()[:16]}{suffix}"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in two processes compile nothing twice
        if not target.exists():
            fresh = target.with_suffix(".new")
            command = [os.environ.get("CXX", "g++"), *FLAGS, *includes(csrc), *flags, "-o", str(fresh), *map(str, sources)]
            subprocess.run(command, check=True)
            os.replace(fresh, target)
    return target


@functools.cache
def emulator_object() -> pathlib.Path:
    sources = [HERE / name for name in ("emulator.cpp", "memory.cpp", "products.cpp")]
    return compile_cached(sources, ["-O2", "-r"], ROOT / "csrc", ".o")


@functools.cache
def plan_object() -> pathlib.Path:
    return compile_cached(sorted((ROOT / "csrc/cuda/plan").glob("*_plan.cpp")), ["-O2", "-r"], ROOT / "csrc", ".o")


@functools.cache
def plan_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_cached([HERE / "plan_host.cpp", plan_object()], ["-O2", "-shared"], ROOT / "csrc", ".so")))


@functools.cache
def library(instance: str, csrc: pathlib.Path = ROOT / "csrc", flags: tuple[str, ...] = KERNEL_FLAGS) -> ctypes.CDLL:
    """The emulated kernel of one instance, from the sources under `csrc`."""
    sources = [HERE / "chain_host.cpp", emulator_object(), plan_object()]
    chosen = build_flags.instance_define(instance)
    return ctypes.CDLL(str(compile_cached(sources, [*flags, "-shared", chosen], csrc, ".so")))


_INTS = (
    "images height width channels steps stride dilation adds "
    "x_pixel x_slot out_pixel out_slot fill_channels first_group passed_group pool add_passed weights_stand"
).split()
_TILE = ("instance type rows columns tile_images whole warps_m warps_n slices stages row_parts channel_parts warps_k").split()


class Call(ctypes.Structure):  # as in chain_host.cpp
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")]
        + [(name, ctypes.c_int) for name in _INTS]
        + [("lower", ctypes.c_float), ("upper", ctypes.c_float)]
        + [(name, ctypes.c_int) for name in _TILE]
        + [("seed", ctypes.c_uint64), ("checks", ctypes.c_int)]
    )


@dataclass(frozen=True)
class Case:
    """One call and how it is cut. width: channels of a group; height, columns: of x. tile: fields of `Tile`.

    clusters: whether the plan may choose the cluster kernel.
    wgmma: whether the plan may choose the wgmma kernel.
    pad: channels by which every slot of x and out is wider than the group. fill: whether those of out are written as zeros.
    """

    width: int
    scale: int = 4
    images: int = 1
    height: int = 7
    columns: int = 7
    dtype: torch.dtype = torch.bfloat16
    settings: dict[str, object] = field(default_factory=dict)
    pad: int = 0
    fill: bool = False
    clusters: bool = False
    wgmma: bool = False
    tile: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> ChainConfig:
        return ChainConfig(**self.settings)

    @property
    def steps(self) -> int:
        return self.scale - (self.config.passthrough != "none")

    def __str__(self) -> str:
        words = [f"w{self.width}s{self.scale}", f"{self.images}x{self.height}x{self.columns}", str(self.dtype)[6:]]
        words += (
            [f"{k}={v}" for k, v in (self.settings | self.tile).items()]
            + [f"pad{self.pad}"] * bool(self.pad)
            + ["filled"] * self.fill
            + ["clusters"] * self.clusters
            + ["wgmma"] * self.wgmma
        )
        return "-".join(words)


@dataclass
class Run:
    out: Tensor  # (N, H', W', s*w)
    padding_right: bool  # padding channels of out kept what was in them, or are zero if they were to be filled
    findings: dict[str, tuple[int, str]]  # kind -> (count, first finding)
    bank_ways: int
    multiplies: int
    switches: int
    ctas: int
    shared_bytes: int


def plan_of(case: Case, device: tuple[int, ...] = launch_plan.LIMITS["sm_90"]) -> launch_plan.Plan:
    """The plan that the shipped chooser makes for this call on such a device, among the kernels that the case asks for."""
    device = DeviceLimits(*device)
    device = device._replace(wgmma=device.wgmma * case.wgmma)
    numbers, text = (ctypes.c_int64 * len(launch_plan.Plan._fields))(), ctypes.create_string_buffer(400)
    limits = (ctypes.c_int64 * len(device))(*device)
    if plan_library().plan_call(_problem_numbers(case), limits, case.clusters, numbers, text, len(text)):
        raise ValueError(text.value.decode())
    return launch_plan.Plan(*numbers)


def shared_bytes(case: Case, plan: launch_plan.Plan) -> int:
    """Bytes of shared memory that the launch takes; the plan's own figure is out of date where fields of it were replaced."""
    return plan_library().shared_bytes(_problem_numbers(case), (ctypes.c_int64 * 12)(*plan[:12]))


def _problem_numbers(case: Case) -> ctypes.Array:
    c = case.config
    request = launch_plan.PlanRequest(
        case.images, case.height, case.columns, case.width, case.steps, c.stride, c.dilation, c.hierarchical,
        c.passthrough != "none", launch_plan.TYPES[case.dtype], case.width + case.pad,
    )  # fmt: skip
    return (ctypes.c_int64 * len(request))(*request)


def make_tensors(case: Case, integers: bool, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x (N, H, W, s*w), weights and biases, all representable in the case's dtype. With small integers and sparse weights
    every sum is exact in fp32, in any order, so the result is known to the bit."""
    rng = np.random.default_rng(seed)
    w, steps = case.width, case.steps
    shape = (case.images, case.height, case.columns, case.scale * w)
    if integers:
        x = rng.integers(-3, 4, shape).astype(float)
        weight = rng.choice([-1.0, 0, 1], (steps, w, w, 3, 3), p=[0.5 / w, 1 - 1.2 / w, 0.7 / w])
        bias = rng.integers(-4, 5, (steps, w)).astype(float)
    else:
        x = rng.standard_normal(shape)
        weight = rng.standard_normal((steps, w, w, 3, 3)) / (3 * w**0.5)
        bias = rng.standard_normal((steps, w))
    x, weight, bias = (torch.from_numpy(values).to(case.dtype) for values in (x, weight, bias))
    return x, list(weight), list(bias)


def expected_of(case: Case, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """float64, rounded where the kernel rounds: each y and each u = x + y to the dtype, and float32 factors to TF32."""
    c = case.config

    def rounded(t: Tensor) -> Tensor:
        return t.to(case.dtype).double()

    def convolution(k: int, u: Tensor) -> Tensor:
        u, weight, bias = rounded(u), weights[k].double(), biases[k].double()
        if case.dtype == torch.float32:
            u, weight = round_to_tf32(u), round_to_tf32(weight)
        y = torch.nn.functional.conv2d(u, weight, bias, c.stride, c.dilation, c.dilation)
        return rounded(reference.activate(y, c.activation))

    groups = list(x.double().permute(0, 3, 1, 2).split(case.width, 1))
    if c.passthrough == "first_added":  # what is added is what passes, rounded
        groups[0], c = rounded(reference.pool_passthrough(groups[0], c)), replace(c, pool=None)
    return torch.cat([rounded(y) for y in reference.hierarchical_chain(groups, convolution, c)], 1).permute(0, 2, 3, 1)


def round_to_tf32(values: Tensor) -> Tensor:
    """float64 to the nearest number of 11 significant bits, away from zero at equal distance."""
    mantissa, exponent = torch.frexp(values)
    rounded = torch.ldexp(torch.copysign((mantissa.abs() * 2**11 + 0.5).floor(), values), exponent - 11)
    return torch.where(values.isfinite(), rounded, values)


def launch(
    case: Case,
    plan: launch_plan.Plan,
    x: cuda_chain.Slots,
    out: cuda_chain.Slots,
    packed: list[Tensor],
    fill: int,
    passed: int | None,
    seed: int,
    csrc: pathlib.Path = ROOT / "csrc",
    flags: tuple[str, ...] = KERNEL_FLAGS,
) -> tuple[dict[str, tuple[int, str]], list[int]]:
    """Runs the kernel once, as `cuda_chain.launch_chain` would; what the emulator found, and its statistics as in `Run`.

    passed: the group that the launch copies or pools, or None. Begins while the kernel before it ends; at an odd seed that one
    writes no weights.
    """
    c, instance = case.config, INSTANCES[plan.instance]
    call = Call(
        x.data.data_ptr(), packed[0].data_ptr(), packed[1].data_ptr(), out.data.data_ptr(),
        case.images, case.height, case.columns, case.width, case.steps, c.stride, c.dilation, c.hierarchical,
        x.pixel, x.slot, out.pixel, out.slot, fill, c.first_convolved, -1 if passed is None else passed,
        cuda_chain.POOLS[c.pool], c.passthrough == "first_added", seed % 2, *cuda_chain.CLAMPS[c.activation],
        plan.instance, launch_plan.TYPES[case.dtype],
        plan.rows, plan.columns, plan.images, plan.whole, plan.warps_m, plan.warps_n, plan.slices, plan.stages,
        plan.row_parts, plan.channel_parts, plan.warps_k, seed, 1,
    )  # fmt: skip
    text, statistics = ctypes.create_string_buffer(1 << 14), (ctypes.c_int64 * 5)()
    failed = library(instance, csrc, flags).run_call(ctypes.byref(call), text, len(text), statistics)
    assert failed == 0, f"{instance} is not in this build" if failed == -1 else f"{plan} does not fit together"
    rows = [line.split("|", 2) for line in text.value.decode().splitlines()]
    return {kind: (int(count), first) for kind, count, first in rows}, list(statistics)


def emulate(
    case: Case,
    integers: bool = True,
    seed: int = 0,
    tensors: tuple[Tensor, list[Tensor], list[Tensor]] | None = None,
    **build: object,
) -> Run:
    """Runs the kernel once. seed: of the order in which threads run. build: csrc and flags of `launch`."""
    x, weights, biases = tensors or make_tensors(case, integers, 1)
    c, pitch = case.config, case.width + case.pad
    # Padding of x is NaN: whoever reads it spoils the result. The output is NaN: an element that nobody writes shows.
    padding = 0.0 if case.fill else torch.nan
    padded = torch.full((*x.shape[:3], case.scale, pitch), padding, dtype=case.dtype)
    padded[..., : case.width] = x.unflatten(3, (case.scale, case.width))
    shape = case.images, c.output_size(case.height), c.output_size(case.columns), case.scale, pitch
    out = torch.full(shape, torch.nan, dtype=case.dtype)
    slots = [cuda_chain.Slots(t, case.scale * pitch, pitch) for t in (padded, out)]
    fill = pitch if case.fill else case.width
    plan = plan_of(case)._replace(**case.tile)
    findings, statistics = launch(
        case, plan, *slots, cuda_packing.pack(weights, biases, c), fill, c.passed_group(case.scale), seed, **build
    )
    rest = out[..., case.width :]
    padding_right = bool((rest == 0).all() if case.fill else rest.isnan().all())
    return Run(out[..., : case.width].flatten(3), padding_right, findings, *statistics)


def check(case: Case, integers: bool = True, seed: int = 0, outputs: set[bytes] | None = None, **options) -> dict[str, str]:
    """What is wrong with one run: kind -> what was found. Empty where the kernel is right.

    Kinds are the emulator's, and "wrong" (other numbers than float64 gives), "conflicts" (of banks), "padding" (written).
    outputs: the bits of the result are added to it.
    """
    tensors = make_tensors(case, integers, 1)
    run = emulate(case, integers, seed, **options)
    if outputs is not None:
        outputs.add(run.out.contiguous().view(torch.int16).numpy().tobytes())
    red = {kind: first for kind, (_, first) in run.findings.items()}
    expected = expected_of(case, *tensors)
    error = float((run.out.double() - expected).norm() / expected.norm())
    if not error <= (0 if integers else tolerance(case)):
        red["wrong"] = f"relative error {error:.2g}"
    if run.bank_ways > (2 if case.config.stride > 1 else 1):
        red["conflicts"] = f"{run.bank_ways} ways"
    if not run.padding_right:
        red["padding"] = "channels between the groups are " + ("not zero" if case.fill else "written")
    return red


def assert_same_bits_in_every_order(case: Case) -> None:
    """Whatever the order in which the threads take turns."""
    outputs = [emulate(case, integers=False, seed=seed) for seed in range(6)]
    assert [run.findings for run in outputs] == [{}] * 6
    assert all(torch.equal(run.out, outputs[0].out) for run in outputs)


def assert_spreads_as_torch_does(case: Case, value: float) -> None:
    """One NaN or Inf in the middle of x reaches the outputs that it reaches in float64."""
    x, weights, biases = make_tensors(case, False, 2)
    x[0, case.height // 2, case.columns // 2, 1] = value
    out = emulate(case, tensors=(x, weights, biases)).out
    expected = expected_of(case, x, weights, biases)
    assert expected.isnan().any() or value == float("inf")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


# Three convolutions: fp32 sums that round to the neighbouring half, then spread by the chain.
TOLERANCES = {torch.bfloat16: 1.5e-3, torch.float16: 2e-4, torch.float32: 1e-4}


def tolerance(case: Case) -> float:
    """The largest relative error for random numbers. It grows with the chain: PyTorch's fp32 sums, rounded in the same places,
    are off by 0.2e-4 in fp16 behind the first convolution of 14w8s, by 3.4e-4 behind the seventh, and by 2.1e-4 in all."""
    return TOLERANCES[case.dtype] * max(1, case.steps / 3)


__all__ = [
    "Case",
    "Run",
    "assert_same_bits_in_every_order",
    "assert_spreads_as_torch_does",
    "check",
    "emulate",
    "expected_of",
    "launch",
    "make_tensors",
    "plan_of",
    "replace",
    "shared_bytes",
    "INSTANCES",
    "tolerance",
]
