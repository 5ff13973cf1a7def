# SPDX-License-Identifier: Apache-2.0
"""``groupmamba train`` and ``groupmamba validate`` on small folders of pictures."""

import os
import re
import shutil
import struct

import pytest
import torch

from support.training import PLAIN, command, losses, make_pictures, rows, train

for package in ("timm", "torchvision", "yaml", "safetensors"):
    pytest.importorskip(package, reason="needs the extra 'train'")

import timm  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import groupmamba.models  # noqa: E402
from groupmamba.training import checkpoint, output, step, teacher  # noqa: E402
from groupmamba.training.card import Card, model_of, read_card  # noqa: E402

LEARN = [*PLAIN, "--lr", "1e-2", "--model-ema-decay", "0.5"]
SIZES = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "stem_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("learned") / "run"
    assert train(data, run, "--epochs", "4", *LEARN) == 0
    return run


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_it_learns_and_leaves_what_it_says(learned):
    summary = rows(learned / "summary.csv")
    assert [row["epoch"] for row in summary] == ["0", "1", "2", "3"]
    assert float(summary[-1]["train_loss"]) < 0.5 * float(summary[0]["train_loss"])
    assert float(summary[-1]["eval_top1"]) > 90 and float(summary[-1]["ema_top1"]) > 90
    mean = sum(float(loss) for loss in losses(learned)[-5:]) / 5
    assert float(summary[-1]["train_loss"]) == pytest.approx(mean, rel=1e-6)
    names = {path.name for path in learned.iterdir()}
    assert names >= {"args.yaml", "summary.csv", "steps.csv", "curves.png", "checkpoints", "best.safetensors"}
    assert (learned / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = read_card(learned / "best.safetensors")
    assert card == Card("groupmamba_tiny", 3, {k: list(v) if isinstance(v, tuple) else v for k, v in SIZES.items()},
                        ["blue", "green", "red"], img_size=32)  # fmt: skip


def test_validate_follows_the_checkpoint(data, learned, capsys):
    last = rows(learned / "summary.csv")[-1]
    assert command("validate", str(data), "--weights", str(learned), "--device", "cpu", "-j", "0") == 0
    text = capsys.readouterr().out
    found = {title.strip(): top1 for title, top1 in re.findall(r"^  (\w[\w, ]+?) +top-1 ([\d.]+)%", text, re.M)}
    assert set(found) == {"best", "last", "last, moving average"}
    assert float(found["last"]) == pytest.approx(float(last["eval_top1"]), abs=1e-3)
    assert float(found["last, moving average"]) == pytest.approx(float(last["ema_top1"]), abs=1e-3)
    assert "15 images" in text and "32 x 32" in text
    # The folder of the classes itself, by another batch size; and fewer classes, by their names.
    folder = str(data / "validation")
    argv = ["validate", folder, "--weights", str(learned / "last.safetensors"), "--device", "cpu", "-j", "1", "-b", "4"]
    assert command(*argv) == 0
    assert float(re.search(r"top-1 ([\d.]+)%", capsys.readouterr().out)[1]) == float(found["last"])


def test_validate_names_classes_rightly(data, learned, tmp_path, capsys):
    shutil.copytree(data / "validation", tmp_path / "validation")
    shutil.rmtree(tmp_path / "validation" / "blue")  # green and red would be 0 and 1 by themselves
    argv = ["validate", str(tmp_path), "--weights", str(learned / "last.safetensors"), "--device", "cpu", "-j", "0"]
    assert command(*argv) == 0
    assert float(re.search(r"top-1 ([\d.]+)%", capsys.readouterr().out)[1]) > 90
    (tmp_path / "validation" / "red").rename(tmp_path / "validation" / "violet")
    assert command(*argv) == 1
    assert "violet" in capsys.readouterr().err
    torch.save(load_file(learned / "last.safetensors"), tmp_path / "bare.pth")
    argv[3] = str(tmp_path / "bare.pth")
    assert command(*argv) == 2
    assert "--model" in capsys.readouterr().err


def test_validate_of_a_file_without_a_card_is_by_the_released_crop(tmp_path, data, capsys):
    model = timm.create_model("groupmamba_tiny", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    argv = ["validate", str(data), "--weights", str(tmp_path / "bare.pth"), "--model", "groupmamba_tiny"]
    assert command(*argv, "--device", "cpu", "-j", "0") == 0
    assert "224 x 224" in capsys.readouterr().out
    _, card = model_of(tmp_path / "bare.pth", "groupmamba_tiny")
    assert (card.img_size, card.crop_pct, card.interpolation, card.num_classes) == (224, 0.875, "bicubic", 3)


def test_a_file_without_a_card_has_the_settings_of_timm(tmp_path, data, capsys):
    """Of another model its own size, crop and interpolation."""
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    _, card = model_of(tmp_path / "bare.pth", "test_vit")
    cfg = model.pretrained_cfg
    assert (card.img_size, card.crop_pct) == (160, 0.95) == (cfg["input_size"][-1], cfg["crop_pct"])
    assert card.interpolation == cfg["interpolation"]
    argv = ["validate", str(data), "--weights", str(tmp_path / "bare.pth"), "--model", "test_vit", "--device", "cpu"]
    assert command(*argv, "-j", "0") == 0
    assert "160 x 160" in capsys.readouterr().out


def test_a_size_that_a_model_does_not_take_is_one_line(tmp_path, data, capsys):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    argv = ["--weights", str(tmp_path / "bare.pth"), "--model", "vit_tiny_patch16_224", "--device", "cpu"]
    assert command("validate", str(data), *argv, "--model-kwargs", "depth=1", "--img-size", "96") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--model vit_tiny_patch16_224 does not take images of 96 x 96 pixels" in line


def test_fine_tuning_starts_from_the_weights(data, learned, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        train(data, run, "--epochs", "1", *PLAIN, "--lr", "1e-6", "--weights", str(learned / "last.safetensors")) == 0
    )
    assert float(losses(run)[0]) < 0.3
    others = make_pictures(tmp_path / "two", names=("a", "b", "c"))
    shutil.rmtree(others / "train" / "c")
    shutil.rmtree(others / "validation" / "c")
    capsys.readouterr()
    assert train(others, tmp_path / "other", "--epochs", "1", *PLAIN, "--weights", str(learned)) == 0
    assert "another number of classes (3 in place of 2): dist_head.bias" in capsys.readouterr().err


def test_distillation_from_a_teacher_of_the_same_script(data, learned, tmp_path, capsys):
    run = tmp_path / "run"
    more = ["--epochs", "2", *LEARN, "--kd-model-path", str(learned / "best.safetensors"), "--task-loss-weight", "0"]
    assert train(data, run, *more) == 0
    assert not any("without distillation" in line for line in lines_of(capsys))
    assert float(losses(run)[-1]) < 0.7 * float(losses(run)[0])
    # With no weight on the labels, head learns nothing but by decay, dist_head learns.
    weights = load_file(run / "last.safetensors")
    torch.manual_seed(42)
    before = timm.create_model("groupmamba_tiny", num_classes=3, **SIZES).state_dict()
    moved = {name: (weights[f"{name}.weight"] - before[f"{name}.weight"]).abs().max() for name in ("head", "dist_head")}
    assert moved["head"] < 1e-3 < 1e-2 < moved["dist_head"]


def test_another_architecture_as_a_teacher(data, tmp_path, capsys):
    assert train_other(data, tmp_path / "teacher", "test_resnet") == 0
    assert "without distillation: test_resnet has no distillation head" in capsys.readouterr().err
    path = str(tmp_path / "teacher" / "last.safetensors")
    assert train(data, tmp_path / "run", "--epochs", "1", *PLAIN, "--kd-model-path", path) == 0
    others = make_pictures(tmp_path / "others", names=("a", "b", "c"))
    assert train(others, tmp_path / "no", "--epochs", "1", "--kd-model-path", path) == 1
    assert "knows other classes than the student: blue" in lines_of(capsys)[-1]
    assert train(data, tmp_path / "no", "--kd-model-path", path, "--kd-model-name", "resnet18") == 2
    assert "--model resnet18 is not the test_resnet" in lines_of(capsys)[-1]


def train_other(data, run, model):
    argv = ["train", str(data), "--output", str(run), "--model", model, "--device", "cpu", "--img-size", "32"]
    return command(*argv, "-b", "8", "-j", "0", "--epochs", "1", "--drop-path", "0")


def test_a_teacher_keeps_its_own_classes(data, tmp_path, capsys):
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "seven.pth")
    more = ["--kd-model-name", "test_resnet", "--kd-model-path", str(tmp_path / "seven.pth")]
    assert train(data, tmp_path / "run", *more) == 1
    assert lines_of(capsys) == ["groupmamba train: the teacher test_resnet knows 7 classes and the student 3"]
    assert not (tmp_path / "run").exists()


def test_a_teacher_sees_images_normalised_its_own_way():
    torch.manual_seed(0)
    model = torch.nn.Identity()
    image = torch.rand(2, 3, 4, 4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    own_mean, own_std = (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)

    def normal(mean, std):
        return (image - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    knows = teacher.Teacher(model, mean, std, own_mean, own_std)
    torch.testing.assert_close(knows(normal(mean, std)), normal(own_mean, own_std))
    same = teacher.Teacher(model, mean, std, mean, std)
    assert same(image) is image


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys, monkeypatch):
    original, run = step.Step.body, tmp_path / "run"

    def spoiled(self, pieces):
        loss = original(self, pieces)
        spoiled.calls += 1
        return loss * float("nan") if spoiled.calls == 4 else loss

    spoiled.calls = 0
    monkeypatch.setattr(step.Step, "body", spoiled)
    assert train(data, run, "--epochs", "1", "--checkpoint-steps", "2", "--log-interval", "50") == 1
    last = lines_of(capsys)[-1]
    assert "the loss is nan at step 3 (epoch 1)" in last and str(run / "checkpoints" / "step-00000002") in last
    listed = (run / "not_finite.txt").read_text().splitlines()
    assert len(listed) == 8 and all("/train/" in line for line in listed)
    assert listed[0].split("\t")[0] in last
    assert len(losses(run)) == 2
    monkeypatch.setattr(step.Step, "body", original)
    assert train(data, run, "--epochs", "1", "--checkpoint-steps", "2") == 0
    assert len(losses(run)) == 5


def test_weights_that_are_not_finite_are_no_checkpoint(data, tmp_path, capsys, monkeypatch):
    original = step.Step.body

    def spoiled(self, pieces):
        loss = original(self, pieces)
        with torch.no_grad():
            self.model.head.weight[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(step.Step, "body", spoiled)
    assert train(data, tmp_path / "run", "--epochs", "1", "--checkpoint-steps", "1") == 1
    assert "weights are not finite after step 1 (head.weight)" in lines_of(capsys)[-1]
    assert not any((tmp_path / "run").glob("checkpoints/step*"))


@pytest.mark.parametrize(
    "more",
    [
        ["--amp"],
        ["--model-ema-warmup"],
        ["--no-model-ema"],
        ["--layer-decay", "0.8", "--grad-checkpointing"],
        ["--mixup-mode", "elem", "--mixup-off-epoch", "1"],
        ["--sched", "tanh", "--opt", "lion"],
        ["--sched", "poly", "--opt", "sgd", "--clip-mode", "agc", "--clip-grad", "0.01"],
        ["--sched", "constant", "--warmup-epochs", "1", "--warmup-prefix", "--val-interval", "2"],
    ],
    ids=lambda more: more[0],
)
def test_other_recipes(data, tmp_path, more):
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "2", "--lr", "1e-3", *more) == 0
    summary = rows(run / "summary.csv")
    assert len(summary) == (3 if "--warmup-prefix" in more else 2) and summary[-1]["eval_top1"]
    assert (summary[-1]["ema_top1"] == "") == ("--no-model-ema" in more)
    assert (summary[0]["eval_top1"] == "") == ("--val-interval" in more)
    assert len(set(losses(run))) > 5


def test_the_worst_checkpoints_make_room(tmp_path):
    held = checkpoint.Checkpoints(tmp_path, keep=2)
    card, values = Card("groupmamba_tiny", 3), {"weight": torch.zeros(3)}
    metrics = {10: (50.0, "model.safetensors"), 20: (70.0, "ema.safetensors"), 30: (70.0, "model.safetensors")}
    metrics.update({40: (60.0, "model.safetensors"), 50: (40.0, "ema.safetensors")})
    for step_number in (10, 20, 25, 30, 40, 50):
        values["weight"] += 1
        held.write(step_number, values, {"weight": -values["weight"]}, card, {"step": step_number})
        known = {k: v for k, v in metrics.items() if k <= step_number}
        held.prune(known)
        held.link_best(known)
    assert [path.name[-2:] for path in held.found()] == ["50", "30", "20"]  # of equals the earlier is better
    assert load_file(tmp_path / "best.safetensors")["weight"][0] == -2
    assert load_file(tmp_path / "last.safetensors")["weight"][0] == 6
    assert checkpoint.read_state(held.found()[0]) == {"step": 50}


def test_a_progress_bar_on_a_terminal(data, tmp_path, monkeypatch):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with open(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        assert train(data, tmp_path / "run", "--epochs", "1") == 0
    text = os.read(master, 1 << 20).decode()
    os.close(master)
    assert "epoch 1/1:" in text and re.search(r"/5 \[\d\d:\d\d<", text) and "img/s" in text and "lr " in text


def test_mixing_ends_at_its_epoch(data, tmp_path, monkeypatch):
    seen = []
    original = step.Step.body

    def body(self, pieces):
        seen.append(pieces[0][1].max(1).values.min().item())
        return original(self, pieces)

    monkeypatch.setattr(step.Step, "body", body)
    more = ["--epochs", "2", "--mixup-off-epoch", "1", "--smoothing", "0", "--cutmix", "0", "--mixup", "50"]
    assert train(data, tmp_path / "run", *more) == 0
    assert len(seen) == 10 and all(value == 1 for value in seen[5:])
    labels = [value for value in seen[:5] if value < 1]
    assert len(labels) >= 3  # of batches with pairs of other classes, mixed about half and half


def test_a_line_that_a_killed_process_began_is_none(tmp_path):
    table = output.Table(tmp_path / "table.csv", ("step", "loss"))
    table.begin(0)
    table.add([{"step": i, "loss": 0.5 + i} for i in range(12)])
    with open(table.path, "a") as file:
        file.write("12,0.")
    assert [row["step"] for row in table.rows()] == [str(i) for i in range(12)]
    table.begin(11)
    table.add([{"step": 11, "loss": 3}])
    assert [row["loss"] for row in table.rows()[-2:]] == ["10.5", "3"]


assert groupmamba.models
