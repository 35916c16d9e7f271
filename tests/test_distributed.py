"""Data-parallel and sharded training with two gloo processes on the CPU, against one process with the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_steps import WORLD, network, same_images_twice, train

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="no gloo in this torch"
)


def run(kind, folder):
    """The results of every rank."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(HERE / "distributed_steps.py"), kind]
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


@pytest.mark.parametrize("kind", ["ddp", "fully_shard"])
def test_two_processes_are_one_with_the_joined_batch(kind, tmp_path):
    joined = network(accelerated=False)
    losses = train(joined, same_images_twice(None))
    for result in run(kind, tmp_path):
        assert all(result["fused"])
        assert torch.allclose(torch.tensor(result["losses"]), torch.tensor(losses), rtol=1e-9)
        for name, value in joined.state_dict().items():
            if name.endswith("running_var"):
                continue  # unbiased: n / (n - 1) of another n
            assert torch.allclose(result["state"][name].double(), value.double(), rtol=1e-8, atol=1e-10), name


def test_synchronised_norms_fall_back_and_say_so(tmp_path):
    for result in run("sync", tmp_path):
        assert "SyncBatchNorm" in result["reason"] and "not fused in training mode" in result["reason"]
        assert "SyncBatchNorm" in result["error"] or "GPU" in result["error"]
