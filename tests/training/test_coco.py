# SPDX-License-Identifier: Apache-2.0
"""Images and annotations in COCO's format: what is read of them, and what of them is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from support.dense import annotation, change_annotations, detector, make_coco, objects

for package in ("timm", "torchvision", "yaml", "safetensors", "pycocotools", "torchmetrics"):
    pytest.importorskip(package, reason="needs the extra 'train'")


from groupmamba.training.detection.annotations import read_annotations, run_lengths  # noqa: E402
from groupmamba_ext._command import CommandError  # noqa: E402

BROKEN = {
    "unknown image": (lambda a: a.update(image_id=99), "image_id 99 is none of the file's"),
    "unknown category": (lambda a: a.update(category_id=5), "category_id 5 is none of the file's"),
    "no box": (lambda a: a.pop("bbox"), "bbox must be [x, y, width, height], finite, got None"),
    "three numbers": (lambda a: a.update(bbox=[1, 2, 3]), "got [1, 2, 3]"),
    "negative width": (lambda a: a.update(bbox=[1, 2, -3, 4]), "got [1, 2, -3, 4]"),
    "text": (lambda a: a.update(bbox=[1, 2, "3", 4]), "bbox must be"),
    "nan": (lambda a: a.update(bbox=[1, 2, float("nan"), 4]), "bbox must be"),
    "two points": (lambda a: a.update(segmentation=[[1, 1, 5, 5]]), "three points [x, y, ...] at least"),
    "odd polygon": (lambda a: a.update(segmentation=[[1, 1, 5, 5, 6, 6, 7]]), "three points"),
    "nested polygon": (lambda a: a.update(segmentation=[[[1, 1], [5, 5], [9, 1]] * 2]), "three points"),
    "flat polygon": (lambda a: a.update(segmentation=[1, 1, 5, 5, 6, 6]), "three points"),
    "no counts": (lambda a: a.update(segmentation={"size": [48, 64]}), "polygons or a run-length code"),
    "other size": (lambda a: a["segmentation"].update(size=[10, 10]), "has the size [10, 10], and the image [48, 64]"),
    "short counts": (lambda a: a["segmentation"].update(counts=[5]), "must add up to 48 x 64"),
    "no code": (lambda a: a["segmentation"].update(counts="nonsense"), "no code of run lengths, got 'nonsense'"),
    "short code": (lambda a: a["segmentation"].update(counts="5"), "must add up to 48 x 64"),
    "negative counts": (lambda a: a["segmentation"].update(counts=[-1, 48 * 64 + 1]), "must add up to 48 x 64"),
    "no mask": (lambda a: a.pop("segmentation"), "has no segmentation, and others have; --no-masks"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_annotation_names_its_file_and_id(what, tmp_path, capsys):
    change, words = BROKEN[what]
    data = make_coco(tmp_path / "coco", train=2, val=1)
    file = change_annotations(data, lambda content: change(content["annotations"][0]))
    capsys.readouterr()
    assert detector(data, tmp_path / "run", "--epochs", "1") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"groupmamba train-detector: {file}: annotation 100"), lines
    assert words in lines[0] and not (tmp_path / "run").exists()


def higher(content):
    content["images"][1]["height"] = 65
    for entry in content["annotations"]:
        entry["segmentation"] = [[1, 1, 5, 1, 5, 5]]


def test_what_only_its_image_shows_ends_the_run_too(tmp_path, capsys):
    data = make_coco(tmp_path / "coco", train=2, val=1)
    file = change_annotations(data, higher)
    assert detector(data, tmp_path / "run", "--epochs", "1", "-j", "1") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"groupmamba train-detector: {file}: image 11 has 40 x 65 pixels") and "40 x 64" in line


def test_run_lengths_are_those_of_pycocotools():
    from pycocotools import mask as codes

    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(1, 90, 2)
        mask = (rng.random((height, width)) < rng.random() ** 3).astype(np.uint8)
        found = run_lengths(codes.encode(np.asfortranarray(mask))["counts"].decode())
        values = np.repeat(np.arange(len(found)) % 2, found)
        assert min(found) >= 0 and np.array_equal(values, mask.T.ravel())
    for code in ("", " ", "nonsense", "P", "\u00e9", "PPPPPPPPP0"):
        assert run_lengths(code) is None, code


def test_objects_outside_their_image_are_left_out(tmp_path):
    data = make_coco(tmp_path / "coco", train=1, val=1, sizes=((48, 64),))
    said = []

    def change(content):
        first = content["annotations"][0]
        content["annotations"] = [
            {**first, "id": 1},
            {**first, "id": 2, "bbox": [64, 10, 5, 5]},
            {**first, "id": 3, "bbox": [-9, 10, 5, 5]},
            {**first, "id": 4, "segmentation": [[70, 1, 80, 1, 80, 9]]},
            {
                **first,
                "id": 5,
                "bbox": [60, 40, 50, 50],
                "segmentation": [[60, 40, 90, 40, 90, 90], [99, 9, 98, 9, 97, 9]],
            },
            {**first, "id": 6, "bbox": [0, 48, 5, 5], "segmentation": [[60, 40, 90, 40, 90, 90]]},
        ]

    change_annotations(data, change)
    _, target = objects(data, say=said.append).load(0)
    assert len(target["boxes"]) == 2 and target["masks"].flatten(1).any(1).all()
    (line,) = said
    assert line.endswith("instances_train.json: 4 objects outside their image are left out, first annotation 2")


def test_splits_call_categories_the_same(tmp_path, capsys):
    data = make_coco(tmp_path / "coco", train=2, val=1)
    file = change_annotations(data, lambda content: content["categories"][0].update(name="circle"), split="val")
    capsys.readouterr()
    assert detector(data, tmp_path / "run", "--epochs", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file} calls a category circle, which {data / 'annotations' / 'instances_train.json'} calls" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("images"), ("must hold a list 'images', got None",)),
        (lambda c: c["images"][0].pop("id"), ("image number 0", "whole number as id")),
        (lambda c: c["images"][0].pop("file_name"), ("image 10: file_name", "None")),
        (lambda c: c["images"][0].update(id=11), ("image 11: the id is there twice",)),
        (lambda c: c["categories"].clear(), ("names no category",)),
        (lambda c: c["annotations"].append(c["annotations"][0]), ("annotation 100: the id is there twice",)),
        (lambda c: c["annotations"].clear(), ("has no image with an object",)),
        (lambda c: c["annotations"].append(5), ("annotations must be objects",)),
    ],
)
def test_wrong_files_of_annotations_are_one_line(change, words, tmp_path, capsys):
    data = make_coco(tmp_path / "coco", train=2, val=1)
    file = change_annotations(data, change)
    assert detector(data, tmp_path / "run", "--epochs", "1") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(file) in lines[0] and all(word in lines[0] for word in words), lines


def test_targets_are_what_the_file_says(tmp_path):
    data = make_coco(tmp_path / "coco", train=2, val=1)
    said = []

    def change(content):
        first, image = content["annotations"][0], content["images"][0]["id"]
        content["annotations"] = [
            first,
            {**first, "id": 501, "category_id": 3, "bbox": [60, 40, 4, 8],
             "segmentation": [[60, 40, 64, 40, 64, 48, 60, 48]]},  # at the corner, as a polygon of two
            {**first, "id": 502, "bbox": [5, 5, 0, 3]},
            {**first, "id": 503, "iscrowd": 1},
        ]  # fmt: skip
        assert image == first["image_id"]

    change_annotations(data, change)
    found = objects(data, say=said.append)
    image, target = found.load(0)
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    assert target["labels"].tolist()[1] == 1 and target["boxes"][1].tolist() == [60, 40, 64, 48]
    assert target["masks"].shape == (2, 48, 64) and target["masks"][1].sum() == 32
    rows, columns = torch.nonzero(target["masks"][0], as_tuple=True)
    x0, y0, x1, y1 = target["boxes"][0].tolist()
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (y0, y1, x0, x1)
    assert said == [f"{data / 'annotations' / 'instances_train.json'}: 1 boxes without area are left out, first "
                    f"annotation 502"]  # fmt: skip
    image, target = found.load(1)  # without objects
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 64, 40) and len(target["labels"]) == 0
    _, target = objects(data, crowds=True).load(0)
    assert target["iscrowd"].tolist() == [0, 0, 1]


def test_grey_and_deep_images(tmp_path):
    from groupmamba.training.pictures import read_picture

    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (7, 9)).astype(np.uint8)
    deep = (grey.astype(np.uint16) << 8) + rng.integers(0, 256, (7, 9)).astype(np.uint16)
    rgba = np.dstack([grey, grey, grey, 255 - grey])
    for name, pixels in (("grey.png", grey), ("deep.png", deep), ("deep.tif", deep), ("rgba.png", rgba)):
        Image.fromarray(pixels).save(tmp_path / name)
        found = np.asarray(read_picture(tmp_path / name))
        assert found.shape == (7, 9, 3) and (found == grey[..., None]).all(), name
    Image.fromarray(deep).save(tmp_path / "deep.png")
    data = make_coco(tmp_path / "coco", train=2, val=1)
    Image.fromarray(np.full((48, 64), 40000, np.uint16)).save(data / "train" / "0.png")
    assert (objects(data).load(0)[0] == 40000 >> 8).all()


def test_annotations_that_are_right_pass(tmp_path):
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[2:5, 3:8] = True
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 6, "width": 8}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            annotation(1, 1, 1, mask),
            {**annotation(2, 1, 1, mask), "segmentation": [[0, 0, 4.5, 0, 4.5, 4.5]], "area": 3.0},
            {**annotation(3, 1, 1, mask), "segmentation": []},
        ],
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    read = read_annotations(file)
    assert [entry["area"] for entry in read["annotations"]] == [40.0, 3.0, 40.0]
    file.write_text("[]")
    with pytest.raises(CommandError, match="must hold images, annotations and categories, got list"):
        read_annotations(file)
