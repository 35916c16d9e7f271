"""Kernels are compared with float64 before their numbers are used: on a stand-in card, whose results can be made wrong."""

import functools
import math

import pytest
import torch
from helpers import randomize, relative_error
from on_card import capture

from res2net_fused import Bottle2neck, accelerate, explain, hierarchical_conv2d
from res2net_fused.backends import verification
from res2net_fused.backends.selection import get_backend
from res2net_fused.chain.tolerances import FORWARD
from res2net_fused.ops.hierarchical_conv_bn import hierarchical_conv_bn

WIDTH, SCALE = 16, 4


@pytest.fixture(autouse=True)
def trials(monkeypatch, as_in_a_new_process):
    """The backends that were tried, in a process that has tried none before."""
    found, own = [], verification._trial

    def counted(backend, *arguments):
        found.append(backend.name)
        return own(backend, *arguments)

    monkeypatch.setattr(verification, "_trial", counted)
    return found


def images(batch=4, size=8, dtype=torch.float16, channels=WIDTH * SCALE, offset=0):
    """x (N, channels, size, size) in channels-last, `offset` elements behind an aligned address."""
    values = torch.randn(batch * channels * size * size + offset).to("cuda", dtype)[offset:]
    return values.view(batch, size, size, channels).permute(0, 3, 1, 2)


def weights(dtype=torch.float16):
    return [(torch.randn(WIDTH, WIDTH, 3, 3) / 12).to("cuda", dtype) for _ in range(SCALE - 1)]


def chain(x, w, **settings):
    with torch.no_grad():
        return hierarchical_conv2d(x, w, **settings)


def trained(x, w, backend="triton"):
    vectors = [torch.ones(WIDTH, device="cuda") for _ in w]
    x, w = x.detach().requires_grad_(), [t.detach().requires_grad_() for t in w]
    found = hierarchical_conv_bn(x, w, vectors, vectors, [1e-5] * len(w), backend=backend)
    found.out.float().sum().backward()
    return found.out.detach(), x.grad


def folded(x, w, backend="triton"):
    x = x.detach().requires_grad_()
    out = hierarchical_conv2d(x, w, backend=backend)
    out.float().sum().backward()
    return out.detach(), x.grad


def block():
    return accelerate(randomize(Bottle2neck(64, 16, baseWidth=64, scale=4)).half().eval().to("cuda"))


def spoil(monkeypatch, name, call, how):
    backend = get_backend(name)
    own = getattr(backend, call)

    @functools.wraps(own)
    def spoiled(*arguments, **options):
        found = own(*arguments, **options)
        how(found if isinstance(found, torch.Tensor) else found[0])
        return found

    monkeypatch.setattr(backend, call, spoiled)


def one_element(out):
    out[-1, -1, -1, -1] += 3 * out.float().abs().max().to(out.dtype)


WRONG = {"scaled": lambda out: out.mul_(1.1), "unwritten": lambda out: out[0, :1].fill_(math.nan), "element": one_element}


def test_a_kernel_is_tried_once_for_a_kind_of_call(trials):
    w = weights()
    for x in (images(), images(), images(batch=7)):  # of sizes between the same powers of two
        chain(x, w, backend="triton")
    assert trials == ["triton"]
    chain(images(offset=1), w, backend="triton")  # loads of another width
    chain(images(dtype=torch.bfloat16), weights(torch.bfloat16), backend="triton")
    chain(images(batch=32), w, backend="triton")
    chain(images().contiguous(), w, backend="triton")
    assert trials == ["triton"] * 5
    x, state = images(size=12), torch.get_rng_state()
    chain(x, w, backend="triton")
    assert len(trials) == 6 and torch.equal(torch.get_rng_state(), state), "random numbers are the caller's"


@pytest.mark.parametrize("how", WRONG)
def test_wrong_numbers_reach_nobody(how, monkeypatch, trials, caplog):
    w, x = weights(), images()
    right = chain(x.double(), [t.double() for t in w])
    spoil(monkeypatch, "cuda", "forward", WRONG[how])
    spoil(monkeypatch, "triton", "forward", WRONG[how])
    for _ in range(2):
        assert relative_error(chain(x, w), right) < FORWARD["float16"].limit
    assert trials == ["cuda", "triton"]
    assert "put aside" in caplog.text and "differs from float64" in caplog.text
    with pytest.raises(RuntimeError, match=r"triton.*cannot run.*put aside in this process: its result 0 differs"):
        chain(x, w, backend="triton")
    chain(images(dtype=torch.bfloat16), weights(torch.bfloat16), backend="reference")


def test_explain_says_what_was_put_aside(monkeypatch):
    b = block()
    x = images()
    spoil(monkeypatch, "cuda", "block_forward", WRONG["scaled"])
    with torch.no_grad():
        b(x)
    report = explain(b)[0]
    assert report.backend == "triton" and "cuda: put aside in this process: its result 0 differs" in report.reason


CALLS = {
    "forward": lambda x, w: chain(x, w, backend="triton"),
    "block_forward": lambda x, w: block_by_triton(x),
    "train_forward": trained,
    "train_backward": trained,
    "chain_backward": folded,
}


def block_by_triton(x):
    b = accelerate(block(), "triton")
    with torch.no_grad():
        return b(x)


@pytest.mark.parametrize("call", CALLS)
def test_every_kind_of_call_is_tried(call, monkeypatch, trials):
    x, w = images(), weights()
    CALLS[call](x, w)
    tried = len(trials)
    assert tried == (2 if call in ("train_forward", "train_backward", "chain_backward") else 1)
    CALLS[call](x, w)
    assert len(trials) == tried
    monkeypatch.setattr(verification, "_known", set())
    monkeypatch.setattr(verification, "_agreed", set())
    spoil(monkeypatch, "triton", call, WRONG["scaled"])
    if call == "chain_backward":  # gradients are by PyTorch's operators where nobody else has them
        out, grad = folded(x, w)
        assert torch.equal(grad, folded(x, w, "reference")[1])
        return
    with pytest.raises(RuntimeError, match="put aside in this process"):
        CALLS[call](x, w)


def test_a_kernel_that_raises_is_put_aside(monkeypatch, trials):
    def fails(*arguments):
        raise ValueError("ptxas: no")

    for name in ("cuda", "triton"):
        monkeypatch.setattr(get_backend(name), "forward", fails)
    x, w = images(), weights()
    assert torch.equal(chain(x, w), chain(x, w, backend="reference"))
    with pytest.raises(RuntimeError, match=r"it raises ValueError \(ptxas: no\)"):
        chain(x, w, backend="triton")


def test_no_memory_for_it_is_remembered_by_nobody(monkeypatch, trials):
    def none_left(*arguments):
        trials.append("no memory")
        raise torch.OutOfMemoryError("CUDA out of memory.")

    x, w = images(), weights()
    with monkeypatch.context() as patch:
        patch.setattr(verification, "_trial", none_left)
        assert torch.equal(chain(x, w), chain(x, w, backend="reference"))
    chain(x, w)
    assert trials == ["no memory", "no memory", "cuda"]


def test_a_graph_holds_only_what_was_tried_before(trials, caplog):
    b, x = block(), images()
    with torch.no_grad():
        expected = b(x)  # which also keeps folded weights
        for found in (trials, verification._known, verification._agreed):
            found.clear()
        graph, out = capture(lambda: b(x))
        graph.replay()
        assert trials == [] and "call the model once before the capture" in caplog.text
        assert relative_error(out, expected) < FORWARD["float16"].limit
        b(x)
        assert trials == ["cuda"]
        caplog.clear()
        capture(lambda: b(x))
        assert trials == ["cuda"] and not caplog.text
