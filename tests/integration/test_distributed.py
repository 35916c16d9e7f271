"""Data-parallel and sharded training with two gloo processes on the CPU, against one process with the joined batch."""

import os
import subprocess
import sys

import pytest
import torch
from distributed_steps import STEPS, WORLD, batches, network, optimizer_of, train
from helpers import assert_close
from torch import nn
from tree import ROOT, TESTS

from res2net_fused.chain import sync_batch_norm

SUPPORT = TESTS / "support"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="no gloo in this torch"
)


def run(kind, folder):
    """The results of every rank."""
    path = os.pathsep.join([str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(SUPPORT / "distributed_steps.py"), kind]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors[-3000:]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def assert_same(state, expected):
    for name, value in expected.state_dict().items():
        assert torch.allclose(state[name].double(), value.double(), rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fully_shard", marks=pytest.mark.slow), "choices"])
def test_two_processes_are_one_that_averages_the_gradients_of_their_halves(kind, tmp_path):
    """BatchNorm's statistics are of a process's own images, so the one process, too, takes the joined batch in halves."""
    replicas = [network(accelerated=False) for _ in range(WORLD)]
    optimizers = [optimizer_of(replica) for replica in replicas]
    losses = [[] for _ in range(WORLD)]
    for step in range(STEPS):
        for rank, replica in enumerate(replicas):
            x, target = batches(rank)[step]
            loss = nn.functional.cross_entropy(replica(x), target)
            optimizers[rank].zero_grad()
            loss.backward()
            losses[rank].append(loss.item())
        for pair in zip(*(replica.parameters() for replica in replicas), strict=True):
            mean = sum(parameter.grad for parameter in pair) / WORLD
            for parameter in pair:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert abs(losses[0][0] - losses[1][0]) > 1e-3, "the processes see different images"
    for rank, result in enumerate(run(kind, tmp_path)):
        assert all(fused == (kind != "choices" or rank == 1) for fused in result["fused"])
        if kind == "choices" and rank == 0:
            assert result["measured"] == 0 and all("must all choose alike" in note for note in result["notes"])
        got, expected = (torch.tensor(values, dtype=torch.float64) for values in (result["losses"], losses[rank]))
        assert torch.allclose(got, expected, rtol=1e-9)
        assert_same(result["state"], replicas[rank])


def test_synchronised_norms_are_those_of_the_joined_batch(tmp_path):
    joined = network(accelerated=False, only_chains=True)
    losses = torch.tensor(train(joined, batches(None)), dtype=torch.float64)
    results = run("sync", tmp_path)
    mean = torch.tensor([result["losses"] for result in results], dtype=torch.float64).mean(0)
    assert torch.allclose(mean, losses, rtol=1e-9)
    for result in results:
        assert all(result["fused"]) and "of all processes" in result["plan"]
        assert_same(result["state"], joined)
        # Where nobody asked for it, the class's own forward runs, and explain says why.
        assert "SyncBatchNorm" in result["reason"] and "asks for the operator" in result["reason"]
        assert "SyncBatchNorm" in result["error"] or "GPU" in result["error"]
        evaluated = result["eval"]
        assert evaluated["reports"] and all(fused for fused, _ in evaluated["reports"]), evaluated["reports"]
        assert_close(evaluated["out"], evaluated["expected"], 1e-12)


def test_moments_of_unequal_parts_are_those_of_the_whole(monkeypatch):
    """Three processes with batches of different sizes and means far from zero."""
    whole = torch.randn(3, 700, generator=torch.Generator().manual_seed(1)) + 1e4
    parts = whole.split([1, 200, 499], 1)
    vectors = []
    for part in parts:
        mean = part.mean(1)
        vectors.append(torch.cat([mean, (part - mean[:, None]).square().sum(1), torch.tensor([float(part.shape[1])])]))
    monkeypatch.setattr(sync_batch_norm, "gather", lambda vector, group: torch.stack(vectors))
    mean, squares, total = sync_batch_norm.combine_moments(vectors[0][:3], vectors[0][3:6], 1, "")
    assert total == 700
    assert torch.allclose(mean, whole.double().mean(1).float(), rtol=1e-6)
    assert torch.allclose(squares / 700, whole.double().var(1, correction=0).float(), rtol=1e-4)
