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

from ..backends.base import BACKENDS
from ..chain.reference import hierarchical_chain
from ..chain.tolerances import FORWARD, OTHER_RELUS, network_bound, on_other_images
from ..modules.reference_blocks import ReferenceBottle2neck
from ..modules.training import trained_chain
from ..patching.accelerate import accelerate
from ..testing.cases import TORCH_DTYPES, TRAINED, Case, channels_last
from ..testing.parity import ParityReport, ParityRow, relative_error
from .providers import OURS
from .timed_case import TimedCase

LEARNING_RATE = 1e-3
_DIFFERENT_IMAGES = 4  # at most, of those that are checked: float64 takes its time and its memory
# BatchNorm's backward subtracts means, which leaves its gradients small: a digit more than an output's bound.
_GRADIENTS_OVER_FORWARD = 10.0
_GRADIENTS = "gradients"  # the end of what their row is of
_MOST_OF_GRADIENTS = 0.9  # however far flipped ReLUs take eager's: gradients of zero are off by 1


class ChainWithBatchNorm(nn.Module):
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
    """A module in training mode, with random parameters in fp32, channels-last but for "eager".

    case.workload: a key of TRAINED. provider: a peer, one of OURS (with `backend`), or the name of a backend of ours.
    """
    block = replace(plain(case), workload="block").module().train().requires_grad_(True)
    named = backend if provider in OURS else provider if provider in BACKENDS else None
    module: nn.Module = block
    if case.workload == "train_chain":
        assert isinstance(block, ReferenceBottle2neck)
        module = ChainWithBatchNorm(block, named)
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
        """The output, and the gradients of x and of every parameter; grad: of the output's shape, else always the same random
        one."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().requires_grad_()
            with autocast(self.dtype, x.device):
                out = self.forward(x)
            if grad is None and self._grad is None:
                self._grad = torch.randn_like(out, requires_grad=False)
            grad = self._grad if grad is None else grad.to(out.dtype)
            return out.detach(), *torch.autograd.grad(out, [x, *self.parameters], grad)


class SgdStep:
    """A network's forward, backward and step of SGD as one call: images (N, 3, H, W) -> the loss; also in inference mode."""

    def __init__(self, network: nn.Module, dtype: str, compiles: bool = False) -> None:
        self.network = network
        self.forward: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False) if compiles else network
        self.optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=0.9)
        self.dtype = dtype

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            with autocast(self.dtype, images.device):
                logits = self.forward(images).float()
                loss = F.cross_entropy(logits, labels_of(logits))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def labels_of(logits: Tensor) -> Tensor:
    """(N,) for (N, classes): the classes in turn."""
    return torch.arange(len(logits), device=logits.device) % logits.shape[1]


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
    """Output and gradients of ours at the case's own batch against float64: see `TrainingTruth`."""
    step = TrainingStep(training_module(case, provider, backend), case.dtype)
    return check_step(lambda number: TrainingTruth(case, number).check(step, provider), lambda bound: bound)


def check_step(check: Callable[[int], ParityReport], allowed: Callable[[float], float]) -> ParityReport:
    """What `check` finds on the first set of images by which gradients can tell (`on_other_images`).

    check: compares a step with float64 on a set of images, by its number. allowed: the bound on the step, from that on ours.
    """

    def compared(number: int, last: bool) -> ParityReport | None:
        report = ParityReport(replace(row, bound=allowed(row.bound)) for row in check(number))
        misses = report.misses
        return None if misses and not last and all(map(_by_other_relus, misses)) else report

    return on_other_images(compared)


def _by_other_relus(row: ParityRow) -> bool:
    """Whether ReLUs inside a block or network may explain a miss; a chain is compared under its own."""
    return row.workload != "train_chain" and row.stage.endswith(_GRADIENTS) and row.error <= OTHER_RELUS


class Copies:
    """A batch of at most four different images in a random order, so that float64 has to compute those few alone.

    BatchNorm's statistics are those of the few, for each occurs equally often. So are an image's output and gradient;
    gradients of parameters are `count` times as large.
    """

    def __init__(self, images: Tensor, batch: int) -> None:
        """images: (n, C, H, W), of which the first ones are taken."""
        different = max(k for k in range(1, min(len(images), _DIFFERENT_IMAGES) + 1) if batch % k == 0)
        generator = torch.Generator().manual_seed(2)
        self.index = (torch.randperm(batch, generator=generator) % different).to(images.device)
        self.few, self.count = images[:different], batch // different

    def spread(self, few: Tensor) -> Tensor:
        """(k, ...) -> (N, ...), channels-last where it has four dimensions."""
        return few[self.index].contiguous(memory_format=torch.channels_last if few.dim() == 4 else torch.contiguous_format)

    def first(self, out: Tensor) -> Tensor:
        """(N, ...) -> (k, ...): where each of the few occurs first."""
        return torch.stack([out[self.index == i][0] for i in range(len(self.few))])

    def error(self, out: Tensor, expected: Tensor) -> float:
        """The relative error of a whole batch, a few of whose images are in float64 at a time."""
        if len(out) != len(self.index) or out.shape[1:] != expected.shape[1:]:
            return float("nan")
        difference = sum((out[self.index == i].double() - one).square().sum() for i, one in enumerate(expected))
        return float((difference / (self.count * expected.square().sum())) ** 0.5)


class TrainingTruth:
    """Output and gradients of a training case in float64, for a batch of copies.

    A chain's gradients are compared under the masks of the tested path's own output. A block has masks inside: its gradients
    are those of float64's, where eager's flipped ReLUs say how far the tested path's may be; its chain is a case of its own.
    """

    def __init__(self, case: Case, images: int = 0) -> None:
        """images: the number of the set of random images; in later ones there is one image alone, with fewer ReLUs to flip."""
        self.case = case
        different = min(case.batch, _DIFFERENT_IMAGES if images == 0 else 1)
        *_, x = replace(plain(case), batch=different).inputs(images + 1)
        self._copies = Copies(x, case.batch)
        few = self._copies.few.contiguous(memory_format=torch.channels_last)
        peer = TrainingStep(training_module(case, "eager_channels_last", ""), case.dtype)
        self._exact = training_module(case, "eager_channels_last", "").double()
        with torch.no_grad():
            self._expected = copy.deepcopy(self._exact)(few.double())
        grad = torch.randn(self._expected.shape, generator=torch.Generator().manual_seed(3))
        self._grad = grad.to(x.device, TORCH_DTYPES[case.dtype]).float()  # rounded alike for all
        out, *gradients = peer.gradients(few, self._grad)
        self.eager_error = relative_error(out, self._expected)
        expected = self._gradients(out)
        self.eager_gradient_error = worst(relative_error(a, b) for a, b in zip(gradients, expected, strict=True))

    def check(self, step: TrainingStep, name: str) -> ParityReport:
        """Compares a step as it is timed, at the case's batch."""
        copies, case = self._copies, self.case
        out, of_x, *of_parameters = step.gradients(copies.spread(copies.few), copies.spread(self._grad))
        expected_x, *expected = self._gradients(copies.first(out))
        errors = [copies.error(of_x, expected_x)]
        errors += [relative_error(a, copies.count * b) for a, b in zip(of_parameters, expected, strict=True)]
        limit = FORWARD[case.dtype].limit
        bounds = max(limit, network_bound(self.eager_error)), gradient_bound(limit, self.eager_gradient_error)
        stage, what = f"{case.stage} {case.variant}", (case.workload, str(case.config))
        rows = (
            (stage, copies.error(out, self._expected), self.eager_error, bounds[0]),
            (f"{stage}, {_GRADIENTS}", worst(errors), self.eager_gradient_error, bounds[1]),
        )
        return ParityReport(
            ParityRow(*what, place, case.batch, name, case.dtype, error, eager_error, bound)
            for place, error, eager_error, bound in rows
        )

    def _gradients(self, masks: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x and of every parameter in float64, for the few images."""
        x = self._copies.few.double().requires_grad_()
        exact = copy.deepcopy(self._exact)
        out = exact(x, masks) if isinstance(exact, ChainWithBatchNorm) else exact(x)
        return torch.autograd.grad(out, [x, *exact.parameters()], self._grad.double())


class SgdTruth:
    """The loss of a network and the gradients of a step of SGD in float64, for a batch of copies."""

    def __init__(self, case: TimedCase, network: nn.Module, images: Tensor, number: int = 0) -> None:
        """network: with the parameters that every step begins with. images: (N, 3, H, W); where number, that of their set, is
        not 0, random ones like them."""
        if number:
            generator = torch.Generator(images.device).manual_seed(number)
            images = torch.empty_like(images).normal_(generator=generator)  # as normalised photographs are
        self.case, self._network, self._copies = case, network, Copies(images, len(images))
        exact = copy.deepcopy(network).train().requires_grad_(True).double()
        logits = exact(self._copies.few.double())[self._copies.index]
        self._loss = F.cross_entropy(logits, labels_of(logits))
        self._loss.backward()
        self._gradients = _joined(p.grad for p in exact.parameters())
        self._loss = self._loss.detach()
        eager = SgdStep(training_network(network, "eager_channels_last", ""), case.dtype)
        self.eager_errors = self._errors(eager)

    def check(self, step: SgdStep, name: str) -> ParityReport:
        """Compares a step as it is timed, from the network's parameters on; it moves them."""
        case, limit = self.case, FORWARD[self.case.dtype].limit
        loss, gradients = self.eager_errors
        bounds = max(limit, network_bound(loss)), gradient_bound(limit, gradients)
        return ParityReport(
            ParityRow(case.workload, case.config_name, place, case.batch, name, case.dtype, error, eager, bound)
            for place, error, eager, bound in zip(
                ("loss", _GRADIENTS), self._errors(step), self.eager_errors, bounds, strict=True
            )
        )

    def _errors(self, step: SgdStep) -> tuple[float, float]:
        """The errors of the loss and of all gradients as one vector, which are the momentum after a first step."""
        with torch.no_grad():
            for own, first in zip(step.network.state_dict().values(), self._network.state_dict().values(), strict=True):
                own.copy_(first)
        step.optimizer.state.clear()
        loss = step(self._copies.spread(self._copies.few))
        momentum = (step.optimizer.state[p]["momentum_buffer"] for p in step.network.parameters())
        return relative_error(loss, self._loss), relative_error(_joined(momentum), self._gradients)


def _joined(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors if t is not None])


def gradient_bound(limit: float, eager_error: float) -> float:
    """limit: of an output."""
    return max(_GRADIENTS_OVER_FORWARD * limit, min(_MOST_OF_GRADIENTS, network_bound(eager_error)))


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one is."""
    errors = list(errors)
    return float("nan") if any(e != e for e in errors) else max(errors)
