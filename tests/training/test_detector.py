# SPDX-License-Identifier: Apache-2.0
"""``groupmamba train-detector``, and what validates and predicts with its checkpoints."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from support.dense import DETECTOR, change_annotations, detector, make_coco, objects
from support.graphs import emulate
from support.training import command, environment, losses, rows

for package in ("timm", "torchvision", "yaml", "safetensors", "pycocotools", "torchmetrics"):
    pytest.importorskip(package, reason="needs the extra 'train'")

from safetensors.torch import load_file  # noqa: E402
from torchvision import tv_tensors  # noqa: E402

from groupmamba.training import options, step  # noqa: E402
from groupmamba.training.card import read_card  # noqa: E402
from groupmamba.training.detection.command import DETECTOR as COMMAND  # noqa: E402
from groupmamba.training.detection.command import PRESETS, RECIPE  # noqa: E402
from groupmamba.training.detection.task import Detection, draw_objects  # noqa: E402
from groupmamba.training.detection.transforms import AbsoluteCrop, TrainingTransform  # noqa: E402
from groupmamba.training.distributed import Processes  # noqa: E402
from groupmamba.training.graph import graph_passes  # noqa: E402
from groupmamba.training.output import Screen  # noqa: E402
from groupmamba.training.seeds import seeded  # noqa: E402
from groupmamba_ext._command import UsageError  # noqa: E402

LEARN = ["--lr", "1e-3", "--drop-path", "0"]
FIGURES = ("map", "map50", "map75")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("learned") / "run"
    assert detector(data, run, "--epochs", "4", *LEARN, "--val-interval", "4") == 0
    return run


def test_it_learns_and_leaves_what_it_says(learned):
    summary = rows(learned / "summary.csv")
    assert [row["epoch"] for row in summary] == ["0", "1", "2", "3"]
    assert float(summary[-1]["train_loss"]) < 0.75 * float(summary[0]["train_loss"])
    assert all(0 <= float(summary[-1][f"eval_{kind}_{name}"]) <= 100 for kind in ("box", "mask") for name in FIGURES)
    names = {path.name for path in learned.iterdir()}
    assert names >= {"args.yaml", "summary.csv", "steps.csv", "curves.png", "checkpoints", "best.safetensors"}
    card = read_card(learned / "best.safetensors")
    assert (card.task, card.num_classes, card.classes) == ("detection", 2, ["rectangle", "disc"])
    assert card.options["category_ids"] == [3, 7] and card.options["masks"] and card.options["min_size"] == [64]


def test_validate_and_predict_follow_the_checkpoint(data, learned, tmp_path, capsys):
    capsys.readouterr()
    weights = str(learned / "last.safetensors")
    assert command("validate", str(data), "--weights", weights, "--device", "cpu", "-j", "0") == 0
    text = capsys.readouterr().out
    last = rows(learned / "summary.csv")[-1]
    for kind in ("box", "mask"):
        found = float(re.search(rf"{kind}_map ([\d.]+)%", text)[1])
        assert found == pytest.approx(float(last[f"eval_{kind}_map"]), abs=0.01)
    assert re.search(r"^    rectangle +[\d.]+% +[\d.]+%$", text, re.M)
    out, image = tmp_path / "out.png", data / "val" / "0.png"
    argv = ["predict", str(image), "--weights", weights, "--device", "cpu", "--out", str(out)]
    assert command(*argv, "--threshold", "0.01") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and lines[-1] == str(out) and out.read_bytes().startswith(b"\x89PNG")
    assert all(re.fullmatch(r"  (rectangle|disc) +[\d.]+%  x \d+ to \d+, y \d+ to \d+", line) for line in lines[1:-1])
    assert len(lines) > 3
    assert command(*argv, "--threshold", "1") == 0
    assert capsys.readouterr().out.splitlines()[1] == "  nothing"


def test_an_interrupted_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    """Several scales, crops, flips, drop path and the samplers of the heads are on, and the broken run has workers."""
    more = ["--steps", "4", "--lr", "1e-4", "--checkpoint-steps", "1", "--crop", "--min-size", "48", "64"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert detector(data, whole, *more) == 0
    original = step.Step.body

    def body(self, pieces):
        body.left -= 1
        if body.left == 0:
            raise KeyboardInterrupt
        return original(self, pieces)

    body.left = 3
    monkeypatch.setattr(step.Step, "body", body)
    assert detector(data, broken, *more, "-j", "1") == 130
    monkeypatch.undo()
    assert detector(data, broken, *more, "-j", "2") == 0
    assert "going on from" in capsys.readouterr().err
    assert losses(broken) == losses(whole) and len(losses(whole)) == 4
    ours, theirs = (load_file(run / "last.safetensors") for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_graphs_of_the_backbone_change_no_loss(data, tmp_path, monkeypatch):
    """With stochastic depth, through validations, bit for bit; on the CPU with graphs that are emulated."""
    assert detector(data, tmp_path / "eager", "--epochs", "4", "--lr", "1e-3") == 0
    emulate(monkeypatch)
    train, recorded = step.Step.train, []

    def with_graphs(self, *args):
        train(self, *args)
        if not recorded:
            args = options.complete({"data": ""}, command=COMMAND)
            said = graph_passes(self.model, Detection.graphed, args, 1)
            assert said == "the backbone's passes are CUDA graphs"
            recorded.append(self.model.backbone.forward)

    monkeypatch.setattr(step.Step, "train", with_graphs)
    assert detector(data, tmp_path / "graphs", "--epochs", "4", "--lr", "1e-3") == 0
    assert len(recorded[0]) > 1, recorded
    assert losses(tmp_path / "graphs") == losses(tmp_path / "eager")
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("graphs", "eager"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.cuda
def test_on_a_gpu_the_backbones_passes_are_graphs(data, tmp_path, capsys):
    """And the losses those of single launches, as far as torchvision's RoIAlign repeats: with a larger rate a last bit
    of one step is a tenth of the loss two steps later."""
    found = {}
    for name, more in (("graphs", []), ("eager", ["--no-cuda-graph"])):
        run = tmp_path / name
        plain = ["--drop-path", "0", "--lr", "1e-7", "--device", "cuda", "--no-amp"]
        assert detector(data, run, "--epochs", "4", *plain, *more) == 0
        said = capsys.readouterr().err
        assert ("the backbone's passes are CUDA graphs, not whole steps: images differ in size" in said) == (not more)
        assert ("without a CUDA graph: --no-cuda-graph" in said) == bool(more)
        found[name] = [float(loss) for loss in losses(run)]
    assert found["graphs"] == pytest.approx(found["eager"], rel=1e-2)  # losses of two batches are further apart


def test_two_processes_measure_what_one_measures(data, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["train-detector", str(data), "--output", str(run), *DETECTOR, "-b", "1", "--steps", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "groupmamba"]
    subprocess.run([*torchrun, *argv], check=True, capture_output=True, env=environment())
    assert command("validate", str(data), "--weights", str(run / "last.safetensors"), "--device", "cpu", "-j", "0") == 0
    text = capsys.readouterr().out
    for name in ("box_map", "box_map50", "mask_map"):
        found = float(re.search(rf"{name} ([\d.]+)%", text)[1])
        assert found == pytest.approx(float(rows(run / "summary.csv")[-1][f"eval_{name}"]), abs=0.01)


def test_fine_tuning_from_a_detector_of_other_classes(learned, tmp_path, capsys):
    data = make_coco(tmp_path / "coco")

    def third(content):
        content["categories"].append({"id": 9, "name": "other"})

    change_annotations(data, third)
    weights = str(learned / "last.safetensors")
    capsys.readouterr()
    assert detector(data, tmp_path / "run", "--steps", "1", "--lr", "1e-9", "--weights", weights) == 0
    said = capsys.readouterr().err
    assert "for other classes: roi_heads.box_predictor." in said
    ours, theirs = load_file(tmp_path / "run" / "last.safetensors"), load_file(weights)
    assert ours["roi_heads.box_predictor.cls_score.weight"].shape[0] == 4
    for name in ("backbone.body.model.stages.2.blocks.0.mlp.fc1.weight", "roi_heads.box_head.fc6.weight"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-6)
    assert read_card(tmp_path / "run" / "last.safetensors").classes == ["rectangle", "disc", "other"]


def test_boxes_without_masks(tmp_path, capsys):
    data = make_coco(tmp_path / "coco", masks=False)
    run = tmp_path / "run"
    assert detector(data, run, "--steps", "1") == 0
    assert "the annotations have no masks: boxes alone, by Faster R-CNN" in capsys.readouterr().err
    assert set(rows(run / "summary.csv")[-1]) >= {"eval_box_map", "ema_box_map"}
    assert "eval_mask_map" not in rows(run / "summary.csv")[-1]
    assert not any("mask" in name for name in load_file(run / "last.safetensors"))
    assert command("validate", str(data), "--weights", str(run), "--device", "cpu", "-j", "0") == 0
    assert "mask_map" not in capsys.readouterr().out


def test_three_images_in_one_folder_each(tmp_path, capsys):
    """As a new user has it: no options, a handful of images, another layout."""
    data = make_coco(tmp_path / "coco", train=3, val=3)
    for split in ("train", "val"):
        (data / "annotations" / f"instances_{split}.json").rename(data / split / "_annotations.coco.json")
    (data / "val").rename(data / "valid")
    argv = ["train-detector", str(data), "--output", str(tmp_path / "run"), *DETECTOR, "--epochs", "1"]
    argv.remove("-b")
    argv.remove("2")
    assert command(*argv) == 0
    said = capsys.readouterr().err
    assert "--batch-size 3 in place of the default: there are 3 training images" in said
    assert len(losses(tmp_path / "run")) == 1


def test_images_without_objects(tmp_path, capsys):
    data = make_coco(tmp_path / "coco", train=4, val=2)

    def first_without(content):
        image = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image]

    change_annotations(data, first_without)
    change_annotations(data, first_without, "val")
    assert detector(data, tmp_path / "few", "--epochs", "1") == 0
    assert "1 images without objects are left out" in capsys.readouterr().err
    assert len(losses(tmp_path / "few")) == 1
    assert detector(data, tmp_path / "all", "--epochs", "1", "--empty-images") == 0
    assert len(losses(tmp_path / "all")) == 2
    file = change_annotations(data, lambda content: content["annotations"].clear(), "val")
    capsys.readouterr()
    assert detector(data, tmp_path / "none", "--epochs", "1") == 0
    assert f"{file} has no object: validation measures nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "more", "status", "words"),
    [
        (lambda d: shutil.rmtree(d / "annotations"), [], 1, ("holds no annotations", "--train-annotations")),
        (lambda d: shutil.rmtree(d / "val"), [], 1, ("no folder of images", "--val-images")),
        (lambda d: (d / "annotations" / "instances_val.json").write_text("{"), [], 1, ("can't be read as JSON",)),
        (lambda d: None, ["--train-images", "nowhere"], 1, ("--train-images nowhere",)),
        (lambda d: None, ["--val-annotations", "nothing.json"], 1, ("--val-annotations nothing.json",)),
        (lambda d: None, ["--min-size", "200"], 2, ("--min-size 200", "--max-size 96")),
        (lambda d: None, ["--decay-at", "0.9", "0.5"], 2, ("--decay-at", "0.9 0.5")),
        (lambda d: None, ["--steps", "3", "--epochs", "3"], 2, ("--epochs 3 and --steps 3",)),
        (lambda d: None, ["--detector-kwargs", "nonsense=1"], 2, ("nonsense",)),
        (lambda d: None, ["--detector-kwargs", "box_nms_thresh=a"], 2, ("box_nms_thresh must be a number, got 'a'",)),
        (lambda d: None, ["--model-kwargs", "num_classes=3"], 2, ("--model-kwargs num_classes=3",)),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_anything_is_written(change, more, status, words, tmp_path, capsys):
    data = make_coco(tmp_path / "coco", train=2, val=1)
    change(data)
    assert detector(data, tmp_path / "run", *more) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "run").exists()


def test_images_that_cannot_be_read(tmp_path, capsys):
    data = make_coco(tmp_path / "coco", train=4, val=2)
    bad = data / "train" / "1.png", data / "val" / "1.png"
    bad[0].write_text("no picture")
    bad[1].unlink()
    assert detector(data, tmp_path / "run", "--epochs", "1") == 0
    said = capsys.readouterr().err
    assert all(f"skipped {path}, which can't be read" in said for path in bad)
    assert rows(tmp_path / "run" / "summary.csv")[-1]["bad_images"] == "1"


def test_validation_names_categories_rightly(data, learned, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    weights = str(learned / "last.safetensors")
    argv = ["validate", str(other), "--weights", weights, "--device", "cpu", "-j", "0"]
    file = change_annotations(other, lambda c: c["categories"][0].update(name="square"), "val")
    assert command(*argv) == 1
    assert f"{file} calls a category square, which the checkpoint calls rectangle" in capsys.readouterr().err

    def foreign(content):
        content["categories"].append({"id": 20, "name": "rectangle"})
        content["categories"][0]["name"] = "rectangle"
        content["annotations"][0]["category_id"] = 20

    change_annotations(other, foreign, "val")
    assert command(*argv) == 1
    assert "is of category 20 (rectangle), which the training images do not have" in capsys.readouterr().err


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_masks_and_classes_stay_together(tmp_path, crop):
    data = make_coco(tmp_path / "coco", train=6, val=1, sizes=((300, 420), (700, 40)))
    found = objects(data)
    transform = TrainingTransform(options.complete({"data": "", "crop": crop}, command=COMMAND))
    lost = 0
    for seed in range(4):
        for index in range(6):
            image, target = found.load(index)
            with seeded(seed, index):
                after, objects_after = transform(image, target)
            assert set(objects_after) == {"boxes", "labels", "masks"} and type(objects_after["boxes"]) is torch.Tensor
            boxes, labels, masks = (objects_after[name] for name in ("boxes", "labels", "masks"))
            assert len(boxes) == len(labels) == len(masks) and masks.shape[1:] == after.shape[1:]
            lost += len(target["labels"]) - len(labels)
            for (x0, y0, x1, y1), label, mask in zip(boxes.tolist(), labels, masks, strict=True):
                assert 0 <= x0 < x1 <= after.shape[2] and 0 <= y0 < y1 <= after.shape[1]
                if mask.sum() < 30:
                    continue
                rows, columns = torch.nonzero(mask, as_tuple=True)
                assert abs(columns.min() - x0) < 2 and abs(columns.max() + 1 - x1) < 2
                assert abs(rows.min() - y0) < 2 and abs(rows.max() + 1 - y1) < 2
                mean = after[:, mask.bool()].float().mean(1)
                assert (mean.argmax() == 0) == (label == 1), mean  # rectangles are red, discs blue
    assert crop == (lost > 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (300, 400)])
@pytest.mark.parametrize("count", [0, 2])
def test_objects_of_images_of_any_size_are_transformed(size, count):
    """None, or two that touch all borders."""
    transform = TrainingTransform(options.complete({"data": "", "crop": True}, command=COMMAND))
    boxes = torch.tensor([[0.0, 0.0, size[1], size[0]]]).expand(count, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.ones(count, dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.ones(count, *size, dtype=torch.uint8)),
    }
    for seed in range(4):
        with seeded(seed):
            image, after = transform(tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)), target)
        height, width = image.shape[1:]
        assert after["masks"].shape == (count, height, width) and len(after["labels"]) == count
        assert torch.equal(after["boxes"], torch.tensor([[0.0, 0.0, width, height]]).expand(count, 4))


def test_a_crop_is_within_the_image():
    crop = AbsoluteCrop((20, 30))
    for size in ((100, 100), (25, 10), (1, 300)):
        image = torch.arange(size[0] * size[1]).view(1, *size)
        for seed in range(5):
            with seeded(seed):
                found = crop(image)
            for got, side in zip(found.shape[1:], size, strict=True):
                assert min(20, side) <= got <= min(30, side)


SIZES = [(1, 1), (1, 2000), (2000, 1), (33, 65), (128, 31)]


@pytest.mark.parametrize("masks", [True, False])
def test_images_of_any_size_in_one_batch_with_and_without_objects(tmp_path, masks):
    data = make_coco(tmp_path / "coco")
    more = {"data": str(data), "min_size": (64,), "max_size": 96, "no_masks": not masks, "device": "cpu",
            "model_kwargs": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "stem_dim": 8},
            "detector_kwargs": {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}}  # fmt: skip
    task = Detection(options.complete(more, command=COMMAND), Processes(), torch.device("cpu"), Screen(False))
    model, _ = task.make_model(task.read(), True)
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=rng) for size in SIZES]
    targets = []
    for i, (height, width) in enumerate(SIZES):
        count = 0 if i == 3 else 1
        box = torch.tensor([[0.0, 0.0, width, height]])[:count]  # it touches all borders
        target = {"boxes": box, "labels": torch.ones(count, dtype=torch.int64)}
        if masks:
            target["masks"] = torch.ones(count, height, width, dtype=torch.uint8)
        targets.append(target)
    total = sum(model.train()(images, targets).values())
    total.backward()
    assert torch.isfinite(total) and all(p.grad is not None for p in model.parameters())
    empty = [{name: value[:0] for name, value in target.items()} for target in targets]
    nothing = sum(model(images, empty).values())
    nothing.backward()
    assert torch.isfinite(nothing)
    with torch.no_grad():
        found = model.eval()(images)
    for (height, width), result in zip(SIZES, found, strict=True):
        boxes = result["boxes"]
        assert (boxes[:, [0, 2]] <= width + 1e-3).all() and (boxes[:, [1, 3]] <= height + 1e-3).all()
        assert not masks or result["masks"].shape[2:] == (height, width)


def test_the_recipes_of_the_field():
    args = options.complete({"data": "somewhere"}, command=COMMAND)
    expected = {
        "epochs": 12, "batch_size": 16, "opt": "adamw", "weight_decay": 0.05, "lr_base": 1e-4, "lr_base_size": 16,
        "sched": "multistep", "decay_at": (8 / 12, 11 / 12), "decay_rate": 0.1, "warmup_steps": 1000,
        "warmup_lr": 1e-7, "drop_path": 0.2, "min_size": (800,), "max_size": 1333, "crop": False, "hflip": 0.5,
        "clip_grad": 0.0, "model_ema": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    long = options.complete({"data": "somewhere", "schedule": "3x"}, command=COMMAND)
    assert (long.epochs, long.decay_at, long.crop) == (36, (27 / 36, 33 / 36), True)
    assert long.min_size == tuple(range(480, 801, 32)) and long.max_size == 1333
    mixed = options.complete({"data": "", "schedule": "3x", "epochs": 5}, command=COMMAND)
    assert (mixed.epochs, mixed.crop) == (5, True)
    again = options.complete({"data": "", "schedule": "3x"}, {"schedule": "3x", "epochs": 5}, COMMAND)
    assert again.epochs == 5
    assert all(value.source for value in RECIPE)
    assert not {value.option for value in RECIPE} - set(COMMAND.options) and not set(PRESETS["3x"]) - set(
        COMMAND.options
    )


@pytest.mark.parametrize(
    "name, value", [("steps", 2), ("train_annotations", "other.json"), ("lr", 0.3), ("amp", False)]
)
def test_an_option_differs_also_where_the_run_was_begun_without_it(name, value):
    earlier = {"data": "", "epochs": 5, "model": "groupmamba_tiny"}
    option = "--no-amp" if name == "amp" else f"--{name.replace('_', '-')} {value}"
    with pytest.raises(UsageError, match=f"^{option} differs from the run that goes on, which was begun without it"):
        options.complete({name: value}, earlier, COMMAND)
    assert options.complete({"workers": 3}, earlier, COMMAND).epochs == 5


def test_rates_fall_at_the_milestones():
    args = options.complete({"data": "", "warmup_steps": 10, "epochs": 12}, command=COMMAND)
    task = Detection(args, Processes(), torch.device("cpu"), Screen(False))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    from groupmamba.training.recipe import Rates

    schedule = step.Schedule("multistep", optimizer, Rates(1.0, 0.0, 0.0), task.plan(10))
    found = [schedule.set(i) for i in range(120)]
    assert found[:11] == pytest.approx([i / 10 for i in range(11)])
    assert found[10:80] == pytest.approx([1.0] * 70)
    assert found[80:110] == pytest.approx([0.1] * 30) and found[110:] == pytest.approx([0.01] * 10)


def test_help_fits_a_screen_and_the_long_one_has_everything(capsys):
    assert command("train-detector", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert command("train-detector", "--help-all") == 0
    text = capsys.readouterr().out
    assert all(f"--{option.name}" in text for option in COMMAND.options.values())


def test_objects_are_drawn_where_they_are():
    image = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    masks = torch.zeros(1, 40, 40, dtype=torch.bool)
    masks[0, 20:30, 22:32] = True
    found = {"boxes": torch.tensor([[20.0, 18, 34, 32]]), "labels": torch.tensor([2]), "masks": masks}
    drawn = draw_objects(image, found, [""], 3)
    assert (drawn[:, 25, 27] != 100).any() and (drawn[:, 18, 25] != 100).any() and (drawn[:, 5, 5] == 100).all()
    nothing = {name: value[:0] for name, value in found.items()}
    assert torch.equal(draw_objects(image, nothing, [], 3), image)
