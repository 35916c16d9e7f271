"""Training as it is checked and timed: a chain's or a block's forward and backward, and a network's step of SGD.

Parameters are fp32; a half dtype means autocast. BatchNorm takes the statistics of the batch and updates its own. Everybody
computes the gradients of x and of every parameter from the same incoming gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accelerate import accelerate
from ..chain import BACKENDS
from ..parity import ParityReport, ParityRow, relative_error
from ..reference import ReferenceBottle2neck, hierarchical_chain
from ..tolerances import FORWARD, NETWORK_OVER_EAGER, network_bound
from ..trained_block import trained_chain
from .providers import OURS
from .workloads import TORCH_DTYPES, TRAINED, Case, channels_last

LEARNING_RATE = 1e-3
_CHECKED_IMAGES = 4  # at most, in the parity gate: float64 on a CPU takes its time
# BatchNorm's backward subtracts means, which leaves its gradients small: a digit more than an output's bound.
_GRADIENTS_OVER_FORWARD = 10.0


class TrainedChain(nn.Module):
    """The 3x3 convolutions and BatchNorms of a block, (N, s*w, H, W) -> (N, s*w, H/stride, W/stride).

    backend: of ours; None for PyTorch's own operators.
    """

    def __init__(self, block: ReferenceBottle2neck, backend: str | None) -> None:
        super().__init__()
        self.convs, self.bns = block.convs, block.bns
        self.config, self.backend = block.chain_config, backend

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """masks: an output whose signs replace those of the activations, so that rounding flips none; not for ours."""
        if self.backend is not None:
            return trained_chain(self, x, self.config, recompute=False, backend=self.backend)
        groups = x.split(self.convs[0].in_channels, 1)
        own = None if masks is None else masks.split(self.convs[0].in_channels, 1)

        def convolution(k: int, u: Tensor) -> Tensor:
            y = self.bns[k](self.convs[k](u))
            return y.relu_() if own is None else y * (own[k + self.config.first_convolved] > 0)

        return torch.cat(hierarchical_chain(groups, convolution, self.config), 1)


def plain(case: Case) -> Case:
    """The chain or block that is trained, in fp32."""
    return replace(case, workload=TRAINED[case.workload], dtype="float32")


def training_module(case: Case, provider: str, backend: str) -> nn.Module:
    """In training mode, of random parameters in fp32, channels-last but for "eager"; case.workload is a key of TRAINED.

    provider: a peer, one of OURS (with `backend`), or the name of a backend of ours.
    """
    block = replace(plain(case), workload="block").module().train().requires_grad_(True)
    named = backend if provider in OURS else provider if provider in BACKENDS else None
    module: nn.Module = block
    if case.workload == "train_chain":
        assert isinstance(block, ReferenceBottle2neck)
        module = TrainedChain(block, named)
    elif named is not None:
        module = accelerate(block, named)
    return module if provider == "eager" else channels_last(module)


class TrainingStep:
    """A module's forward and backward as one call: x (N, C, H, W) -> its output; also in inference mode."""

    def __init__(self, module: nn.Module, dtype: str, compiles: bool = False) -> None:
        self.parameters = list(module.parameters())
        self.dtype = dtype
        self.forward: Callable[..., Tensor] = torch.compile(module, dynamic=False) if compiles else module
        self._grad: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.gradients(x)[0]

    def gradients(self, x: Tensor, grad: Tensor | None = None) -> tuple[Tensor, ...]:
        """The output, and the gradients of x and of every parameter; grad: as the output, else always the same random one."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().requires_grad_()
            with autocast(self.dtype, x.device):
                out = self.forward(x)
            if grad is None and self._grad is None:
                self._grad = torch.randn_like(out, requires_grad=False)
            grad = self._grad if grad is None else grad
            return out.detach(), *torch.autograd.grad(out, [x, *self.parameters], grad)


class SgdStep:
    """A network's forward, backward and step of SGD as one call: images (N, 3, H, W) -> the loss; also in inference mode."""

    def __init__(self, network: nn.Module, dtype: str, compiles: bool = False) -> None:
        self.forward: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False) if compiles else network
        self.optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=0.9)
        self.classes, self.dtype = len(network.get_parameter("fc.bias")), dtype  # fc is a convolution in DLA

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            labels = torch.arange(len(images), device=images.device) % self.classes
            with autocast(self.dtype, images.device):
                loss = F.cross_entropy(self.forward(images).float(), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def training_network(network: nn.Module, provider: str, backend: str) -> nn.Module:
    """A copy of `network` in training mode for that provider, as `training_module`."""
    model = copy.deepcopy(network).train().requires_grad_(True)
    if provider in OURS or provider in BACKENDS:
        accelerate(model, backend if provider in OURS else provider)
    return model if provider == "eager" else channels_last(model)


def autocast(dtype: str, device: str | torch.device) -> torch.autocast:
    kind = torch.device(device).type
    if dtype in ("float32", "tf32"):
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, TORCH_DTYPES[dtype])


def with_inner_chains(cases: Iterable[Case]) -> list[Case]:
    """The cases and, for every block, its chain: what the gate has to check, each once."""
    return list(dict.fromkeys(one for case in cases for one in (replace(case, workload="train_chain"), case)))


def check_training_case(case: Case, provider: str, backend: str) -> ParityReport:
    """Output and gradients of ours against float64, of at most four images.

    A chain's gradients are compared under the masks of its own output. Of a block, where other activations have masks as well,
    it is the output alone.
    """
    case = replace(case, batch=min(case.batch, _CHECKED_IMAGES))
    (x,) = plain(case).inputs()
    x = x.contiguous(memory_format=torch.channels_last)
    peer, ours = (TrainingStep(training_module(case, who, backend), case.dtype) for who in ("eager_channels_last", provider))
    exact = training_module(case, "eager_channels_last", backend).double()
    out, *gradients = ours.gradients(x)
    eager_out, *eager_gradients = peer.gradients(x, ours._grad)
    with torch.no_grad():
        expected = copy.deepcopy(exact)(x.double())
    stage = f"{case.stage} {case.variant}"

    def row(stage: str, error: float, eager_error: float, bound: float) -> ParityRow:
        return ParityRow(
            case.workload, str(case.config), stage, case.batch, provider, case.dtype, error, eager_error, bound
        )

    limit, eager_error = FORWARD[case.dtype].limit, relative_error(eager_out, expected)
    report = ParityReport([row(stage, relative_error(out, expected), eager_error, max(limit, network_bound(eager_error)))])
    if isinstance(exact, TrainedChain) and ours._grad is not None:
        error = _gradient_error(exact, x, out, ours._grad, gradients)
        eager_error = _gradient_error(exact, x, eager_out, ours._grad, eager_gradients)
        bound = max(_GRADIENTS_OVER_FORWARD * limit, NETWORK_OVER_EAGER * eager_error)
        report.append(row(f"{stage}, gradients", error, eager_error, bound))
    return report


def _gradient_error(exact: TrainedChain, x: Tensor, out: Tensor, grad: Tensor, gradients: list[Tensor]) -> float:
    """The largest error of one gradient under the masks of `out`; NaN where one is not finite."""
    x = x.double().requires_grad_()
    parameters = list(exact.parameters())
    expected = torch.autograd.grad(exact(x, out), [x, *parameters], grad.double())
    errors = [relative_error(a, b) for a, b in zip(gradients, expected, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)
