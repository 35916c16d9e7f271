"""Work cut to what a CPU computes in seconds, while plans and tiles are made at true size.

Batches are those of the command; maps, images, rounds and the inputs that take turns become fewer. What plans is asked about
the batch and the maps that stand for them; the CUDA kernel's, whose launches must fit the map, about the batch alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

SIZES = (16, 12, 9, 7)  # rows and columns of the four stages
TRUE = {16: 56, 24: 56, 12: 28, 18: 28, 9: 14, 14: 14, 7: 7}  # and of a strided block's input
IMAGE = 64


def changes(batch: int) -> dict[str, Callable[[Any], None]]:
    """By module, what is done to it once it has been imported. batch: by how much the true one is larger."""
    package = "res2net_fused"
    return {
        f"{package}.backends.triton.availability": lambda m: _planned(m, ("plan_for", "plan_training_for"), batch, TRUE),
        f"{package}.backends.cuda.plan": lambda m: _planned(m, ("plan_chain",), batch, {}),
        f"{package}.testing.cases": lambda m: setattr(m, "SIZES", SIZES),
        f"{package}.bench.sample_images": _small_sample_images,
        f"{package}._timing": _few_rounds,
        f"{package}.bench.work": _few_inputs,
        "record.roofline": _quick_rates,
        "record.runner": lambda m: setattr(m, "IMAGE_SIZE", IMAGE),
    }


def _planned(module: Any, names: tuple[str, ...], batch: int, sizes: dict[int, int]) -> None:
    for name in names:
        own = getattr(module, name)

        @functools.wraps(own)
        def planned(problem: Any, *args: Any, own: Any = own, **options: Any) -> Any:
            height, width = (sizes.get(size, size) for size in (problem.height, problem.width_pixels))
            true = dataclasses.replace(problem, batch=problem.batch * batch, height=height, width_pixels=width)
            return own(true, *args, **options)

        setattr(module, name, planned)


def _small_sample_images(module: Any) -> None:
    own = module.sample_images
    module.sample_images = functools.wraps(own)(lambda size=224: own(min(size, IMAGE)))


def _few_rounds(module: Any) -> None:
    own, capture = module.measure, module.GraphedContender.__init__

    @functools.wraps(own)
    def measure(contenders: Any, device: str, **options: Any) -> Any:
        return own(contenders, device, **{**options, "seconds": 0, "min_repeats": 2, "max_repeats": 2, "warm_up": 1})

    module.measure = measure
    module.GraphedContender.__init__ = lambda self, model, inputs, min_calls=1: capture(self, model, inputs, 1)


def _few_inputs(module: Any) -> None:
    own = module.rotation_count
    module.rotation_count = lambda size, l2: min(2, own(size, l2))


def _quick_rates(module: Any) -> None:
    own = module.measure_rates
    module.measure_rates = lambda device, dtypes, quick=False: own(device, dtypes, True)
