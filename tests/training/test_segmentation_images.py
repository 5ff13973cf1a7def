# SPDX-License-Identifier: Apache-2.0
"""What segmentation does with images, classes and logits: its loss, crops, windows and colours."""

import numpy as np
import pytest
import torch

for package in ("timm", "torchvision", "yaml", "safetensors", "segmentation_models_pytorch", "torchmetrics"):
    pytest.importorskip(package, reason="needs the extra 'train'")

from torchvision import tv_tensors  # noqa: E402

from groupmamba.training import options  # noqa: E402
from groupmamba.training.dense import palette  # noqa: E402
from groupmamba.training.seeds import seeded  # noqa: E402
from groupmamba.training.segmentation import inference, transforms  # noqa: E402
from groupmamba.training.segmentation.command import SEGMENTER as COMMAND  # noqa: E402
from groupmamba.training.segmentation.dataset import IGNORE  # noqa: E402
from groupmamba.training.segmentation.task import PixelLoss, draw_classes  # noqa: E402


def test_the_loss_is_over_all_pixels_and_of_no_class_zero():
    torch.manual_seed(0)
    logits, classes = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randint(0, 4, (2, 8, 8))
    classes[0] = IGNORE
    loss = PixelLoss()(logits, logits, classes)
    expected = torch.nn.functional.cross_entropy(logits[1:], classes[1:]) / 2
    torch.testing.assert_close(loss, expected)
    nothing = PixelLoss()(logits, logits, torch.full_like(classes, IGNORE))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (31, 33), (500, 40), (64, 64)])
def test_crops_of_images_of_any_size(size):
    args = options.complete({"data": "", "img_size": 64, "short_side": 64}, command=COMMAND)
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (3, *size), dtype=np.uint8))
    classes = torch.from_numpy(generator.integers(-1, 3, size).astype(np.int32))
    transform = transforms.training_transform(args, (0.5, 0.5, 0.5))
    for seed in range(4):
        with seeded(seed):
            crop, labels = transform(tv_tensors.Image(pixels), tv_tensors.Mask(classes))
        assert crop.shape == (3, 64, 64) and crop.dtype == torch.uint8 and type(crop) is torch.Tensor
        assert labels.shape == (64, 64) and set(labels.unique().tolist()) <= {-1, 0, 1, 2}
    args.no_aug = True
    crop, labels = transforms.training_transform(args, (0.5, 0.5, 0.5))(
        tv_tensors.Image(pixels), tv_tensors.Mask(classes)
    )
    height, width = transforms.size_of(*size, 64)
    if height < 64:
        assert (labels[height:] == IGNORE).all() and (crop[:, height:] == 127).all()
    if width < 64:
        assert (labels[:, width:] == IGNORE).all()


def test_a_crop_that_one_class_fills_is_drawn_again():
    classes = torch.zeros(32, 320, dtype=torch.int32)
    classes[:, 300:] = 1  # crops of 32 hold it in the last columns alone
    shares = []
    for most in (1.0, 0.75):
        crop = transforms.VariedCrop(32, most, (0, 0, 0))
        found = 0
        for seed in range(40):
            with seeded(seed):
                found += bool(crop(tv_tensors.Mask(classes)).unique().numel() > 1)
        shares.append(found)
    assert shares[1] > 2 * shares[0] > 0


def test_images_and_classes_stay_together():
    """Pixels as bright as their class: what happens to the one has happened to the other."""
    args = options.complete({"data": "", "img_size": 64, "short_side": 64, "color_jitter": 0.0}, command=COMMAND)
    classes = torch.arange(4).repeat_interleave(30).view(1, -1).expand(100, 120).to(torch.int32)
    pixels = (classes * 80).to(torch.uint8).expand(3, -1, -1)
    transform = transforms.training_transform(args, (0, 0, 0))
    for seed in range(10):
        with seeded(seed):
            crop, labels = transform(tv_tensors.Image(pixels), tv_tensors.Mask(classes))
        known = labels != IGNORE
        near = (crop[0].float() - labels.clamp(min=0) * 80).abs() < 20
        assert near[known].float().mean() > 0.9


class Brightness(torch.nn.Module):
    """Logits of class 0 and 1 by each pixel alone, so that windows and scales change nothing."""

    def forward(self, images):
        return torch.stack([-images[:, 0], images[:, 0]], dim=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (37, 33), (70, 200), (32, 32)])
@pytest.mark.parametrize("stride", [None, 32, 21])
def test_windows_scales_and_mirror_images_agree(size, stride):
    image = torch.full((3, *size), 40, dtype=torch.uint8)
    image[:, :, size[1] // 2 :] = 220
    testing = inference.Testing(32, stride, 32, mean=(0.5,) * 3, std=(0.25,) * 3, batch=3)
    (single,) = inference.segment(Brightness(), [image], testing, None)
    several = testing._replace(scales=(0.5, 1.0, 1.75), flip=True)
    (multiple,) = inference.segment(Brightness(), [image], several, None)
    expected = image[0] > 128
    for found in (single, multiple):
        assert found.shape == size and found.dtype == torch.int64
        assert (found.bool() == expected).float().mean() >= 0.97
    both = inference.segment(Brightness(), [image, image.flip(2)], testing, None)
    assert torch.equal(both[0], single)


def test_every_pixel_is_in_a_window():
    for length in (32, 33, 50, 64, 65, 200):
        starts = inference._starts(length, 32, 21)
        assert starts[0] == 0 and starts[-1] == length - 32
        assert all(b - a <= 21 for a, b in zip(starts, starts[1:], strict=False))


def test_classes_at_a_size_are_those_of_all_logits_at_once():
    torch.manual_seed(0)
    logits = torch.randn(37, 9, 13)
    expected = torch.nn.functional.interpolate(logits[None], (40, 25), mode="bilinear")[0].argmax(0)
    assert torch.equal(inference.classes_at(logits, (40, 25)), expected)


def test_colours(tmp_path):
    colors = palette(150)
    assert len(set(colors)) == 150
    image, classes = torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int64)
    classes[:2], classes[3] = 1, IGNORE
    drawn = draw_classes(image, classes, 2)
    assert torch.equal(drawn[:, 3], image[:, 3])  # without a class
    for row, index in ((0, 1), (2, 0)):
        color = torch.tensor(colors[index]).float()
        torch.testing.assert_close(drawn[:, row, 0].float(), 0.6 * color + 0.4 * 100, atol=1.0, rtol=0)
