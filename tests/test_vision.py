# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN and UPerNet on GroupMamba backbones: a training step and inference."""

import pytest
import torch

for _module in ("timm", "torchvision", "segmentation_models_pytorch"):
    pytest.importorskip(_module, reason="needs the extra 'vision'")

from groupmamba import vision  # noqa: E402
from groupmamba.models import groupmamba_tiny  # noqa: E402


def _sizes(device):
    return ((64, 96), (64, 64)) if device == "cpu" else ((800, 1333), (512, 512))


def _all_have_gradients(model):
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing


def test_mask_rcnn(device):
    (height, width), _ = _sizes(device)
    torch.manual_seed(0)
    model = vision.mask_rcnn(num_classes=5, min_size=height, max_size=width).to(device).train()
    images = [torch.rand(3, height, width, device=device), torch.rand(3, height - 9, width - 20, device=device)]
    targets = []
    for image in images:
        h, w = image.shape[1:]
        mask = torch.zeros(2, h, w, dtype=torch.uint8, device=device)
        mask[0, 4:40, 5:60], mask[1, 20:60, 10:50] = 1, 1
        boxes = torch.tensor([[5.0, 4, 60, 40], [10, 20, 50, 60]], device=device)
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3], device=device), "masks": mask})
    losses = model(images, targets)
    assert set(losses) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
    }  # fmt: skip
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    _all_have_gradients(model)
    with torch.no_grad():
        found = model.eval()(images)
    assert all(set(d) == {"boxes", "labels", "scores", "masks"} for d in found)


def test_upernet(device):
    _, size = _sizes(device)
    torch.manual_seed(0)
    model = vision.upernet(num_classes=7, decoder_channels=32 if device == "cpu" else 512).to(device).train()
    x = torch.randn(2, 3, *size, device=device)
    labels = torch.randint(0, 7, (2, *size), device=device)
    logits = model(x)
    assert logits.shape == (2, 7, *size)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    _all_have_gradients(model)


def test_backbone_weights(tmp_path):
    path = tmp_path / "tiny.pth"
    source = groupmamba_tiny()
    torch.save(source.state_dict(), path)
    expected = source.stages[2].blocks[4].mlp.fc1.weight
    detector = vision.mask_rcnn(weights=path)
    segmenter = vision.upernet(weights=path, decoder_channels=16)
    assert torch.equal(detector.backbone.body.model.stages[2].blocks[4].mlp.fc1.weight, expected)
    assert torch.equal(segmenter.encoder.model.model.stages[2].blocks[4].mlp.fc1.weight, expected)


@pytest.mark.parametrize("build", [vision.mask_rcnn, vision.upernet])
def test_unknown_backbones_are_named(build):
    with pytest.raises(ValueError, match="model must be one of 'groupmamba_base'.* got 'GroupMamba'"):
        build("GroupMamba")
