"""A plugin of pytest: every model that timm's tests create is accelerated."""

import functools

import timm

import res2net_fused


def pytest_configure():
    """Before any test module imports the name."""
    create = timm.create_model

    @functools.wraps(create)
    def create_accelerated(*arguments, **keywords):
        return res2net_fused.accelerate(create(*arguments, **keywords))

    timm.create_model = timm.models.create_model = create_accelerated
