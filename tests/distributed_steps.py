"""Two processes on the CPU train one small network; each returns what the test compares with a single process.

Run by tests/test_distributed.py: python distributed_steps.py KIND RANK FOLDER.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import randomize
from official_models import official
from torch import nn

from res2net_fused import accelerate, explain

STEPS, WORLD = 2, 2


def images() -> torch.Tensor:
    return torch.randn(4, 3, 20, 24, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def network(accelerated: bool = True) -> nn.Module:
    model = randomize(official()).double().train()
    return accelerate(copy.deepcopy(model), "reference") if accelerated else model


def train(model: nn.Module, batches, own: nn.Module | None = None) -> list[float]:
    """SGD; the loss is the mean over images, so that the mean over processes is that of the joined batch."""
    optimizer = torch.optim.SGD((own or model).parameters(), 0.01, momentum=0.9)
    losses = []
    for x, target in batches:
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_images_twice(rank: int | None):
    """Both processes get the same two images, so that local batch statistics are those of the joined batch; rank None: that."""
    x, target = images()[:2], torch.arange(2)
    if rank is None:
        x, target = torch.cat([x, x]), torch.cat([target, target])
    return [(x + step, target) for step in range(STEPS)]


def main(kind: str, rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    results = {}
    model = network()
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        results["losses"] = train(wrapped, same_images_twice(rank))
        results["state"] = model.state_dict()
    elif kind == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for layer in (model.layer1, model.layer2, model.layer3):
            for block in layer:
                fully_shard(block)
        fully_shard(model)
        results["losses"] = train(model, same_images_twice(rank))
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
        results["state"] = full
    elif kind == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        try:
            model(images()[2 * rank : 2 * rank + 2])
        except ValueError as error:  # PyTorch's own synchronised norms run on GPUs only
            results["error"] = str(error)
        # As far as eligibility goes, without the stem's norm, which is PyTorch's own as well.
        block = model.layer1[0]
        try:
            block(torch.randn(2, 16, 6, 7, dtype=torch.float64))
        except ValueError:
            pass
        results["reason"] = explain(block)[0].reason
    results["fused"] = [report.fused for report in explain(model)]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
