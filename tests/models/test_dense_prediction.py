"""Dilated backbones below torchvision's heads for detection and segmentation: one training step as plain PyTorch makes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from decisions import deciding_alike, differences, recorded
from helpers import relative_error
from networks import tiny_pair
from torch import nn

from res2net_fused import explain
from res2net_fused.chain.tolerances import network_bound

IMAGES = torch.randn(2, 3, 49, 66, generator=torch.Generator().manual_seed(4))
CLASSES = 5
SHAPE = {"layers": (1, 1, 2, 1), "planes": (16, 16, 16, 32)}


@pytest.fixture(autouse=True)
def torchvision():
    return pytest.importorskip("torchvision")


class Detector(nn.Module):
    """A feature pyramid and RetinaNet's head over all stages."""

    def __init__(self, backbone):
        super().__init__()
        from torchvision.models.detection.retinanet import RetinaNetHead
        from torchvision.ops import FeaturePyramidNetwork

        self.backbone = backbone
        self.pyramid = FeaturePyramidNetwork(list(backbone.feature_channels), 16)
        self.head = RetinaNetHead(16, num_anchors=1, num_classes=CLASSES)

    def forward(self, images):
        features = {str(i): f for i, f in enumerate(self.backbone(images))}
        return self.head(list(self.pyramid(features).values()))

    def loss(self, images):
        out = self(images)
        generator = torch.Generator().manual_seed(6)
        scores, boxes = out["cls_logits"], out["bbox_regression"]
        labels = torch.randint(0, 2, scores.shape, generator=generator).to(scores)
        offsets = torch.randn(boxes.shape, generator=generator, dtype=torch.float64).to(boxes)
        return F.binary_cross_entropy_with_logits(scores, labels) + F.smooth_l1_loss(boxes, offsets)


class Segmenter(nn.Module):
    """DeepLabV3's head on the last stage, enlarged to the image."""

    def __init__(self, backbone):
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        self.backbone = backbone
        self.head = DeepLabHead(backbone.feature_channels[-1], CLASSES, atrous_rates=(2, 3, 4))
        self.head[0].project[-1].p = 0.0  # dropout would draw differently in other dtypes

    def forward(self, images):
        out = self.head(self.backbone(images)[-1])
        return F.interpolate(out, images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, images):
        out = self(images)
        labels = torch.randint(0, CLASSES, (out.shape[0], *out.shape[2:]), generator=torch.Generator().manual_seed(6))
        return F.cross_entropy(out, labels)


MODELS = {"detector": Detector, "segmenter": Segmenter}


def models(kind, name, output_stride, dtype):
    """Plain PyTorch's and the accelerated one, of the same weights, in training mode."""
    plain, fused = tiny_pair(name, dtype, **SHAPE, output_stride=output_stride, features_only=True)
    torch.manual_seed(5)
    plain = MODELS[kind](plain).to(dtype)
    model = copy.deepcopy(plain)
    model.backbone = fused
    return plain.train(), model.train()


def step(model, images):
    """The loss of one step of SGD; gradients stay."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    loss = model.loss(images)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("frozen_norms", [False, True], ids=["", "frozen norms"])
@pytest.mark.parametrize(
    ("name", "output_stride"), [("res2net50_v1b", 8), ("res2net50_26w_4s", 16), ("se_res2net50", 32), ("res2next50", 8)]
)
@pytest.mark.parametrize("kind", MODELS)
def test_one_step_in_float64(kind, name, output_stride, frozen_norms):
    plain, fused = models(kind, name, output_stride, torch.float64)
    for model in (plain, fused):
        if frozen_norms:  # as detectors are fine-tuned
            model.backbone.eval()
        model.backbone.conv1.requires_grad_(False)
    images = IMAGES.double()
    assert relative_error(step(fused, images), step(plain, images)) < 1e-12
    assert all(report.fused for report in explain(fused)) and len(explain(fused)) == 5
    assert fused.backbone.feature_strides[-1] == output_stride
    for (key, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), key
        if ours.grad is not None and theirs.grad.norm() > 1e-12:  # convolutions before a norm leave their bias none
            assert relative_error(ours.grad, theirs.grad) < 1e-8, key
            assert relative_error(ours, theirs) < 1e-9, key
    for (key, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert relative_error(ours, theirs) < 1e-10, key


def gradients(model):
    return torch.cat([p.grad.double().flatten() for p in model.backbone.parameters()])


@pytest.mark.parametrize("frozen_norms", [False, True], ids=["", "frozen norms"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_step_in_float32_is_as_near_to_float64_as_plain_pytorch(kind, frozen_norms):
    """Against float64 with the decisions of the tested path: one that rounding turns was seen to move a gradient by 3e-2."""
    plain, fused = models(kind, "res2net50_v1b", 8, torch.float32)
    start, images = copy.deepcopy(plain), IMAGES.contiguous(memory_format=torch.channels_last)
    errors, decided = [], []
    for model in (plain, fused, start):
        if frozen_norms:
            model.backbone.eval()
        if kind == "segmenter":
            # The norm of two images' means gives +-1 whatever they are: the gradient is rounding, 1e-4 to 1e-2 of the others.
            model.head[0].convs[-1][2].eval()
    for model in (plain, fused):
        with recorded(model) as decisions:
            step(model.to(memory_format=torch.channels_last), images)
        exact = deciding_alike(start, decisions)
        step(exact, images.double())
        errors.append(relative_error(gradients(model), gradients(exact)))
        decided.append(decisions)
    assert all(report.fused for report in explain(fused))
    assert errors[1] <= network_bound(errors[0])
    assert differences(*decided) < 10  # of half a million


def test_float64_with_the_decisions_of_a_pass_is_that_pass():
    """And with one decision turned it is not, so that the test above would see a difference as small as that."""
    plain, fused = models("detector", "res2net50_v1b", 8, torch.float64)
    with recorded(fused) as decisions:
        fused.loss(IMAGES.double()).backward()
    own = gradients(fused)
    alike = deciding_alike(plain, decisions)
    alike.loss(IMAGES.double()).backward()
    assert relative_error(gradients(alike), own) < 1e-9
    decisions["backbone.layer4.0.relu"][1][0, 3, 2, 4].logical_not_()
    turned = deciding_alike(plain, decisions)
    turned.loss(IMAGES.double()).backward()
    assert relative_error(gradients(turned), own) > 1e-4
