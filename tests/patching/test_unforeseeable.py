"""Code whose result hangs on more than settings: what it keeps from call to call, what lies outside, the type and size of x."""

import contextvars
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck

QUANTIZED = contextvars.ContextVar("quantized", default=False)


class Quantizes(nn.Conv2d):
    def quantizes(self, x):
        return False

    def forward(self, x):
        weight = self.weight.round(decimals=1) if self.quantizes(x) else self.weight
        return self._conv_forward(x, weight, self.bias)


class AfterCalls(Quantizes):
    calls = 0

    def quantizes(self, x):
        self.calls += 1
        return self.calls > 5


class ByEnvironment(Quantizes):
    def quantizes(self, x):
        return bool(os.environ.get("QUANTIZED"))


class ByContext(Quantizes):
    def quantizes(self, x):
        return QUANTIZED.get()


class ByType(Quantizes):
    def quantizes(self, x):
        return x.dtype == torch.float32


class BySize(Quantizes):
    def quantizes(self, x):
        return x.shape[-2] > 8


class WithGradients(Quantizes):
    def quantizes(self, x):
        return torch.is_grad_enabled()


class Saturates(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x.clamp(-10, 10), self.weight, self.bias)


class KeepsFeatures(ReferenceBottle2neck):
    def forward(self, x):
        self.features = x
        return super().forward(x)


class SkipsSmallImages(ReferenceBottle2neck):
    def forward(self, x):
        return x if x.shape[-1] < 8 else super().forward(x)


class BoundsFloats(ReferenceBottle2neck):
    def forward(self, x):
        out = super().forward(x)
        return out if out.dtype == torch.float64 else out.clamp(0, 1)


X = torch.randn(1, 32, 9, 9, generator=torch.Generator().manual_seed(1))


def block(kind=ReferenceBottle2neck, conv=nn.Conv2d):
    made = kind(32, 8, baseWidth=64, scale=4).eval()
    made.convs[1] = conv(8, 8, 3, padding=1, bias=False)
    return accelerate(made)


@pytest.mark.parametrize(
    "conv", [AfterCalls, ByEnvironment, ByContext, ByType, BySize, WithGradients, Saturates], ids=lambda c: c.__name__
)
def test_a_convolution_that_may_change_is_left_to_itself(conv):
    (found,) = explain(block(conv=conv), X)
    assert not found.fused and conv.__name__ in found.reason


@pytest.mark.parametrize("kind", [KeepsFeatures, SkipsSmallImages, BoundsFloats], ids=lambda c: c.__name__)
def test_a_block_that_does_more_is_left_to_itself(kind):
    assert not explain(block(kind), X)[0].fused


def test_code_of_its_own_alone_is_no_reason():
    class Plain(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight, self.bias)

    assert explain(block(conv=Plain), X)[0].fused


def test_replaced_functions_are_noticed_at_the_next_call():
    b = block()
    with torch.no_grad():
        expected = [b(X), b(X)][1]
        own = F.conv2d
        with mock.patch.object(F, "conv2d", lambda *arguments: 2 * own(*arguments)):
            found, reason = b(X), explain(b)[0].reason
        assert "F.conv2d is replaced" in reason and not torch.allclose(found, expected)
        assert torch.equal(b(X), expected)


class Doubles(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out if function is F.conv2d else out


@pytest.mark.parametrize("where", ["x", "weight"])
def test_tensors_with_operators_of_their_own(where):
    b, x = block(), X
    with torch.no_grad():
        plain = [b(X), b(X)][1]
        if where == "x":
            x = X.as_subclass(Doubles)
        else:
            b.convs[0].weight = nn.Parameter(b.convs[0].weight.detach().as_subclass(Doubles))
        out = b(x)
    assert not explain(b)[0].fused and not torch.allclose(torch.Tensor(out), plain)


def test_swapped_tensors_and_lazy_parts():
    b = Bottle2neck(32, 8, baseWidth=64, scale=4).eval()
    with torch.no_grad():
        b(X), b(X)
        torch.utils.swap_tensors(b.convs[1].weight, nn.Parameter(torch.randn_like(b.convs[1].weight)))
        torch.testing.assert_close(b(X), ReferenceBottle2neck.forward(b, X), rtol=1e-3, atol=1e-4)
        for parts, lazy in ((b.convs, nn.LazyConv2d(8, 3, padding=1, bias=False)), (b.bns, nn.LazyBatchNorm2d())):
            parts[1] = lazy.eval()
            torch.testing.assert_close([b(X), b(X)][1], ReferenceBottle2neck.forward(b, X), rtol=1e-3, atol=1e-4)
