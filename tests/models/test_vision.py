# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN and UPerNet on GroupMamba backbones: a training step and inference."""

import pytest
import torch

for _module in ("timm", "torchvision", "segmentation_models_pytorch"):
    pytest.importorskip(_module, reason="needs the extra 'vision'")

import segmentation_models_pytorch  # noqa: E402
import timm  # noqa: E402
from timm.models import adapt_input_conv  # noqa: E402

from groupmamba import vision  # noqa: E402
from groupmamba.models import groupmamba_tiny  # noqa: E402
from support.models import SMALL, small  # noqa: E402


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


@pytest.mark.parametrize("options", [{"variant": "paper"}, {"variant": "fused", "scan": "cross"}, {"d_state": 2}])
def test_options_of_the_backbone(options):
    options = {**SMALL, **options}
    expected = timm.create_model("groupmamba_tiny", features_only=True, **options).state_dict().keys()
    detector = vision.mask_rcnn(num_classes=3, backbone_options=options)
    segmenter = vision.upernet(num_classes=3, decoder_channels=16, backbone_options=options)
    for body in (
        detector.backbone.body,
        segmenter.encoder.model,
        vision.PyramidBackbone("groupmamba_tiny", **options).body,
    ):
        assert body.state_dict().keys() == expected
    x = torch.randn(2, 3, 64, 64)
    segmenter.train()(x).square().sum().backward()
    _all_have_gradients(segmenter)


@pytest.fixture(scope="module")
def quick_weights(tmp_path_factory):
    torch.manual_seed(3)
    state = {k: torch.rand_like(v) / 8 if v.is_floating_point() else v for k, v in small().state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "quick.pth"
    torch.save(state, path)
    return path, state


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_upernet_weights_fit_any_channels_and_depth(quick_weights, tmp_path, channels, depth):
    path, state = quick_weights
    options = {"in_channels": channels, "encoder_depth": depth, "decoder_channels": 16, "num_classes": 2}
    model = vision.upernet(weights=path, backbone_options=SMALL, **options)
    body = model.encoder.model.model
    assert len(body.stages) == depth - 1
    expected = {**state, "stem.conv.0.weight": adapt_input_conv(channels, state["stem.conv.0.weight"])}
    assert all(torch.equal(value, expected[name]) for name, value in body.state_dict().items())
    x = torch.randn(2, channels, 64, 64)
    model.train()(x).square().sum().backward()
    _all_have_gradients(model)
    model.eval().save_pretrained(tmp_path)  # needs no other file to load again
    assert "quick.pth" not in (tmp_path / "config.json").read_text()
    again = segmentation_models_pytorch.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("depth", [0, 1, 2, 6])
def test_upernet_depths(depth):
    with pytest.raises(ValueError, match=f"encoder_depth must be 3, 4 or 5, got {depth}"):
        vision.upernet(encoder_depth=depth, backbone_options=SMALL)


def test_other_segmenters_of_the_library(quick_weights):
    smp = segmentation_models_pytorch
    for depth in (2, 3, 4, 5):
        options = {"encoder_depth": depth, "decoder_channels": (16,) * depth}
        model = smp.Unet("tu-groupmamba_tiny", encoder_weights=None, **options, **SMALL)
        model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
        _all_have_gradients(model)
    with pytest.raises(ValueError, match="output_stride must be 32, .* got 8"):
        smp.DeepLabV3("tu-groupmamba_tiny", encoder_weights=None)
    with pytest.raises(ValueError, match=r"out_indices must .* got \(\)"):
        smp.Unet("tu-groupmamba_tiny", encoder_weights=None, encoder_depth=1, decoder_channels=(16,))


def test_backbones_out_of_whole_models(quick_weights, tmp_path):
    """A detector's or segmenter's file fills a backbone, and a warning says what of it is left out."""
    weights, state = quick_weights
    for model, left_out in (
        (
            vision.mask_rcnn(weights=weights, backbone_options=SMALL, num_classes=3),
            "backbone.fpn., backbone.norms., rpn., roi_heads.",
        ),
        (vision.upernet(weights=weights, backbone_options=SMALL, decoder_channels=16), "decoder., segmentation_head."),
    ):
        torch.save({"model": model.state_dict()}, tmp_path / "whole.pth")
        with pytest.warns(UserWarning, match=f"Only the backbone of the checkpoint is loaded, without {left_out}"):
            backbone = timm.create_model("groupmamba_tiny", features_only=True, weights=tmp_path / "whole.pth", **SMALL)
        assert all(torch.equal(value, state[name]) for name, value in backbone.model.state_dict().items())
        with pytest.raises(RuntimeError, match="Missing keys: class_block"), pytest.warns(UserWarning):
            timm.create_model("groupmamba_tiny", weights=tmp_path / "whole.pth", **SMALL)


@pytest.mark.parametrize("build", [vision.mask_rcnn, vision.upernet])
def test_unknown_backbones_are_named(build):
    with pytest.raises(ValueError, match="model must be one of 'groupmamba_base'.* got 'GroupMamba'"):
        build("GroupMamba")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet10t"])
def test_backbones_of_timm(name):
    """For comparisons by the same code: maps at strides 4 to 32, each normalised, of any size."""
    model = vision.mask_rcnn(name, num_classes=3, min_size=72, max_size=110).train()
    assert [type(norm).__name__ for norm in model.backbone.norms] == ["LayerNorm2d"] * 4
    maps = model.backbone(torch.rand(1, 3, 96, 160))
    assert [tuple(feature.shape[2:]) for feature in maps.values()] == [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    with pytest.raises(
        ValueError, match=r"model must have maps at strides 4, 8, 16 and 32, got 'vit_tiny_patch16_224'"
    ):
        vision.PyramidBackbone("vit_tiny_patch16_224")


def test_detectors_without_masks():
    torch.manual_seed(0)
    model = vision.faster_rcnn(num_classes=3, min_size=64, max_size=96, backbone_options=SMALL).train()
    target = {"boxes": torch.tensor([[5.0, 4, 40, 30]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 50, 60)], [target])
    assert "loss_mask" not in losses
    sum(losses.values()).backward()
    _all_have_gradients(model)


@pytest.mark.parametrize("build", [vision.mask_rcnn, vision.faster_rcnn])
def test_arguments_that_torchvision_would_leave_unused(build):
    with pytest.raises(TypeError, match="has no argument 'box_score_treshold', got 0.1"):
        build(num_classes=2, box_score_treshold=0.1)


@pytest.mark.parametrize("build", [vision.mask_rcnn, vision.faster_rcnn])
def test_arguments_with_which_torchvision_would_fail_in_use(build):
    for options, words in (
        ({"box_nms_thresh": "0.5"}, "box_nms_thresh must be a number, got '0.5'"),
        ({"rpn_pre_nms_top_n_train": (50,)}, r"rpn_pre_nms_top_n_train must be a number, got \(50,\)"),
        ({"box_head": 64}, "box_head must be a module, got 64"),
    ):
        with pytest.raises(TypeError, match=words):
            build(num_classes=2, **options)


def test_batches_of_a_detector_are_channels_last_and_padded_with_zeros():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    model = vision.faster_rcnn(num_classes=2, min_size=64, max_size=96, backbone_options=SMALL)
    images = [torch.rand(3, 50, 60), torch.rand(3, 90, 40), torch.rand(3, 1, 300)]
    batch, _ = model.eval().transform(images)
    plain = GeneralizedRCNNTransform(64, 96, model.transform.image_mean, model.transform.image_std).eval()
    expected, _ = plain(images[:2])
    assert batch.tensors.is_contiguous(memory_format=torch.channels_last)
    assert batch.image_sizes == [*expected.image_sizes, (1, 96)]
    height, width = expected.tensors.shape[2:]
    assert torch.equal(batch.tensors[:2, :, :height, :width], expected.tensors)
    assert not batch.tensors[2, :, 1:].any()
