"""float32 multiplied in TF32 by arithmetic that cuts bits off, as tensor cores do: factors are rounded, results are not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from chain1d_cases import arguments, leaves, to_float64
from chain_cases import error, make_case, poison_new_memory
from helpers import CHAINS, Chain, masked_gradients
from training_cases import training_case

from res2net_fused import Bottle2neck, freeze, hierarchical_conv1d, hierarchical_conv2d, pack_weights, parity, reference
from res2net_fused.backends import triton_settings
from res2net_fused.bench import workloads
from res2net_fused.bench.workloads import Case, Config
from res2net_fused.chain import ChainConfig
from res2net_fused.chain1d import Chain1dConfig
from res2net_fused.kernels import implicit_gemm
from res2net_fused.tolerances import FORWARD

BOUND, EXACT = FORWARD["tf32"].limit, FORWARD["float32"].limit
pytestmark = pytest.mark.usefixtures("tf32")


def check(out, exact):
    """Within the bound, and multiplied in TF32 at all."""
    assert EXACT < error(out, exact) <= BOUND


def errors_of_check(monkeypatch, config, workload, variant, stages):
    """Of what `res2net-fused check` runs, at batch 1 and 7x7 pixels."""
    monkeypatch.setattr(workloads, "SIZES", (7, 7, 7, 7))
    chosen = [Case(workload, Config.parse(config), stage, 1, "tf32", "cpu", variant) for stage in stages]
    rows = parity.check_cases(chosen, "triton")
    assert [row.bound for row in rows] == [BOUND] * len(chosen)
    return [row.error for row in rows]


CHECKED = [(*both, "normal") for both in itertools.product(("26w4s", "14w8s", "48w2s"), ("chain", "block"))]
CHECKED += [("26w4s", "chain", "stage"), ("26w4s", "block", "stage")]


@pytest.mark.parametrize("config, workload, variant", CHECKED)
def test_check(config, workload, variant, monkeypatch):
    errors = errors_of_check(monkeypatch, config, workload, variant, (1,))
    print(errors)
    assert all(EXACT < e <= BOUND for e in errors)
