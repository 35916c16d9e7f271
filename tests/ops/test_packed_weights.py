"""`pack_weights`: the same results as plain weights, a pytree, and misuse that raises."""

import copy
import io

import pytest
import torch
from helpers import CHAINS, DEVICES, NAMED_BACKENDS, Chain, assert_close, chains, runnable_backends, why_not
from torch.utils import _pytree

from res2net_fused import PackedWeights, hierarchical_conv2d, pack_weights

devices = pytest.mark.parametrize("device", DEVICES)
GEOMETRY = ("stride", "dilation", "groups")


def split(settings):
    """(what pack_weights takes, what stays with the call)."""
    return {k: v for k, v in settings.items() if k in GEOMETRY}, {k: v for k, v in settings.items() if k not in GEOMETRY}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@devices
@chains
def test_same_result_as_plain_weights(chain, device, bias):
    geometry, settings = split(chain.settings)
    x, weights, biases = chain.tensors((2, 7, 9), torch.float32, device, bias=bias)
    for backend in runnable_backends(device):
        pack = pack_weights(weights, biases, **geometry, backend=backend)
        expected = hierarchical_conv2d(x, weights, biases, backend=backend, **chain.settings)
        out = hierarchical_conv2d(x, pack, backend=backend, **settings)
        assert torch.equal(hierarchical_conv2d(x, pack, backend=backend, **chain.settings), out)
        if backend == "cpu":  # packs plain weights for another arithmetic where that is faster for one call
            assert_close(out, expected.double())
        else:
            assert torch.equal(out, expected)


@devices
def test_a_pack_for_one_backend_runs_on_every_other(device):
    x, weights, biases = CHAINS["last"].tensors(dtype=torch.float32, device=device)
    names = runnable_backends(device)
    for packed_for in names:
        pack = pack_weights(weights, biases, backend=packed_for)
        for name in names:
            expected = hierarchical_conv2d(x, weights, biases, backend=name)
            assert torch.equal(hierarchical_conv2d(x, pack, backend=name), expected)


@pytest.mark.parametrize("backend", NAMED_BACKENDS)
def test_packing_for_a_backend_that_cannot_run_says_why(backend):
    chain = CHAINS["last"]
    x, weights, _ = chain.tensors(dtype=torch.float32)
    reason = why_not(backend, chain, x)
    if reason is None:
        assert pack_weights(weights, backend=backend).layout == backend
        return
    with pytest.raises(RuntimeError) as caught:
        pack_weights(weights, backend=backend)
    assert reason in str(caught.value)


def test_what_a_pack_holds():
    _, weights, biases = Chain({"groups": 2}).tensors(dtype=torch.float32)
    weights[0].requires_grad_()
    pack = pack_weights(weights, biases, stride=1, dilation=3, groups=2)
    assert (pack.stride, pack.dilation, pack.groups) == (1, 3, 2)
    assert pack.layout in runnable_backends("cpu")
    assert all(torch.equal(a, b) for a, b in zip(pack.weights, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(pack.biases, biases, strict=True))
    tensors = [*pack.weights, *pack.biases, *pack.packed]
    assert not any(t.requires_grad for t in tensors)
    assert weights[0].requires_grad


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_pytree_round_trip(bias):
    x, weights, biases = CHAINS["dilated"].tensors(dtype=torch.float32, bias=bias)
    pack = pack_weights(weights, biases, dilation=2)
    leaves, spec = _pytree.tree_flatten(pack)
    tensors = [leaf for leaf in leaves if leaf is not None]
    assert len(tensors) == len(weights) * (1 + bias) + len(pack.packed)
    assert all(isinstance(leaf, torch.Tensor) for leaf in tensors)
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, PackedWeights)
    assert (again.layout, again.stride, again.dilation, again.groups) == (pack.layout, 1, 2, 1)
    assert torch.equal(hierarchical_conv2d(x, again), hierarchical_conv2d(x, pack))
    restored = _pytree.treespec_loads(_pytree.treespec_dumps(spec))
    assert restored == spec
    moved = _pytree.tree_map(lambda t: None if t is None else t.double(), pack)
    assert moved.weights[0].dtype == torch.float64


def test_deepcopy_and_save():
    x, weights, biases = CHAINS["last"].tensors(dtype=torch.float32)
    pack = pack_weights(weights, biases)
    expected = hierarchical_conv2d(x, pack)
    assert torch.equal(hierarchical_conv2d(x, copy.deepcopy(pack)), expected)
    file = io.BytesIO()
    torch.save(pack, file)
    file.seek(0)
    assert torch.equal(hierarchical_conv2d(x, torch.load(file, weights_only=False)), expected)


MISUSE = {
    "biases": (lambda pack, b: dict(biases=b), ["biases", "pack_weights"]),
    "stride": (lambda pack, b: dict(stride=2), ["stride is 2", "stride=1"]),
    "dilation": (lambda pack, b: dict(dilation=3), ["dilation is 3", "dilation=2"]),
    "groups": (lambda pack, b: dict(groups=4), ["groups is 4", "groups=2"]),
}


@pytest.mark.parametrize(("given", "said"), MISUSE.values(), ids=MISUSE.keys())
def test_differing_values_beside_a_pack_raise(given, said):
    x, weights, biases = CHAINS["groups"].tensors(dtype=torch.float32)
    pack = pack_weights(weights, biases, dilation=2, groups=2)
    with pytest.raises(ValueError) as caught:
        hierarchical_conv2d(x, pack, **given(pack, biases))
    assert all(words in str(caught.value) for words in said)


def test_a_pack_is_for_inference():
    x, weights, biases = CHAINS["last"].tensors(dtype=torch.float32)
    pack = pack_weights(weights, biases)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="inference only.*requires grad"):
        hierarchical_conv2d(x, pack)
    with torch.no_grad():
        assert torch.equal(hierarchical_conv2d(x, pack), hierarchical_conv2d(x, weights, biases))


BAD = {
    "empty": (dict(weights=[]), ValueError, "weights is empty"),
    "tensor": (dict(weights=torch.randn(4, 4, 3, 3)), TypeError, "weights is a"),
    "kernel": (dict(weights=[torch.randn(4, 4, 5, 5)]), ValueError, r"weights\[0\] is \(4, 4, 5, 5\)"),
    "groups": (dict(groups=2), ValueError, "groups=2"),
    "stride": (dict(stride=0), ValueError, "stride is 0"),
    "dilation": (dict(dilation=2.0), TypeError, "dilation is 2.0"),
    "backend": (dict(backend="onednn"), ValueError, "backend='onednn'"),
    "integer": (dict(weights=[torch.ones(4, 4, 3, 3, dtype=torch.int8)]), TypeError, "torch.int8"),
    "biases": (dict(biases=[torch.randn(4)]), ValueError, "biases holds 1"),
    "bias_shape": (dict(biases=[torch.randn(5)] * 3), ValueError, r"biases\[0\] is \(5,\)"),
}


@pytest.mark.parametrize(("given", "error", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input(given, error, said):
    with pytest.raises(error, match=said):
        pack_weights(**({"weights": CHAINS["last"].tensors(dtype=torch.float32)[1]} | given))


def test_x_of_another_dtype_than_the_pack():
    x, weights, _ = CHAINS["last"].tensors(dtype=torch.float32)
    with pytest.raises(TypeError, match="x is torch.float64 but weights"):
        hierarchical_conv2d(x.double(), pack_weights(weights))
