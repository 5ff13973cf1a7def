# SPDX-License-Identifier: Apache-2.0
"""Images for training: every draw follows from (seed, epoch, index), and what is wrong with folders has one line."""

import errno
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from support.training import PLAIN, command, losses, make_pictures, rows, train

pytest.importorskip("timm")

from timm.data import transforms

from groupmamba.training import checkpoint, options
from groupmamba.training.card import Card
from groupmamba.training.data import (
    Folder,
    Images,
    TrainingOrder,
    ValidationOrder,
    loader,
    training_transform,
    validation_transform,
)
from groupmamba.training.pixels import Normalize, Pixels, ToPixels
from groupmamba.training.seeds import seed_of, seeded


@pytest.fixture
def data(tmp_path):
    return make_pictures(tmp_path / "pictures")


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def batches(data, workers, epoch=0, start=0, seed=1, tries=0):
    args = options.complete({"data": str(data), "img_size": 32})
    folder = Folder(data / "train")
    images = Images(folder, training_transform(args, (0.5,) * 3, (0.5,) * 3), seed, tries, 32)
    order = TrainingOrder(len(folder), 4, 1, 0, 1, seed)
    order.begin(epoch, start)
    return list(loader(images, order, workers, pin=False))


def test_draws_do_not_depend_on_workers_nor_on_where_one_begins(data):
    alone, three, later = batches(data, 0), batches(data, 3), batches(data, 1, start=4)
    assert len(alone) == 10 and len(later) == 6
    for a, b in zip(alone, three, strict=True):
        assert (
            all(map(torch.equal, a.images, b.images))
            and torch.equal(a.indices, b.indices)
            and torch.equal(a.labels, b.labels)
        )
    for a, b in zip(alone[4:], later, strict=True):
        assert all(map(torch.equal, a.images, b.images))
    assert torch.cat([b.indices for b in alone]).unique().numel() == 40
    for other in (batches(data, 0, epoch=1), batches(data, 0, seed=2)):
        assert not torch.equal(torch.cat([b.indices for b in alone]), torch.cat([b.indices for b in other]))
        # One image is drawn otherwise in another epoch.
        index = alone[0].indices[0]
        (found,) = (b.images.values[b.indices == index] for b in other if (b.indices == index).any())
        assert not torch.equal(found[0], alone[0].images.values[0])


@pytest.mark.parametrize(
    "more", [{}, {"reprob": 1.0, "recount": 4}, {"remode": "rand"}, {"reprob": 0.0}, {"no_aug": True}]
)
def test_bytes_normalised_on_the_device_are_what_timm_gives(data, device, more):
    """Crop, policy, erasing: the same draws and the same numbers, bit for bit."""
    args = options.complete({"data": str(data), "img_size": 32, "reprob": 0.5, **more})
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = training_transform(args, mean, std)
    pictures = [Image.open(path).convert("RGB") for path, _ in Folder(data / "train").samples]
    expected, found = [], []
    for i, picture in enumerate(pictures):
        with seeded(1, i):
            expected.append(transform(picture))
        with seeded(1, i):
            found.append(ToPixels(transform)(picture))
    images = Normalize(mean, std, torch.device(device))(Pixels.stack(found).to(torch.device(device)))
    assert images.shape == (42, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.cpu(), torch.stack(expected))
    erased = sum(pixels.erased.numel() > 0 for pixels in found)
    assert erased == {0.0: 0, 1.0: 42}.get(args.reprob, erased) and (erased > 0) == (
        args.reprob > 0 and not args.no_aug
    )


def test_a_transform_that_ends_otherwise_is_refused():
    with pytest.raises(ValueError, match="must end in MaybeToTensor"):
        ToPixels(SimpleNamespace(transforms=[transforms.MaybeToTensor()]))


def test_seeding_leaves_the_generators_alone():
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with seeded(1, "image", 2, 3):
        drawn = random.random(), np.random.rand(), torch.rand(()).item()
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())
    with seeded(1, "image", 2, 3):
        assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert (
        len({seed_of(1, "image", 2, 3), seed_of(1, "image", 23), seed_of(12, "image", 3), seed_of(1, "x", 2, 3)}) == 4
    )


def test_processes_share_what_one_process_takes():
    one = TrainingOrder(103, 8, 1, 0, 1, 5)
    two = [TrainingOrder(103, 4, 1, rank, 2, 5) for rank in (0, 1)]
    pieces = TrainingOrder(103, 4, 2, 0, 1, 5)
    for order in (one, *two, pieces):
        order.begin(3)
    assert one.steps == two[0].steps == pieces.steps == 12
    for step, (a, b, c) in enumerate(zip(one, *two, strict=True)):
        assert a == b + c
        assert [index for _, index in a] == one.images_of(3, step) == two[1].images_of(3, step)
    assert [key for batch in one for key in batch] == [key for batch in pieces for key in batch]
    shares = [[key for batch in ValidationOrder(103, 8, rank, 4) for key in batch] for rank in range(4)]
    assert sorted(index for share in shares for _, index in share) == list(range(103))
    assert [len(ValidationOrder(103, 8, rank, 4)) for rank in range(4)] == [4, 4, 4, 4]


def test_the_released_crop_in_validation(data):
    transform = validation_transform(224, Card("groupmamba_tiny", 3))
    text = repr(transform)
    assert "Resize(size=256, interpolation=bicubic" in text and "CenterCrop(size=(224, 224))" in text


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "augmix-m10", "original", "v0"])
def test_the_strongest_posterization_is_an_image(data, policy):
    """Pillow 13 raises for 0 bits, where it gave a black image before."""
    args = options.complete({"data": str(data), "img_size": 32, "aa": policy})
    transform = training_transform(args, (0.5,) * 3, (0.5,) * 3)
    found = 0
    for part in transform.transforms:
        operations = [*getattr(part, "ops", ()), *(op for sub in getattr(part, "policy", ()) for op in sub)]
        for operation in operations:
            if "Posterize" in operation.name:
                found += 1
                picture = Image.new("RGB", (8, 8), (255, 131, 7))
                assert operation.aug_fn(picture, 0).getpixel((0, 0)) == (0, 0, 0)
                assert operation.aug_fn(picture, 1).getpixel((0, 0)) == (128, 128, 0)
                assert operation.aug_fn(picture, 8) is picture
    assert found > 0
    picture = Image.new("RGB", (40, 40), (255, 131, 7))
    for seed in range(300):
        with seeded(seed):
            assert transform(picture).shape == (3, 32, 32)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def test_corrupt_images_are_counted_named_and_skipped(data, tmp_path, capsys):
    first, second = data / "train" / "blue" / "3.png", data / "train" / "red" / "7.png"
    spoil(first)
    second.write_text("no picture")
    third = data / "validation" / "green" / "0.png"
    spoil(third)
    runs = []
    for workers in ("0", "2"):
        runs.append(tmp_path / workers)
        assert train(data, runs[-1], "--epochs", "2", "-j", workers) == 0
        said = lines_of(capsys)
        for path in (first, second, third):
            assert sum(f"skipped {path}, which can't be read" in line for line in said) == 1, said
        assert rows(runs[-1] / "summary.csv")[-1]["bad_images"] == "2"  # in training
    assert losses(runs[0]) == losses(runs[1])
    assert train(data, tmp_path / "few", "--epochs", "2", "--max-bad-images", "1") == 1
    last = lines_of(capsys)[-1]
    assert "more than --max-bad-images 1" in last and (str(first) in last or str(second) in last)
    argv = ["validate", str(data), "--weights", str(runs[0] / "last.safetensors"), "--device", "cpu", "-j", "0"]
    assert command(*argv) == 0
    assert "1 images could not be read and do not count" in capsys.readouterr().out
    found = batches(data, 0, tries=5)
    assert all((batch.labels >= 0).all() and len(batch.images.values) == 4 for batch in found)
    assert sum(len(batch.bad) for batch in found) in (1, 2, 3)


def test_nothing_that_can_be_read(data, tmp_path, capsys):
    for path in (data / "train").glob("*/*.png"):
        path.write_text("no picture")
    assert train(data, tmp_path / "run", "--epochs", "1") == 1
    assert "no image of" in lines_of(capsys)[-1]


def test_nothing_that_can_be_read_in_validation(data, tmp_path, capsys):
    assert train(data, tmp_path / "other", "--epochs", "1") == 0
    pictures = {path: path.read_bytes() for path in (data / "validation").glob("*/*.png")}
    for path in pictures:
        path.write_text("no picture")
    argv = ["validate", str(data), "--weights", str(tmp_path / "other"), "--device", "cpu", "-j", "0"]
    for status in (train(data, tmp_path / "run", "--epochs", "1"), command(*argv)):
        assert status == 1
    assert sum(f"no image of {data / 'validation'} can be read" in line for line in lines_of(capsys)) == 2
    for path, content in pictures.items():
        path.write_bytes(content)
    assert train(data, tmp_path / "run", "--epochs", "1") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


def test_images_are_of_all_formats_that_torchvision_lists(data):
    """None is left out in silence because of its name; what is no image is."""
    before = Folder(data / "train")
    for name, suffixes in (("blue", (".webp", ".BMP", ".tiff")), ("red", (".JPEG",))):
        picture = Image.open(data / "train" / name / "0.png")
        for suffix in suffixes:
            picture.save(data / "train" / name / f"more{suffix}")
    (data / "train" / "blue" / "readme.txt").write_text("no image")
    found = Folder(data / "train")
    assert found.classes == before.classes and len(found) == len(before) + 4
    assert {Path(path).suffix for path, _ in found.samples} == {".png", ".webp", ".BMP", ".tiff", ".JPEG"}


def test_a_text_is_said_to_be_one(data, tmp_path, capsys):
    """Each file once, by its path and the reason, without what Pillow calls it."""
    path = data / "train" / "red" / "7.png"
    path.write_text("no picture")
    assert train(data, tmp_path / "run", "--epochs", "1") == 0
    (line,) = (line for line in lines_of(capsys) if "skipped" in line)
    assert line == f"skipped {path}, which can't be read (no image in a format that Pillow knows); 1 so far"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: shutil.rmtree(data / "train"), ("train is no folder",)),
        (lambda data: shutil.rmtree(data / "validation"), ("neither validation nor val",)),
        (lambda data: (data / "train" / "cyan").mkdir(), ("cyan holds no image: an empty class",)),
        (lambda data: shutil.rmtree(data / "validation" / "red"), ("validation", "lacks red")),
        (lambda data: (data / "validation" / "red").rename(data / "validation" / "rot"), ("lacks red and has rot",)),
        (lambda data: shutil.copy(data / "train" / "red" / "0.png", data / "train"), ("0.png is in no folder",)),
        (lambda data: [shutil.rmtree(data / "train" / c) for c in ("red", "green")], ("one class, blue",)),
        (lambda data: [p.unlink() for p in data.glob("train/*/*")], ("train has no images",)),
    ],
)
def test_wrong_folders_are_one_line_before_anything_is_written(data, tmp_path, capsys, change, words):
    change(data)
    assert train(data, tmp_path / "run") == 1
    lines = lines_of(capsys)
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "run").exists()


def test_val_will_do(data, tmp_path):
    (data / "validation").rename(data / "val")
    assert train(data, tmp_path / "run", "--epochs", "1") == 0


def test_a_folder_that_vanishes(data, tmp_path, capsys, monkeypatch):
    from groupmamba.training import step

    original = step.Step.body

    def body(self, pieces):
        shutil.rmtree(data / "train", ignore_errors=True)
        return original(self, pieces)

    monkeypatch.setattr(step.Step, "body", body)
    assert train(data, tmp_path / "run", "--epochs", "1") == 1
    assert lines_of(capsys)[-1] == f"groupmamba train: {data / 'train'} has vanished"


def test_a_small_folder_makes_a_smaller_batch(data, tmp_path, capsys):
    argv = ["train", str(data), "--output", str(tmp_path / "run"), "--model", "test_resnet", "--device", "cpu"]
    assert command(*argv, "--img-size", "32", "-j", "0", "--epochs", "1", "--drop-path", "0") == 0
    assert "--batch-size 42 in place of the default: there are 42 training images" in lines_of(capsys)
    assert len(losses(tmp_path / "run")) == 1


def test_a_full_disk_is_one_line_and_spoils_nothing(data, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "2", *PLAIN) == 0
    expected = losses(run)
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    held = sorted((run / "checkpoints").iterdir())
    real = os.fsync

    def full(descriptor):
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    assert train(data, run, "--epochs", "2", *PLAIN) == 1
    last = lines_of(capsys)[-1]
    assert last.startswith("groupmamba train: ") and "No space left on device" in last and ".safetensors" in last
    assert sorted((run / "checkpoints").iterdir()) == held
    monkeypatch.undo()
    assert train(data, run, "--epochs", "2", *PLAIN) == 0
    assert losses(run) == expected
    space = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: space)
    capsys.readouterr()
    assert train(data, tmp_path / "other", "--epochs", "2", *PLAIN) == 1
    assert len(lines := lines_of(capsys)) == 1 and "MiB left on its disk" in lines[0]


def test_bytes_that_are_not_read_back_are_no_checkpoint(data, tmp_path, capsys, monkeypatch):
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: real(self)[:-1] if self.name == "state.pt" else real(self))
    assert train(data, tmp_path / "run", "--epochs", "1", *PLAIN) == 1
    assert "is not read back as it was written" in lines_of(capsys)[-1]
    assert not any((tmp_path / "run").glob("checkpoints/*"))
