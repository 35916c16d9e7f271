"""The activations behind each convolution: names, values and both kinds of gradient, against torch's modules in float64."""

import pytest
import torch
from torch import nn

from res2net_fused.chain.activations import (
    ACTIVATIONS,
    activate,
    activation_backward,
    activation_backward_from_input,
    check_activation,
    leaky_relu,
    shows_slope,
    split_activation,
)
from res2net_fused.modules.eligibility import fused_activation


class Identity(nn.Module):
    forward = staticmethod(lambda x: x)


MODULES = {
    "relu": nn.ReLU(),
    "none": Identity(),
    "hardtanh20": nn.Hardtanh(0, 20),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu:0.3": nn.LeakyReLU(0.3),
    "leaky_relu:1.5": nn.LeakyReLU(1.5),
    "leaky_relu:-0.2": nn.LeakyReLU(-0.2),
    "leaky_relu:0": nn.LeakyReLU(0.0),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "mish": nn.Mish(),
}
VALUES = torch.cat(
    [torch.linspace(-40, 40, 1601, dtype=torch.float64), torch.tensor([0.0, -0.0, 6.0, 20.0, 3.0, -3.0]).double()]
)


def test_all_are_here():
    assert {split_activation(name)[0] for name in MODULES} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients_are_those_of_torchs_modules(name):
    z = VALUES.clone().requires_grad_()
    y = MODULES[name](z)
    dy = torch.linspace(-2, 3, len(z)).double()
    (expected,) = torch.autograd.grad(y, z, dy)
    check_activation(name)
    assert torch.equal(activate(z, name), y)
    if shows_slope(name):
        found = activation_backward(dy, y.detach(), name)
    else:
        found = activation_backward_from_input(dy, z.detach(), name)
        assert torch.allclose(activation_backward_from_input(dy, z.detach(), name, again=True), expected, 1e-14, 1e-14)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-14)


def test_which_show_their_slope():
    assert {name for name in MODULES if not shows_slope(name)} == {
        "leaky_relu:-0.2", "hardswish", "silu", "gelu", "gelu_tanh", "mish"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["swish", "", "leaky_relu:", "leaky_relu:x", "leaky_relu:inf", "relu:0", None, 3, ["relu"], nn.ReLU]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="allowed are 'relu', 'none'.*'leaky_relu:0.1'"):
        check_activation(name)


@pytest.mark.parametrize("slope", [0.1, 1e-30, 0.2000000001, 3.0])
def test_a_slope_keeps_all_its_digits(slope):
    assert split_activation(leaky_relu(slope)) == ("leaky_relu", slope)
    assert split_activation(fused_activation(nn.LeakyReLU(slope))) == ("leaky_relu", slope)


class Derived(nn.SiLU):
    """A class with settings of its own only."""


class Other(nn.SiLU):
    def forward(self, x):
        return x.sigmoid()


def test_modules_are_known_by_their_classes_own_forward():
    for name, module in MODULES.items():
        if name != "none":
            assert split_activation(fused_activation(module)) == split_activation(name)
    assert fused_activation(Derived()) == "silu"
    assert fused_activation(nn.Hardtanh(0, 6)) == "relu6"
    odd = nn.LeakyReLU()
    odd.negative_slope = torch.tensor(0.1)
    for module in (Other(), nn.Hardtanh(), nn.Hardtanh(0, 5), nn.ELU(), nn.PReLU(), nn.Softplus(), odd):
        assert fused_activation(module) is None
