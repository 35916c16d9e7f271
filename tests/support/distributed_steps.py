"""Two processes on the CPU train one small network, each on images of its own, and return what the test compares.

Run by tests/integration/test_distributed.py: python distributed_steps.py KIND RANK FOLDER.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import randomize
from official_models import blocks_of, official
from torch import nn

from res2net_fused import accelerate, explain, tune
from res2net_fused.backends import choices

STEPS, WORLD, LEARNING_RATE = 2, 2, 0.01


def images(step: int) -> torch.Tensor:
    """The joined batch of one step."""
    return torch.randn(4, 3, 20, 24, generator=torch.Generator().manual_seed(8 + step), dtype=torch.float64)


LABELS = torch.tensor([0, 3, 1, 4])


def batches(rank: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images of one process in every step, or the joined batch."""
    half = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return [(images(step)[half], LABELS[half]) for step in range(STEPS)]


def network(accelerated: bool = True, only_chains: bool = False) -> nn.Module:
    """The same at every call. only_chains: only their BatchNorms take statistics of the batch; PyTorch synchronises on GPUs
    only, so that here no other ones can.
    """
    model = randomize(official()).double().train()
    if only_chains:
        chains = {bn for block in blocks_of(model).values() for bn in block.bns}
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module not in chains:
                module.eval()
    return accelerate(copy.deepcopy(model), "reference") if accelerated else model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)


def train(model: nn.Module, steps) -> list[float]:
    """SGD; the loss is the mean over images, so that the mean over processes is that of the joined batch."""
    optimizer, losses = optimizer_of(model), []
    for x, target in steps:
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def synchronise_chains(model: nn.Module) -> nn.Module:
    for block in blocks_of(model).values():
        block.bns = nn.SyncBatchNorm.convert_sync_batchnorm(block.bns)
    return model


def accelerated_in_eval_mode(group: dist.ProcessGroup) -> dict[str, object]:
    """A network whose norms are all synchronised over a group of their own, before and after it is taken over."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(accelerated=False), group).eval()
    with torch.no_grad():
        expected = model(images(0))
        out = accelerate(model)(images(0))
    return {"expected": expected, "out": out, "reports": [(report.fused, report.reason) for report in explain(model)]}


def main(kind: str, rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    results = {}
    if kind == "ddp":
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        results["losses"] = train(wrapped, batches(rank))
    elif kind == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = network()
        mesh = init_device_mesh("cpu", (WORLD,))  # by itself it takes a GPU where there is one
        for part in (*blocks_of(model).values(), model):
            fully_shard(part, mesh=mesh)
        results["losses"] = train(model, batches(rank))
    elif kind == "choices":  # which differ from rank to rank
        model = accelerate(network(accelerated=False))
        choice = ("own", "reference")[rank]
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        with choices.pinned(choice):
            results["losses"] = train(wrapped, batches(rank))
        if rank == 0:  # which nothing may make wait for the other
            synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(accelerate(network(accelerated=False)))
            report = tune(synchronised, images(0), training=True, progress=False)
            results["notes"], results["measured"] = report.notes, len(report.calls)
    else:
        model = network(accelerated=False, only_chains=True)
        wrapped = nn.parallel.DistributedDataParallel(model)
        # Wrapped before, since on a CPU it refuses any module with synchronised norms.
        accelerate(synchronise_chains(model), "reference")
        results["losses"] = train(wrapped, batches(rank))
        results["plan"] = explain(model)[0].plan
        unasked = synchronise_chains(accelerate(network(accelerated=False, only_chains=True)))
        try:
            unasked(batches(rank)[0][0])
        except ValueError as error:  # PyTorch's own synchronised norms run on GPUs only
            results["error"] = str(error)
        results["reason"] = explain(unasked)[0].reason
        results["eval"] = accelerated_in_eval_mode(dist.new_group(range(WORLD)))
    state = model.state_dict()
    results["state"] = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in state.items()}
    results["fused"] = [report.fused for report in explain(model)]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
