"""Mistakes of a user, each of which mypy must report where a comment says so (tests/integration/test_types.py); never run."""

import torch

import res2net_fused as rf
from res2net_fused.models.registry import create_model

x = torch.randn(1, 104, 56, 56)
weights = [torch.randn(26, 26, 3, 3) for _ in range(3)]

rf.accelerate("res2net50")  # mistake: type-var
rf.accelerate(torch.nn.Identity(), recompute="yes")  # mistake: arg-type
rf.hierarchical_conv2d(x, weights, None, 2)  # mistake: call-arg
rf.hierarchical_conv2d(x, weights, stride="2")  # mistake: arg-type
rf.hierarchical_conv1d(x, weights, None, padding="reflect")  # mistake: call-arg
rf.pack_weights(x[0])  # mistake: arg-type
rf.Bottle2neck(256, 64, scale="4")  # mistake: arg-type
print(rf.explain(torch.nn.Identity())[0].why)  # mistake: attr-defined
create_model(50)  # mistake: arg-type
create_model("resnet50").feature_channels.append(1)  # mistake: attr-defined
