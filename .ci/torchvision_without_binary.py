"""Lets torchvision be imported where its compiled operators do not load, because they were built for another torch.

torchvision then runs without them and says so where one is called, but it still registers shapes for two that nobody defined:
"operator torchvision::nms does not exist". This module watches for that step of its import and defines the two there. A
torchvision whose operators do load is left alone, so nothing needs undoing once one that fits is installed.

`fit_torchvision.py` puts a copy into an environment that needs it, to be imported whenever Python starts; importing it costs
nothing, since torch is imported by torchvision alone.
"""

import sys

REGISTERS = "torchvision._meta_registrations"  # imported behind torchvision's own attempt to load its operators
NAMES = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Watch:
    """A finder that finds nothing: it is asked just before the module REGISTERS is imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == REGISTERS:
            define()
        return None


def define():
    """Defines what is not there; torchvision's functions for them still refuse to run, in a sentence of their own."""
    import torch

    for name in NAMES:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", SCHEMA)


sys.meta_path.insert(0, Watch)
