# SPDX-License-Identifier: Apache-2.0
"""``groupmamba train-segmenter``, and what validates and predicts with its checkpoints."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from support.dense import SEGMENTER, make_ade, segmenter
from support.training import command, environment, losses, make_pictures, rows, train

for package in ("timm", "torchvision", "yaml", "safetensors", "segmentation_models_pytorch", "torchmetrics"):
    pytest.importorskip(package, reason="needs the extra 'train'")

from safetensors.torch import load_file  # noqa: E402

from groupmamba.training import options, step  # noqa: E402
from groupmamba.training.card import read_card  # noqa: E402
from groupmamba.training.recipe import rates  # noqa: E402
from groupmamba.training.segmentation.command import RECIPE  # noqa: E402
from groupmamba.training.segmentation.command import SEGMENTER as COMMAND  # noqa: E402
from groupmamba.training.segmentation.dataset import IGNORE, LabelledImages, classes_of  # noqa: E402

PLAIN = ["--scale", "1", "1", "--color-jitter", "0", "--drop-path", "0"]
LEARN = [*PLAIN, "--img-size", "64", "--short-side", "64", "--lr", "1e-2", "--val-interval", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_ade(tmp_path_factory.mktemp("ade"))


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("learned") / "run"
    assert segmenter(data, run, "--epochs", "8", *LEARN) == 0
    return run


def test_it_learns_and_leaves_what_it_says(learned):
    summary = rows(learned / "summary.csv")
    assert [row["epoch"] for row in summary] == [str(i) for i in range(8)]
    assert float(summary[-1]["train_loss"]) < 0.6 * float(summary[0]["train_loss"])
    assert [bool(row["eval_miou"]) for row in summary] == [i % 4 == 3 for i in range(8)]
    assert 35 < float(summary[-1]["eval_miou"]) < 100 and 70 < float(summary[-1]["eval_accuracy"]) <= 100
    names = {path.name for path in learned.iterdir()}
    assert names >= {"args.yaml", "summary.csv", "steps.csv", "curves.png", "checkpoints", "best.safetensors"}
    card = read_card(learned / "best.safetensors")
    assert (card.task, card.num_classes, card.classes) == ("segmentation", 3, ["ground", "rectangle", "disc"])
    assert card.options["decoder_channels"] == 16 and card.options["reduce_zero_label"] and card.img_size == 64


def test_validate_and_predict_follow_the_checkpoint(data, learned, tmp_path, capsys):
    capsys.readouterr()
    assert command("validate", str(data), "--weights", str(learned), "--device", "cpu", "-j", "0") == 0
    text = capsys.readouterr().out
    last = rows(learned / "summary.csv")[-1]
    found = dict(re.findall(r"^  (best|last) +miou ([\d.]+)%", text, re.M))
    assert float(found["last"]) == pytest.approx(float(last["eval_miou"]), abs=0.01)
    per_class = re.findall(r"^    (ground|rectangle|disc) +([\d.]+)%", text, re.M)
    assert [name for name, _ in per_class[:3]] == ["ground", "rectangle", "disc"]
    assert sum(float(value) for _, value in per_class[-3:]) / 3 == pytest.approx(float(found["last"]), abs=0.1)
    for more in (["--multi-scale"], ["--window", "whole"]):
        argv = ["validate", str(data), "--weights", str(learned / "last.safetensors"), "--device", "cpu", "-j", "0"]
        assert command(*argv, *more) == 0
        other = float(re.search(r"miou ([\d.]+)%", capsys.readouterr().out)[1])
        assert other > 20
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for names, status in ((["a", "b", "c"], 1), (["ground", "rectangle"], 1)):
        (other / "classes.txt").write_text("\n".join(names))
        assert command("validate", str(other), "--weights", str(learned), "--device", "cpu", "-j", "0") == status
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"names {len(names)} classes, {names[0]}" in line and "knows 3, ground, rectangle" in line
    out, image = tmp_path / "out.png", data / "images" / "validation" / "0.jpg"
    assert command("predict", str(image), "--weights", str(learned), "--device", "cpu", "--out", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = [float(re.search(r"([\d.]+)% of the pixels", line)[1]) for line in lines[1:-1]]
    assert lines[1].split()[0] == "ground" and sum(shares) == pytest.approx(100, abs=0.3)
    assert out.read_bytes().startswith(b"\x89PNG")
    for argv, words in (
        (["validate", str(data), "--weights", str(learned), "--img-size", "64"], ("--img-size", "segmentation")),
        (["predict", str(image), "--weights", str(learned), "--threshold", "0.5"], ("--threshold", "segmentation")),
    ):
        assert command(*argv, "--device", "cpu") == 2
        line = capsys.readouterr().err
        assert all(word in line for word in words), line


def test_an_interrupted_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    """All that is random is on, and the broken run has workers."""
    more = ["--steps", "5", "--lr", "1e-3", "--checkpoint-steps", "1", "--model-ema", "--model-ema-decay", "0.9"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert segmenter(data, whole, *more) == 0
    original = step.Step.body

    def body(self, pieces):
        body.left -= 1
        if body.left == 0:
            raise KeyboardInterrupt
        return original(self, pieces)

    for left in (2, 3):
        body.left = left
        monkeypatch.setattr(step.Step, "body", body)
        assert segmenter(data, broken, *more, "-j", "1") == 130
    monkeypatch.undo()
    assert segmenter(data, broken, *more, "-j", "2") == 0
    assert capsys.readouterr().err.count("going on from") == 2
    assert losses(broken) == losses(whole) and len(losses(whole)) == 5
    summary = rows(whole / "summary.csv")
    assert [row["step"] for row in summary] == ["2", "4", "5"]  # two steps an epoch, and the last one ends early
    for column in ("train_loss", "eval_miou", "eval_accuracy", "ema_miou", "lr"):
        assert [row[column] for row in rows(broken / "summary.csv")] == [row[column] for row in summary]
    ours, theirs = (load_file(run / "last.safetensors") for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert segmenter(data, broken, "--epochs", "2") == 2
    assert "--epochs 2 differs from the run that goes on, which was begun without it" in capsys.readouterr().err


def test_fine_tuning_from_a_segmenter_and_from_a_classifier(data, learned, tmp_path, capsys):
    more = ["--steps", "1", "--val-interval", "9", *PLAIN, "--lr", "1e-9"]
    weights = str(learned / "last.safetensors")
    assert segmenter(data, tmp_path / "same", *more, "--weights", weights) == 0
    before, after = load_file(weights), load_file(tmp_path / "same" / "last.safetensors")
    assert torch.allclose(before["segmentation_head.0.weight"], after["segmentation_head.0.weight"], atol=1e-6)
    two = make_ade(tmp_path / "two")
    (two / "classes.txt").write_text("a\nb\nc\nd\n")
    capsys.readouterr()
    assert segmenter(two, tmp_path / "four", *more, "--weights", weights) == 0
    assert "for other classes: segmentation_head.0." in capsys.readouterr().err
    pictures = make_pictures(tmp_path / "pictures")
    assert train(pictures, tmp_path / "classifier", "--epochs", "1") == 0
    weights = tmp_path / "classifier" / "last.safetensors"
    assert segmenter(data, tmp_path / "backbone", *more, "--weights", str(weights)) == 0
    name = "stages.2.blocks.0.mlp.fc1.weight"
    ours = load_file(tmp_path / "backbone" / "last.safetensors")[f"encoder.model.model.{name}"]
    assert torch.allclose(ours, load_file(weights)[name], atol=1e-6)
    capsys.readouterr()
    assert command("train", str(pictures), "--output", str(tmp_path / "same"), "--device", "cpu") == 1
    assert "is of a run of segmentation, not of classification" in capsys.readouterr().err


def test_two_processes_measure_what_one_measures(data, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["train-segmenter", str(data), "--output", str(run), *SEGMENTER, "-b", "2", "--steps", "2", "--lr", "1e-3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "groupmamba"]
    subprocess.run([*torchrun, *argv], check=True, capture_output=True, env=environment())
    assert len(losses(run)) == 2
    assert command("validate", str(data), "--weights", str(run / "last.safetensors"), "--device", "cpu", "-j", "0") == 0
    found = float(re.search(r"miou ([\d.]+)%", capsys.readouterr().out)[1])
    assert found == pytest.approx(float(rows(run / "summary.csv")[-1]["eval_miou"]), abs=0.01)


def test_images_that_cannot_be_read_and_labels_that_cannot_be(tmp_path, capsys):
    data = make_ade(tmp_path / "ade")
    image, label = data / "images" / "training" / "3.jpg", data / "annotations" / "training" / "5.png"
    image.write_bytes(image.read_bytes()[:200])
    assert segmenter(data, tmp_path / "run", "--epochs", "1") == 0
    assert f"skipped {image}, which can't be read" in capsys.readouterr().err
    assert rows(tmp_path / "run" / "summary.csv")[-1]["bad_images"] == "1"
    good = label.read_bytes()
    for pixels, words in (
        (np.full((64, 40), 9, np.uint8), ("has the label 9, and there are 3 classes, 1 to 3",)),
        (np.ones((10, 20), np.uint8), ("has 20 x 10 pixels, and the image 5.jpg 40 x 64",)),
        (np.ones((64, 40, 3), np.uint8), ("must have one channel", "RGB")),
        (None, ("can't be read",)),
    ):
        if pixels is None:
            label.write_bytes(good[:100])
        else:
            Image.fromarray(pixels).save(label)
        assert segmenter(data, tmp_path / "other", "--epochs", "1", "-j", "1") == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"groupmamba train-segmenter: {label} ") and all(word in last for word in words), last
        shutil.rmtree(tmp_path / "other", ignore_errors=True)


@pytest.mark.parametrize(
    ("change", "more", "status", "words"),
    [
        (lambda d: shutil.rmtree(d / "images" / "validation"), [], 1, ("images holds neither validation nor val",)),
        (lambda d: shutil.rmtree(d / "annotations" / "training"), [], 1, ("annotations/training is no folder",)),
        (lambda d: (d / "annotations" / "training" / "2.png").unlink(), [], 1, ("2.jpg has no label image", "2.png")),
        (lambda d: [p.unlink() for p in d.glob("images/training/*")], [], 1, ("training holds no image",)),
        (lambda d: (d / "classes.txt").write_text("\n"), [], 1, ("classes.txt names no class",)),
        (lambda d: (d / "classes.txt").write_text("one\n"), [], 1, ("one class", "two at least")),
        (lambda d: None, ["--num-classes", "5"], 1, ("--num-classes 5", "3 classes")),
        (lambda d: None, ["--img-size", "48"], 2, ("--img-size 48", "multiple of 32")),
        (lambda d: None, ["--stride", "33"], 2, ("--stride 33", "--img-size 32")),
        (lambda d: None, ["-b", "1"], 2, ("--batch-size 1", "2 at least")),
        (lambda d: None, ["--steps", "3", "--epochs", "3"], 2, ("--epochs 3 and --steps 3",)),
        (lambda d: None, ["--steps", "5", "--warmup-steps", "5"], 2, ("--warmup-steps 5", "5 steps")),
        (lambda d: None, ["--model", "groupmamba_huge"], 2, ("--model", "'groupmamba_huge'")),
        (lambda d: None, ["--weights", "nothing.pth"], 1, ("--weights", "nothing.pth")),
        (lambda d: None, ["--scale", "2", "1"], 2, ("--scale", "2 1")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_anything_is_written(change, more, status, words, tmp_path, capsys):
    data = make_ade(tmp_path / "ade")
    change(data)
    assert segmenter(data, tmp_path / "run", *more) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "run").exists()


def test_classes_by_the_highest_label_and_zero_as_a_class(tmp_path, capsys):
    data = make_ade(tmp_path / "ade")
    (data / "classes.txt").unlink()
    for more, count, lowest in (([], 3, "class 0"), (["--no-reduce-zero-label"], 4, "class 0")):
        run = tmp_path / str(count)
        assert segmenter(data, run, "--steps", "1", *more) == 0
        assert f"{count} classes, by the highest label" in capsys.readouterr().err
        card = read_card(run / "last.safetensors")
        assert card.num_classes == count and card.classes[0] == lowest


def test_labels_of_files(tmp_path):
    labels = np.array([[0, 1, 2], [255, 150, 3]])
    assert classes_of(labels, 150, True).tolist() == [[IGNORE, 0, 1], [IGNORE, 149, 2]]
    assert classes_of(labels, 4, False).tolist() == [[0, 1, 2], [IGNORE, 150, 3]]
    assert classes_of(labels, 300, False).tolist() == labels.tolist()  # 255 is a class of many
    data = make_ade(tmp_path / "ade", train=1, validation=1, sizes=((48, 64),))
    wide = np.full((48, 64), 2, np.uint16)
    wide[3, 4] = 300
    Image.fromarray(wide).save(data / "annotations" / "training" / "0.png")
    source = LabelledImages(data, ("training",), True)
    source.classes = [str(i) for i in range(300)]
    _, classes = source.load(0)
    assert classes.dtype == torch.int32 and classes[3, 4] == 299 and classes[0, 0] == 1


def test_the_shorter_side_is_that_of_the_crop_unless_it_is_given():
    def short_side(earlier=None, **given):
        return options.complete({"data": "", **given}, earlier, COMMAND).short_side

    assert short_side() == 512 and short_side(img_size=64) == 64 and short_side(img_size=64, short_side=128) == 128
    assert short_side({"data": "", "img_size": 64, "short_side": 512}) == 512  # a run that goes on keeps its own


def test_the_recipe_of_the_field():
    args = options.complete({"data": "somewhere"}, command=COMMAND)
    expected = {
        "img_size": 512, "short_side": 512, "scale": (0.5, 2.0), "batch_size": 16, "steps": 160_000, "epochs": None,
        "opt": "adamw", "weight_decay": 0.01, "sched": "poly", "sched_power": 1.0, "warmup_steps": 1500,
        "drop_path": 0.2, "clip_grad": 0.0, "stride": 341, "window": "slide", "reduce_zero_label": True,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.output == "output/segmenter_groupmamba_tiny"
    found = rates(16, lr_base=args.lr_base, lr_base_size=args.lr_base_size, warmup_lr=args.warmup_lr, min_lr=0.0)
    assert found == (6e-5, 6e-11, 0.0)
    assert all(value.source for value in RECIPE) and not {value.option for value in RECIPE} - set(COMMAND.options)


def test_rates_of_a_run_are_those_of_mmsegmentation(data, tmp_path):
    run = tmp_path / "run"
    more = ["--steps", "8", "--warmup-steps", "2", "--lr", "1e-3", "--warmup-lr", "1e-5", "--val-interval", "99"]
    assert segmenter(data, run, *more) == 0
    found = [float(row["lr"]) for row in rows(run / "steps.csv")]
    expected = [1e-5, 1e-5 + (1e-3 - 1e-5) / 2, *(1e-3 * (1 - i / 8) for i in range(2, 8))]
    assert found == pytest.approx(expected, rel=1e-9)


def test_help_fits_a_screen_and_the_long_one_has_everything(capsys):
    assert command("train-segmenter", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert command("train-segmenter", "--help-all") == 0
    text = capsys.readouterr().out
    assert all(f"--{option.name}" in text for option in COMMAND.options.values())


def test_other_backbones(data, tmp_path):
    """Swin takes images of any size here, and its table of positions is not decayed."""
    argv = ["train-segmenter", str(data), "--output", str(tmp_path / "run"), "--device", "cpu", "-j", "0", "-b", "2"]
    argv += ["--img-size", "64", "--short-side", "40", "--decoder-channels", "8", "--steps", "1"]
    argv += ["--model", "swin_tiny_patch4_window7_224", "--model-kwargs", "embed_dim=24", "depths=(1,1,1,1)"]
    assert command(*argv, "num_heads=(1,2,4,8)") == 0
    assert float(rows(tmp_path / "run" / "summary.csv")[-1]["eval_accuracy"]) > 0


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.full((48, 64), 9, np.uint8), "0.png has the label 9, and there are 3 classes, 1 to 3"),
        (np.ones((10, 12), np.uint8), "0.png has 12 x 10 pixels, and the image 0.jpg 64 x 48"),
        (np.ones((48, 64, 3), np.uint8), "0.png must have one channel, a class for each pixel, got RGB"),
    ],
)
def test_validation_labels_are_checked_before_the_first_step(labels, words, tmp_path, capsys):
    data = make_ade(tmp_path / "ade", train=4, validation=2)
    (data / "images" / "validation" / "1.jpg").write_text("no image, left out when it is loaded")
    Image.fromarray(labels).save(data / "annotations" / "validation" / "0.png")
    assert segmenter(data, tmp_path / "run", "--epochs", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not (tmp_path / "run").exists()


def test_names_of_classes_must_be_text(tmp_path, capsys):
    data = make_ade(tmp_path / "ade", train=4, validation=2)
    (data / "classes.txt").write_bytes(b"sky\n\xff\xfe\n")
    assert segmenter(data, tmp_path / "run", "--epochs", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{data / 'classes.txt'} can't be read as text" in line


def test_a_classifier_does_not_start_from_a_segmenter(learned, tmp_path, capsys):
    pictures = make_pictures(tmp_path / "pictures")
    weights = str(learned / "last.safetensors")
    capsys.readouterr()
    for option, status in (("--weights", 2), ("--kd-model-path", 1)):
        assert train(pictures, tmp_path / "run", "--epochs", "1", option, weights) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{option} {weights} is for segmentation, not for classification" in line


def test_a_backbone_of_one_size_is_refused_before_the_first_step(data, tmp_path, capsys):
    argv = ["train-segmenter", str(data), "--output", str(tmp_path / "run"), "--device", "cpu", "--img-size", "64"]
    assert command(*argv, "-b", "2", "--model", "maxvit_tiny_tf_224", "--decoder-channels", "16") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--model maxvit_tiny_tf_224 does not take images of 64 x 64 pixels" in line


def test_a_validation_that_can_measure_nothing_is_said(tmp_path, capsys):
    data = make_ade(tmp_path / "ade", train=4, validation=2)
    for path in (data / "annotations" / "validation").glob("*.png"):
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    assert segmenter(data, tmp_path / "run", "--epochs", "1") == 0
    assert f"no pixel of {data / 'images' / 'validation'} has a class: validation" in capsys.readouterr().err


def test_labels_without_an_image_are_said(tmp_path, capsys):
    data = make_ade(tmp_path / "ade")
    (data / "images" / "training" / "2.jpg").unlink()
    assert segmenter(data, tmp_path / "run", "--steps", "1") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1 and f"are left out: 1, such as {data / 'annotations' / 'training' / '2.png'}" in said[0]
