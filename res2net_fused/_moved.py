"""Where version 0.1.0's first layout kept what pickles name, so that models saved then still load.

A pickle names a class by its module. The old modules stand in `sys.modules` as names that look their content up where it is
now; nothing of the package uses them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

# Old module -> the modules in which its classes and functions are now.
MOVED = {
    "accelerate": ("patching.class_swap", "patching.accelerate"),
    "bottle2neck": ("modules.bottle2neck",),
    "chain1d": ("chain.config", "chain.problem"),
    "explain": ("patching.explain",),
    "folding": ("modules.weight_cache", "modules.folding", "chain.block_weights"),
    "fused_block": ("modules.fused_forward", "modules.block_state"),
    "fused_block1d": ("modules.fused_forward1d",),
    "layouts": ("modules.block_parts",),
    "packing": ("ops.packed_weights",),
    "reference": ("modules.reference_blocks", "chain.reference"),
    "training": ("chain.batch_norm",),
}
RENAMED = {"BlockLayout": "BlockPaths", "FoldedBlock": "BlockWeights"}


class _OldModule(ModuleType):
    """Finds a name in the modules that hold it now."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # which many a tool asks every module for
            raise AttributeError(name)
        package, _, old = self.__name__.partition(".")
        for module in MOVED[old]:
            found = getattr(importlib.import_module(f"{package}.{module}"), RENAMED.get(name, name), None)
            if found is not None:
                return found
        raise ImportError(  # pickle hides the words of an AttributeError
            f"{self.__name__}.{name} is nowhere in this version of {package}: if a saved model names it, load the model with "
            "the version that saved it, save its state_dict(), and load that into a model made by this one"
        )


def install() -> None:
    """Put the old names into `sys.modules`; they are not attributes of the package, where functions have some of them."""
    package = __name__.rpartition(".")[0]
    for old in MOVED:
        sys.modules.setdefault(f"{package}.{old}", _OldModule(f"{package}.{old}"))
