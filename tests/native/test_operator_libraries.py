"""The operators' schemas and native bodies in every order of loading, each in a process of its own."""

import shutil
import subprocess
import sys

import pytest
import torch
from tree import ROOT

from res2net_fused._native import build_flags, library
from res2net_fused.backends import policy

PACKAGE = ROOT / "res2net_fused"
needs_cpu_library = pytest.mark.skipif(not library.cpu_library().loaded, reason="needs the CPU library")

CALL = """
import torch
torch.manual_seed(0)
x = torch.randn(2, 32, 9, 7).to(memory_format=torch.channels_last)
weights, biases = [torch.randn(8, 8, 3, 3) * 0.1 for _ in range(3)], [torch.randn(8) for _ in range(3)]
tensors = x, weights, biases
def call(x, weights, biases, backend="auto", pool=None, stride=1):
    chain = stride, 1, 1, pool is None, "last", pool, "leaky_relu:0.1"
    return torch.ops.res2net_fused.hierarchical_conv2d.default(x, weights, biases, None, "plain", *chain, backend)
def plain(x, weights, biases, pool=None, stride=1):
    groups, y, outputs = x.split(8, 1), None, []
    for group, weight, bias in zip(groups, weights, biases):
        u = group if y is None or pool else group + y
        y = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(u, weight, bias, stride, 1), 0.1)
        outputs.append(y)
    last = torch.nn.functional.avg_pool2d(groups[3], 3, stride, 1) if pool else groups[3]
    return torch.cat([*outputs, last], 1)
def matches(dtype=torch.float32, pool=None, stride=1, backend="auto"):
    own = [x.to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]]
    out = call(*own, backend, pool, stride)
    exact = plain(x.double(), [w.double() for w in weights], [b.double() for b in biases], pool, stride)
    error = (out.double() - exact).abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 1e-4), error
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
"""
BOTH_WAYS = (
    "matches(); matches(torch.float64); matches(pool='avg3', stride=2); matches(pool='avg3', stride=2, backend='reference')\n"
)

ROWS = """
import itertools
def rows(x, weights, biases, scale, shift, first, mode, dilation=2, activation=torch.relu):
    outputs, kept, y = [x[:, :5]] if first else [], [], x[:, :5] if first == "first_added" else None
    for k, (weight, bias) in enumerate(zip(weights, biases)):
        group = x[:, 5 * (k + bool(first)):][:, :5]
        u = torch.nn.functional.pad(group if y is None else group + y, (dilation, dilation), mode)
        z = torch.nn.functional.conv1d(u, weight, bias, dilation=dilation)
        r = activation(z)
        y = r if scale is None else r * scale[k][:, None] + shift[k][:, None]
        outputs.append(y), kept.append(z if activation is torch.nn.functional.silu else r)
    return torch.cat(outputs + ([] if first else [x[:, 15:]]), 1), *kept
activations = {"relu": torch.relu, "silu": torch.nn.functional.silu, "relu6": torch.nn.functional.relu6}
for dtype, backend, length, first, mode, affine, keep, activation in itertools.product(
    (torch.float32, torch.float64, torch.bfloat16), ("auto", "reference"), (7, 700), ("", "first", "first_added"),
    ("constant", "reflect"), (True, False), (True, False), activations,
):
    x = (torch.randn(2, length, 20).transpose(1, 2) if length == 7 else torch.randn(2, 20, length)).to(dtype)
    vectors = ([torch.randn(5).to(dtype) for _ in range(3)] for _ in range(3))
    lists = [[torch.randn(5, 5, 3).to(dtype) / 3 for _ in range(3)], *vectors]
    if not affine:
        lists[2:] = None, None
    padding = "zeros" if mode == "constant" else mode
    given = x, *lists, None, 2, first or "last", padding, keep, backend, activation
    found = torch.ops.res2net_fused.hierarchical_conv1d.default(*given)
    wide = ([t.double() for t in values] if values else None for values in lists)
    exact = rows(x.double(), *wide, first, mode, 2, activations[activation])
    assert len(found) == 1 + 3 * keep
    for a, b in zip(found, exact):
        error = (a.double() - b).norm() / b.norm()
        assert a.dtype == dtype and a.is_contiguous() and error < {4: 1e-5, 8: 1e-13, 2: 2e-2}[x.itemsize], (error, given[6:])
few = lists[1][:2]
for wrong in dict(dilation=7), dict(packed=[torch.ones(3)]), dict(x=x[:, :19]), dict(biases=few), dict(mode="circular"):
    change = dict(x=x, biases=lists[1], packed=None, dilation=2, mode="reflect") | wrong
    chain = change["dilation"], "last", change["mode"], False, "auto"
    call = lambda: torch.ops.res2net_fused.hierarchical_conv1d.default(
        change["x"][:, :, :7].float(), [w.float() for w in lists[0]], change["biases"], None, None, change["packed"], *chain)
    if "packed" in wrong:
        call()  # is packed anew, as where an older version packed it
        continue
    try:
        call()
    except RuntimeError:
        pass
    else:
        raise AssertionError(wrong)
"""


def run(script, folder=ROOT, **environment):
    env = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run([sys.executable, "-c", script], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loads(name):
    path = PACKAGE / {"cpu": build_flags.CPU_LIBRARY, "cuda": build_flags.CUDA_LIBRARY}[name]
    return f"torch.ops.load_library({str(path)!r})\n"


@needs_cpu_library
def test_without_python_a_call_is_right_or_refused():
    script = (
        CALL
        + loads("cpu")
        + BOTH_WAYS
        + """
for wrong, said in (dict(backend="triton"), "without Python"), (dict(backend="cpu", x=x.double()), "float64"):
    try:
        call(**{"x": x, "weights": weights, "biases": biases} | wrong)
    except RuntimeError as error:
        assert said in str(error), error
    else:
        raise AssertionError(wrong)
import sys
assert "res2net_fused" not in sys.modules
"""
    )
    run(script)


@needs_cpu_library
def test_rows_without_python():
    run("import torch\n" + loads("cpu") + ROWS)


def test_the_threshold_of_rows_is_the_same_in_both_languages():
    source = (ROOT / "csrc/cpu/ops/rows_ops.cpp").read_text()
    assert f"kRowsForProducts = {policy.ROWS_FOR_PRODUCTS};" in source


@needs_cpu_library
@pytest.mark.parametrize("order", ["library first", "package first"])
def test_either_order_defines_each_operator_once(order):
    first, second = [loads("cpu"), "import res2net_fused\n"][:: 1 if order == "library first" else -1]
    script = (
        CALL
        + first
        + BOTH_WAYS * (order == "library first")
        + second
        + "assert torch.ops.res2net_fused_native.known_decisions(False) == 0\n"  # none that was made without Python
        + BOTH_WAYS
        + """
assert torch.Tag.needs_exact_strides in torch.ops.res2net_fused.bottle2neck.default.tags
try:
    call(x, weights[:2], biases)
except ValueError as error:
    assert "biases holds 3 tensors" in str(error)
else:
    raise AssertionError("Python was not asked")
"""
    )
    run(script)


@needs_cpu_library
@pytest.mark.parametrize("order", ["cpu, cuda", "cuda, cpu"])
def test_both_libraries_share_the_operators(order):
    record = library.NativeLibraries(PACKAGE).record()["parts"].get("cuda", {})
    if not record.get("built") or torch.version.cuda is None:
        pytest.skip("needs the CUDA library and a CUDA build of torch")
    run(CALL + "".join(map(loads, order.split(", "))) + BOTH_WAYS)


def test_without_libraries_python_defines_the_operators(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "res2net_fused", ignore=shutil.ignore_patterns("lib", "__pycache__", "*.so"))
    names = "bottle2neck", "hierarchical_conv1d"
    script = "import res2net_fused\n" + BOTH_WAYS.replace("matches(torch.float64); ", "")
    script += f"print(*[getattr(torch.ops.res2net_fused, name).default._schema for name in {names}], sep='\\n')"
    schemas = [str(getattr(torch.ops.res2net_fused, name).default._schema) for name in names]
    assert run(CALL + script, tmp_path).splitlines() == schemas
