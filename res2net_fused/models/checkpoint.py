"""Weights from published files: the official implementation's, timm's and torchvision's, into any model with their keys.

Nothing of a file is executed: safetensors holds tensors only, and pickled files are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..patching.accelerate import Model

_NESTS = ("state_dict", "model", "model_state", "model_state_dict")  # where training scripts keep a model's state_dict
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_CLASSIFIER = "fc."


def load_checkpoint(model: Model, path: str | os.PathLike[str]) -> Model:
    """Loads a checkpoint's weights into `model`, in place, and returns it.

    path: a file of safetensors (named so), or one that `torch.save` wrote, with a state_dict in it: at the top, or under
    "state_dict" or "model" beside what else a training script keeps. Keys may have the prefix of DataParallel or torch.compile.
    ResNet's and DLA's own keys fit this package's baselines, and the shortcuts of the official DLA that nothing calls are left
    out. A model without a classifier takes files that have one. Weights take the model's dtype and device.

    Raises RuntimeError that lists every missing, unexpected and mis-shaped key, in which case nothing is loaded, or where the
    file is damaged, or holds no state_dict, or more than tensors and plain values; OSError where it cannot be read.
    """
    path = Path(path)
    own = model.state_dict()
    state = _fitted(_state_dict(path), own)
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]  # which old files lack
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(tensor.shape)}, the model has {tuple(own[key].shape)}"
        for key, tensor in state.items()
        if key in own and tensor.shape != own[key].shape
    ]
    parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(parts.values()):
        lists = (f"\n  {len(keys)} {what}:" + "".join(f"\n    {key}" for key in keys) for what, keys in parts.items() if keys)
        raise RuntimeError(f"{path} does not fit the {type(model).__name__}:" + "".join(lists))
    model.load_state_dict(state, strict=False)  # all but num_batches_tracked is known to be there
    return model


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The state_dict of the file, without the nesting and the prefixes that training scripts add."""
    found: Any = _read(path)
    for _ in _NESTS:  # no script nests deeper, and a hostile file can hold itself
        nest = next((name for name in _NESTS if isinstance(found, dict) and isinstance(found.get(name), dict)), None)
        if nest is None:
            break
        found = found[nest]
    if not isinstance(found, dict) or not found:
        raise RuntimeError(f"{path} holds no state_dict, but a {type(found).__name__}")
    others = [key for key, value in found.items() if not isinstance(key, str) or not _is_plain(value)]
    if others:
        named = ", ".join(map(repr, others[:5]))
        raise RuntimeError(f"{path} holds no state_dict: {named} are no dense tensors of real numbers")
    while True:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in found)), None)
        if prefix is None:
            return dict(found)
        found = {key[len(prefix) :]: tensor for key, tensor in found.items()}


def _is_plain(value: object) -> bool:
    """Whether a parameter can be copied from it; what cannot would be noticed after others were overwritten."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_nested or value.is_quantized or value.is_complex())


def _read(path: Path) -> object:
    reader = _safetensors(path) if path.suffix == ".safetensors" else _pickled
    path.open("rb").close()  # its OSError names the file, which the readers' do not all
    try:
        return reader(path)
    except pickle.UnpicklingError as error:
        problem = "holds more than tensors and plain values, or is no file of torch.save"
        raise RuntimeError(f"{path} {problem} ({error!r:.200}); get it anew, or save its state_dict alone") from error
    except Exception as error:  # of many types: damaged bytes may lead anywhere
        raise RuntimeError(f"{path} is damaged or of another format ({error!r:.200}); get it anew") from error


def _pickled(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors(path: Path) -> Callable[[Path], object]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors ({error}): pip install safetensors") from error
    return load_file


def _fitted(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """The state_dict under the model's keys, as far as published formats are known to differ from them."""
    own = frozenset(own)
    fitted = {}
    for key, tensor in state.items():
        if key not in own:
            # With s = 1 our only 3x3 convolution is a list of one; ResNet's and DLA's blocks call it conv2.
            renamed = re.sub(r"\.(conv|bn)2\.", r".\g<1>s.0.", key)
            key = renamed if renamed in own else key
        tree = re.match(r"(.*)\.project\.", key)
        if key not in own and tree is not None and any(k.startswith(f"{tree[1]}.tree1.tree1.") for k in own):
            continue  # official DLA: trees of trees have a projection that they do not call
        if key.startswith(_CLASSIFIER) and not any(k.startswith(_CLASSIFIER) for k in own):
            continue
        fitted[key] = tensor
    return fitted
