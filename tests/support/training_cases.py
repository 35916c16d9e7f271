"""Chains with BatchNorm in training mode, and their float64 gradients under the tested path's own activation masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import Chain, behind_own_mask
from torch import Tensor

from res2net_fused.chain import reference
from res2net_fused.ops.hierarchical_conv_bn import ConvBnOutput, hierarchical_conv_bn


@dataclass
class TrainingCase:
    """One call's tensors; x may be replaced before `run`."""

    chain: Chain
    x: Tensor
    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    eps: list[float]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.weights, *self.gammas, *self.betas]

    def require_grad(self) -> TrainingCase:
        for tensor in self.leaves:
            tensor.requires_grad_()
        return self

    def run(self, **keywords) -> ConvBnOutput:
        return hierarchical_conv_bn(self.x, self.weights, self.gammas, self.betas, self.eps, **self.chain.settings, **keywords)

    def reference(self) -> Tensor:
        return reference.hierarchical_conv_bn(self.x, self.weights, self.gammas, self.betas, self.eps, self.chain.config)

    def exact(self, out: Tensor, grad: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """out in float64, with every activation replaced by the mask that `out` shows, the z_i, and the gradients of
        `leaves`; grad as out."""
        config, steps = self.chain.config, self.chain.steps
        x, *rest = [t.detach().double().requires_grad_() for t in self.leaves]
        weights, gammas, betas = rest[:steps], rest[steps : 2 * steps], rest[2 * steps :]
        outputs, zs = out.detach().split(self.chain.width, 1), []

        def convolution(k: int, u: Tensor) -> Tensor:
            z = torch.conv2d(u, weights[k], None, config.stride, config.dilation, config.dilation, config.groups)
            zs.append(z)
            y = torch.nn.functional.batch_norm(z, None, None, gammas[k], betas[k], training=True, eps=self.eps[k])
            return behind_own_mask(y, outputs[k + config.first_convolved], config.activation)

        y = torch.cat(reference.hierarchical_chain(x.split(self.chain.width, 1), convolution, config), 1)
        gradients = [] if grad is None else list(torch.autograd.grad(y, [x, *rest], grad.double()))
        return y.detach(), [z.detach() for z in zs], gradients


def training_case(chain: Chain, shape=(3, 7, 9), dtype=torch.float64, device="cpu", seed=1) -> TrainingCase:
    """Random tensors; BatchNorm's parameters are fp32 beside a half x."""
    x, weights, biases = chain.tensors(shape, dtype, device, seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    betas = [bias.to(wide) for bias in biases]
    gammas = [0.6 + bias.abs() for bias in betas]
    return TrainingCase(chain, x, weights, gammas, betas, [1e-5 * (k + 1) for k in range(chain.steps)])
