"""The native bodies of the operators on a stand-in card whose CUDA kernels compute, in the emulator."""

import copy
import os
import subprocess
import sys

import card
import pytest
import torch
from chain1d_cases import arguments
from helpers import assert_close, randomize
from on_card import capture
from tree import ROOT

from res2net_fused import Bottle2neck, freeze, hierarchical_conv1d, hierarchical_conv2d, pack_weights
from res2net_fused._native import library
from res2net_fused.backends import choices, selection, verification
from res2net_fused.backends.cuda import BACKEND
from res2net_fused.backends.triton import chain as triton_chain
from res2net_fused.chain import reference
from res2net_fused.chain.config import Chain1dConfig, ChainConfig
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

INTERPRETED = card.Settings.of(os.environ["STAND_IN_CARD"]).launch == "interpreter"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="elsewhere Python writes the results")
HALF, BOUND = torch.float16, 4e-3
library.cuda_library()  # a first call of the process would load it, and be run by Python
LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.fixture(autouse=True)
def nothing_known(as_in_a_new_process):
    choices.forget_native()
    with torch.no_grad():
        yield
    choices.forget_native()


@pytest.fixture
def without_python(monkeypatch):
    """Makes every later call of the backend fail that Python would run."""

    def forbid():
        for name in ("forward", "block_forward"):
            monkeypatch.setattr(BACKEND, name, None, raising=False)

    return forbid


def decisions():
    return torch.ops.res2net_fused_native.known_decisions(False)


def images(channels=24, size=(3, 4), dtype=HALF, room=0, offset=0):
    """x (1, channels, *size) in channels-last. room: channels between pixels. offset: elements behind an aligned address."""
    pitch = channels + room
    values = torch.randn(size[0] * size[1] * pitch + offset).to("cuda", dtype)[offset:]
    return values.view(1, *size, pitch).permute(0, 3, 1, 2)[:, :channels]


def weights(dtype=HALF, width=8):
    return [(torch.randn(width, width, 3, 3) / 9).to("cuda", dtype) for _ in range(2)], [
        torch.randn(width).to("cuda") for _ in range(2)
    ]


def exact(x, w, b):
    return reference.hierarchical_conv2d(x.double(), [t.double() for t in w], [t.double() for t in b], ChainConfig()).cpu()


LAYOUTS = {
    "dense": images,
    "between others": lambda: images(room=8),
    "NCHW": lambda: images().contiguous(),
    "misaligned": lambda: images(offset=2),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_compared_launch_is_made_without_python(kind, without_python):
    x, (w, b) = LAYOUTS[kind](), weights()
    packed = pack_weights(w, b, backend="cuda")
    for _ in range(2):
        out = hierarchical_conv2d(x, packed, backend="cuda")
        assert decisions() == 1
        assert_close(out.cpu(), exact(x, w, b), BOUND)
        assert out.is_contiguous(memory_format=FIRST if kind == "NCHW" else LAST)
        without_python()
    with pytest.raises(RuntimeError, match="'NoneType' object is not callable"):  # of another kind
        hierarchical_conv2d(images(offset=4), packed, backend="cuda")


def test_what_is_asked_at_every_call(monkeypatch):
    x, (w, b) = images(), weights()
    packed = pack_weights(w, b, backend="cuda")
    hierarchical_conv2d(x, w, b, backend="cuda")  # not packed
    with verification.suspended():
        hierarchical_conv2d(x, packed, backend="cuda")
    with torch.backends.cudnn.flags(allow_tf32=True):
        single, biases = weights(torch.float32)
        hierarchical_conv2d(x.float(), pack_weights(single, biases, backend="cuda"), backend="cuda")
    assert decisions() == 0


def test_a_kernel_put_aside_is_not_launched_again():
    x, (w, b) = images(), weights()
    packed = pack_weights(w, b, backend="cuda")
    hierarchical_conv2d(x, packed)
    assert decisions() == 1
    problem = next(known[2] for known in verification._known)
    selection.put_aside(BACKEND, problem, "planted")
    assert decisions() == 0
    with pytest.raises(RuntimeError, match="put aside in this process: planted"):
        hierarchical_conv2d(x, packed, backend="cuda")


@pytest.mark.parametrize("kind", ["shortcut", "projection", "beyond"])
def test_blocks(kind, without_python, monkeypatch):
    monkeypatch.setattr(triton_chain, "why_not", lambda problem: "not here")
    options = {}
    if kind == "projection":
        options = {"downsample": torch.nn.Sequential(torch.nn.Conv2d(16, 16, 1, bias=False), torch.nn.BatchNorm2d(16))}
    built = randomize(Bottle2neck(16, 4, baseWidth=40, scale=3, backend="cuda", **options)).eval()  # groups of 2
    twin = ReferenceBottle2neck(16, 4, baseWidth=40, scale=3, **copy.deepcopy(options)).eval()
    twin.load_state_dict(built.state_dict())
    twin.double()
    block, x = built.to("cuda", HALF), images(16)
    if kind != "beyond":
        block = freeze(block)
    if kind == "beyond":
        x[0, 0, 0, 0] = torch.inf
    for _ in range(2):
        out = block(x)
        expected = twin(x.cpu().double())
        assert torch.equal(out.cpu().isfinite(), expected.isfinite())
        finite = expected.isfinite()
        assert_close(out.cpu()[finite], expected[finite], BOUND)
        assert out.is_contiguous(memory_format=LAST)
        without_python()
    assert decisions() == 1


def test_captures():
    """A decision made before holds in a capture; without one Python's body finds PyTorch's operators."""
    x, (w, b) = images(), weights()
    packed = pack_weights(w, b, backend="cuda")
    capture(lambda: hierarchical_conv2d(x, packed))
    assert decisions() == 0
    assert_close(hierarchical_conv2d(x, packed).cpu(), exact(x, w, b), BOUND)
    assert decisions() == 1
    graph, _ = capture(lambda: hierarchical_conv2d(x, packed))
    assert decisions() == 1 and graph is not None


def test_rows():
    settings, tensors = arguments("speechbrain", dtype=torch.float32)
    moved = [t.to("cuda") if isinstance(t, torch.Tensor) else [v.to("cuda") for v in t] for t in tensors]
    expected = reference.hierarchical_conv1d(*tensors, Chain1dConfig(**settings))
    assert_close(hierarchical_conv1d(*moved, **settings).cpu(), expected)
    assert decisions() == 0


ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.manual_seed(0)
own, F = torch.ops.res2net_fused, torch.nn.functional
def cuda(*tensors): return [t.to("cuda") for t in tensors]
x, w, b = torch.randn(2, 12, 5, 6).cuda(), cuda(*torch.randn(2, 4, 4, 3, 3)), cuda(*torch.randn(2, 4))
chain = 1, 1, 1, True, "last", None
y = F.leaky_relu(F.conv2d(x[:, :4], w[0], b[0], 1, 1), 0.1)
expected = torch.cat([y, F.leaky_relu(F.conv2d(x[:, 4:8] + y, w[1], b[1], 1, 1), 0.1), x[:, 8:]], 1)
def found(backend, packed=None):
    return own.hierarchical_conv2d(x, w, b, packed, "cuda", *chain, "leaky_relu:0.1", backend)
torch.testing.assert_close(found("auto", cuda(*torch.randn(2, 3))), expected)
try:
    found("cuda")
except RuntimeError as error:
    assert "compared with float64 before their first use, by Python" in str(error), error
else:
    raise AssertionError("an unknown kernel was launched")
c1, b1, c3, b3 = cuda(torch.randn(12, 8, 1, 1), torch.randn(12), torch.randn(8, 12, 1, 1), torch.randn(8))
v = torch.randn(2, 8, 5, 6).cuda()
u = F.conv2d(v, c1, b1).relu()
y = F.conv2d(u[:, :4], w[0], b[0], 1, 1).relu()
u = torch.cat([y, F.conv2d(u[:, 4:8] + y, w[1], b[1], 1, 1).relu(), u[:, 8:]], 1)
block = own.bottle2neck(v, v, c1, b1, w, b, c3, b3, None, None, 1, None, "plain", True, *chain, "relu", "auto")
torch.testing.assert_close(block, (F.conv2d(u, c3, b3) + v).relu())
rows, taps = torch.randn(2, 8, 7).cuda(), cuda(torch.randn(4, 4, 3))
r = F.conv1d(F.pad(rows[:, :4], (2, 2), "reflect"), taps[0], b[0], dilation=2).relu()
out, kept = own.hierarchical_conv1d(rows, taps, b[:1], b[:1], b[1:], None, 2, "last", "reflect", True, "auto")
torch.testing.assert_close(kept, r)
torch.testing.assert_close(out, torch.cat([r * b[0][:, None] + b[1][:, None], rows[:, 4:]], 1))
assert "res2net_fused" not in sys.modules
"""


def test_without_python_pytorchs_operators_run():
    command = [sys.executable, "-c", ALONE, library.cuda_library().path.resolve()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
