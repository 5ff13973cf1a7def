# SPDX-License-Identifier: Apache-2.0
"""The scenes of examples/stamps: how they are drawn, runs in little, the report, and boxed aerial photographs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

for package in ("timm", "safetensors", "pycocotools", "torchmetrics", "segmentation_models_pytorch"):
    pytest.importorskip(package, reason="needs the extra 'train'")
pytest.importorskip("skimage", reason="needs the extra 'stamps'")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from groupmamba.training.detection.annotations import Split  # noqa: E402
from groupmamba.training.detection.coco import Objects  # noqa: E402
from groupmamba.training.segmentation.dataset import LabelledImages  # noqa: E402
from groupmamba_ext._command import CommandError  # noqa: E402
from stamps import aerial, draw, report, run, runs, scenes  # noqa: E402

COUNTS = {"training": 5, "validation": 3}


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """Six folders of discs, each in its class's brightness, as the package has them."""
    root = tmp_path_factory.mktemp("package") / "usr/share/tuxpaint/stamps"
    for kind, name in enumerate(scenes.CLASSES):
        for i in range(5):
            picture = Image.new("RGBA", (300 if i == 0 else 60, 60), (255, 0, 255, 0))
            grey = 40 * kind + i
            ImageDraw.Draw(picture).ellipse((5, 5, picture.width - 5, 55), fill=(grey, grey, grey, 255))
            file = root / name / ("deep/er" if i % 2 else "") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        Image.new("RGB", (60, 60)).save(root / name / "opaque.png")
    return root.parents[3]


@pytest.fixture(scope="module")
def data(stamps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    argv = [str(stamps), str(folder), "--train", "5", "--validation", "3", "--size", "96", "--workers", "1"]
    assert draw.main(argv) == 0
    return folder


def test_stamps_are_reduced_and_split(stamps, tmp_path, capsys):
    reduced = tmp_path / "reduced"
    assert draw.main([str(stamps), str(reduced), "--reduce"]) == 0
    assert "30 stamps" in capsys.readouterr().out
    for root in (scenes.find_stamps(stamps), reduced):
        found = {split: scenes.read_stamps(root, split) for split in scenes.SPLITS}
        files = {split: {stamp.file for stamp in some} for split, some in found.items()}
        assert len(files["training"]) == 24 and len(files["validation"]) == 6
        assert not files["training"] & files["validation"]
        assert {stamp.kind for stamp in found["validation"]} == set(range(6))
        assert max(max(stamp.pixels.shape) for stamp in found["training"]) == 256
        for stamp in found["training"]:  # a colour that is not to be seen is not mixed in
            solid = stamp.pixels[..., 3] >= scenes.SOLID
            assert (stamp.pixels[solid][:, :3].max(1) <= 40 * stamp.kind + 5).all()
    assert not set(scenes.BACKGROUNDS["training"]) & set(scenes.BACKGROUNDS["validation"])


def test_a_scene_follows_from_its_seed(stamps):
    found = scenes.read_stamps(scenes.find_stamps(stamps), "training")
    backgrounds = scenes.read_backgrounds("training")
    size = scenes.Size(96, 120, 4)
    for index in range(10):
        first, again = (scenes.draw(found, backgrounds, size, 7, 0, index) for _ in range(2))
        assert np.array_equal(first.pixels, again.pixels) and len(first.things) == len(again.things)
        assert min(first.pixels.shape[:2]) == 96 and max(first.pixels.shape[:2]) <= 120
        taken = np.zeros(first.pixels.shape[:2], int)
        for kind, mask in first.things:
            taken += mask
            inside = first.pixels[mask].astype(float)
            assert abs(np.median(inside) - 40 * kind - 2) < 12 + 8 * kind  # up to a fifth brighter or darker
        assert taken.max() <= 1  # each pixel is of one thing
    other = scenes.draw(found, backgrounds, size, 8, 0, 0)
    assert not np.array_equal(other.pixels, scenes.draw(found, backgrounds, size, 7, 0, 0).pixels)


def test_what_is_drawn_is_what_both_formats_say(data):
    classes = ["background", *scenes.CLASSES]
    assert (data / "classes.txt").read_text().split() == classes
    for split, count in COUNTS.items():
        objects = Objects(
            Split(data / "annotations" / f"instances_{split}.json", data / "images" / split),
            crowds=True,
            empty=True,
            say=print,
        )
        objects.use_masks(True)
        labelled = LabelledImages(data, (split,), True)
        labelled.classes = classes
        assert len(objects) == len(labelled) == count and objects.classes == list(scenes.CLASSES)
        for index in range(count):
            _, target = objects.load(index)
            _, labels = labelled.load(index)
            expected = np.zeros(labels.shape, int)
            for label, mask, box in zip(target["labels"], target["masks"], target["boxes"], strict=True):
                expected[mask.numpy().astype(bool)] = int(label)
                rows, columns = np.nonzero(mask.numpy())
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.array_equal(labels.numpy(), expected)


def test_scenes_do_not_depend_on_the_number_of_processes(data, stamps, tmp_path):
    argv = [str(stamps), str(tmp_path / "again"), "--train", "5", "--validation", "3", "--size", "96", "--workers", "2"]
    assert draw.main(argv) == 0
    for file in sorted(data.rglob("*.*")):
        assert (tmp_path / "again" / file.relative_to(data)).read_bytes() == file.read_bytes(), file


def test_what_is_not_there_is_one_line(data, tmp_path, capsys):
    for argv, words in (
        ([str(tmp_path / "none"), str(tmp_path / "x")], ("none", "tuxpaint-stamps-default")),
        ([str(tmp_path), str(data)], ("tuxpaint",)),
    ):
        assert draw.main(argv) == 1
        line = capsys.readouterr().err
        assert all(word in line for word in words), line


def test_a_folder_in_use_is_left_alone(stamps, data, capsys):
    assert draw.main([str(stamps), str(data)]) == 1
    assert "must be an empty folder" in capsys.readouterr().err


def test_runs_in_little_and_their_report(data, tmp_path, capsys):
    folder, page, curves, listing = (
        tmp_path / "runs",
        tmp_path / "page.md",
        tmp_path / "curves.png",
        tmp_path / "all.json",
    )
    argv = [str(data), "--output", str(folder), "--quick", "--seeds", "1", "--device", "cpu"]
    argv += ["--backbones", "groupmamba_tiny", "--tasks", "segmenter"]
    assert run.main([*argv, "--minutes", "0.001"]) == 0
    said = capsys.readouterr().out
    assert "0 of 1 runs are finished" in said and "1 runs are left: start again to go on" in said
    assert run.main(argv) == 0
    assert "segmenter-groupmamba_tiny-0 is finished" in capsys.readouterr().out
    assert run.main(argv) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(folder), "--page", str(page), "--curves", str(curves), "--json", str(listing)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "mask mAP" not in text and "mean IoU" in text and "(curves.png)" in text and "(all.json)" in text
    assert curves.read_bytes().startswith(b"\x89PNG")
    assert runs.read_results([listing]) == sorted(runs.read_results([folder]), key=lambda one: one["run"])
    pairs = tmp_path / "pairs.png"
    assert report.main([str(folder / "segmenter-groupmamba_tiny-0"), "--scenes", str(data), str(pairs)]) == 0
    assert pairs.read_bytes().startswith(b"\x89PNG")
    broken = folder / "segmenter-groupmamba_tiny-0" / "finished.json"
    broken.write_text("{}")
    assert report.main([str(folder)]) == 1
    assert str(broken) in capsys.readouterr().err


def test_a_run_that_fails_says_why(data, tmp_path, capsys):
    argv = [str(data), "--output", str(tmp_path), "--quick", "--batch", "99", "--device", "cpu", "--seeds", "1"]
    assert run.main([*argv, "--tasks", "detector", "--backbones", "groupmamba_tiny"]) == 1
    line = capsys.readouterr().err
    assert "detector-groupmamba_tiny-0 ended with status 2" in line and "--batch-size 99" in line


def result(task, backbone, seed, values, steps=100):
    history = [[steps * (i + 1) // len(values), value] for i, value in enumerate(values)]
    one = {"task": task, "backbone": backbone, "seed": seed, "history": history, "settings": {"steps": steps}}
    one["settings"].update(batch=2, size=64)
    return {**one, "run": f"{task}-{backbone}-{seed}", "losses": [], "images_per_s": 10.0, "shared": False,
            "device": "some", "torch": "2", "date": "2026-01-01"}  # fmt: skip


def test_the_report_says_whether_it_holds():
    ours, swin = runs.BACKBONES[:2]
    found = [result("detector", ours, seed, [1.0] + [2.0] * 8 + [3.5 + seed]) for seed in range(3)]
    found += [result("detector", swin, seed, [1.0] + [2.0] * 8 + [4.0 + seed]) for seed in range(3)]
    text = "\n".join(report.table(found, "detector"))
    assert f"| `{ours}` | 1.0 ± 0.0 | 4.5 ± 1.0 | 4.5 | 10 ± 0 |" in text
    assert "each seed: yes" in text and "standard deviation, 4.0: yes" in text
    found[0]["history"][-1][1] = 2.9
    assert "each seed: no" in "\n".join(report.table(found, "detector"))
    lower = [result("segmenter", ours, seed, [0.0] * 10) for seed in range(2)]
    lower += [result("segmenter", swin, seed, [0.0] * 9 + [5.0 + seed]) for seed in range(2)]
    text = "\n".join(report.table(lower, "segmenter"))
    assert "each seed: no" in text and "standard deviation, 4.8: no" in text and "from zero" in text
    with pytest.raises(CommandError, match="must hold the lines"):
        report.replace_block("no markers", "new", report.BEGIN, report.END)


def test_aerial_photographs(tmp_path, capsys):
    source, data = tmp_path / "data", tmp_path / "trees"
    source.mkdir()
    for name, side in ((f"{aerial.HELD_OUT}_x", 160), ("OSBS_029", 100)):
        Image.new("RGB", (side, side)).save(source / f"{name}.png")
        boxes = "".join(
            f"<object><name>Dead</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
            f"</object>"
            for a, b, c, d in ((10, 10, 30, 40), (90, 20, 105, 40), (120, 120, 140, 140))
        )
        (source / f"{name}.xml").write_text(f"<annotation>{boxes}</annotation>")
    assert aerial.main([str(source), str(data), "--side", "100"]) == 0
    assert "1 tiles for training, 4 for validation" in capsys.readouterr().out
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    assert [entry["bbox"] for entry in content["annotations"]] == [[10, 10, 20, 30], [90, 20, 10, 20], [20, 20, 20, 20]]
    assert [entry["image_id"] for entry in content["annotations"]] == [1, 1, 4]
    found = Objects(
        Split(data / "annotations/instances_train.json", data / "train"), crowds=False, empty=True, say=print
    )
    found.use_masks(False)
    assert found.load(0)[1]["boxes"].shape == (2, 4) and found.classes == ["tree"]
    assert aerial.main([str(data), str(tmp_path / "no")]) == 1
    assert "deepforest/data" in capsys.readouterr().err
