"""Random blocks for the native CPU kernels, and their check against float64."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from cpu_kernel_cases import each_kernel
from fuzz.checks import Truth, check_against
from helpers import Chain
from torch import Tensor

from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.chain import reference
from res2net_fused.chain.block_weights import BlockWeights
from res2net_fused.chain.problem import ChainProblem


def make_block(chain: Chain, shape, inplanes=10, outplanes=18, projection=0, seed=3):
    """x (N, inplanes, H, W), what the shortcut reads, and a folded block with random weights, all in float64.

    projection: the stride of the shortcut's convolution; 0 for none.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    batch, height, width = shape
    _, weights, biases = chain.tensors(shape)
    folded = BlockWeights(
        random(chain.channels, inplanes, 1, 1) / inplanes**0.5, random(chain.channels), weights, biases,
        random(outplanes, chain.channels, 1, 1) / chain.channels**0.5, random(outplanes),
    )  # fmt: skip
    x = random(batch, inplanes, height, width)
    shortcut = random(batch, outplanes, chain.config.output_size(height), chain.config.output_size(width))
    if projection:
        planes = inplanes + 3
        folded.projection_weight, folded.projection_bias = random(outplanes, planes, 1, 1) / planes**0.5, random(outplanes)
        folded.projection_stride = projection
        # The last pixels of a strided row are not all read.
        sizes = ((size - 1) * projection + 1 + (i if projection > 1 else 0) for i, size in enumerate(shortcut.shape[2:]))
        shortcut = random(batch, planes, *sizes)
    return x, shortcut, folded


def converted(folded: BlockWeights, weight: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor]) -> BlockWeights:
    """All weights by the one, all biases by the other."""
    f, projects = folded, folded.projection_weight is not None
    return replace(
        f,
        conv1_weight=weight(f.conv1_weight), conv1_bias=bias(f.conv1_bias),
        weights=[weight(w) for w in f.weights], biases=[bias(b) for b in f.biases],
        conv3_weight=weight(f.conv3_weight), conv3_bias=bias(f.conv3_bias),
        projection_weight=weight(f.projection_weight) if projects else None,
        projection_bias=bias(f.projection_bias) if projects else None,
    )  # fmt: skip


def in_float64(chain, x, shortcut, folded, relu=True):
    f = folded
    u = F.conv2d(x.double(), f.conv1_weight.double(), f.conv1_bias.double()).relu()
    y = reference.hierarchical_conv2d(u, [w.double() for w in f.weights], [b.double() for b in f.biases], chain.config)
    out = F.conv2d(y, f.conv3_weight.double(), f.conv3_bias.double())
    if shortcut is not None and f.projection_weight is not None:
        shortcut = F.conv2d(shortcut.double(), f.projection_weight.double(), f.projection_bias.double(), f.projection_stride)
    if shortcut is not None:
        out = out + shortcut.double()
    return out.relu() if relu else out


def problem_of(chain, x):
    return ChainProblem.from_tensor(x, chain.width, chain.steps, chain.config)


def check(chain, shape, dtype=torch.float32, arithmetics=("auto",), shortcut=True, relu=True, packed=True, **sizes):
    x, added, folded = make_block(chain, shape, **sizes)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    folded = converted(folded, lambda t: t.to(dtype), Tensor.float)  # as folding makes them
    added = added.to(dtype).contiguous(memory_format=torch.channels_last) if shortcut else None

    def exact(convert):
        wide = None if added is None else convert(added)
        return [in_float64(chain, convert(x), wide, converted(folded, convert, convert), relu)]

    truth = Truth(exact, dtype)  # few outputs of a random block may nearly cancel
    for kernel in each_kernel(arithmetics):
        if packed:
            folded.packed = cpu_backend.block.pack_block(folded, chain.config)
        out = cpu_backend.block.block_forward(problem_of(chain, x), x, added, folded, relu)
        check_against([out], truth, f"{kernel}, {shape}")
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
