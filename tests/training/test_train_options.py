# SPDX-License-Identifier: Apache-2.0
"""Options of ``groupmamba train``: the released recipe, help, files, and one line for whatever is wrong."""

import argparse

import pytest

from groupmamba.training import options
from groupmamba.training.option_table import TRAIN
from groupmamba.training.recipe import DEFAULTS, RECIPE, rates
from support.training import SMALL, command, losses, make_pictures, rows, train

yaml = pytest.importorskip("yaml")
pytest.importorskip("timm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def refused(argv, capsys):
    """Exit status and message of a command that must print one line on stderr, and nothing else."""
    capsys.readouterr()
    status = command(*argv)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("groupmamba"), captured
    return status, lines[0]


def test_the_released_recipe():
    args = options.complete({"data": "somewhere"})
    expected = {
        "model": "groupmamba_tiny", "img_size": 224, "batch_size": 128, "epochs": 300, "opt": "adamw",
        "opt_eps": 1e-8, "opt_betas": (0.9, 0.999), "weight_decay": 0.05, "clip_grad": 5.0, "clip_mode": "norm",
        "sched": "cosine", "warmup_epochs": 20, "scale": (0.08, 1.0), "train_interpolation": "bicubic",
        "interpolation": "bicubic", "crop_pct": 0.875, "color_jitter": 0.4, "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25, "remode": "pixel", "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
        "mixup_mode": "batch", "smoothing": 0.1, "drop": 0.0, "drop_path": 0.05, "model_ema": True,
        "model_ema_decay": 0.9999, "kd_token_distill_type": "hard", "task_loss_weight": 0.5, "kd_temperature": 1.0,
        "no_kd": False, "kd_model_name": None, "decay_all": False, "sync_bn": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert rates(1024) == pytest.approx((1e-3, 1e-6, 1e-5), rel=1e-12)
    assert rates(512) == (5e-4, 5e-7, 5e-6)
    assert rates(128, lr=0.1, warmup_lr=0.01, min_lr=0.0) == (0.1, 0.01, 0.0)
    assert rates(128, lr_base_scale="sqrt").lr == 2.5e-4
    assert all(value.source for value in RECIPE) and len(DEFAULTS) == len(RECIPE)
    assert not set(DEFAULTS) - set(TRAIN.options)


def test_help_fits_a_screen_and_the_long_one_has_everything(capsys):
    assert command("train", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert command("train", "--help-all") == 0
    text = capsys.readouterr().out
    assert all(f"--{option.name}" in text for option in TRAIN.options.values())
    assert all(f"{title}:" in text for title in TRAIN.groups)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ("DATA", "train/")),
        (["{data}", "--batch-size", "0"], ("--batch-size", "of at least 1", "'0'")),
        (["{data}", "--batch-size", "x"], ("--batch-size", "'x'")),
        (["{data}", "--batch-size", "4000"], ("--batch-size 4000", "42 training images")),
        (["{data}", "--batch-size", "7"], ("--batch-size 7", "even")),
        (["{data}", "--lr", "nan"], ("--lr", "'nan'")),
        (["{data}", "--lr", "-1"], ("--lr", "'-1'")),
        (["{data}", "--lr", "0"], ("--lr", "above 0", "'0'")),
        (["{data}", "--mixup", "1e400"], ("--mixup", "'1e400'")),
        (["{data}", "--opt-betas", "0.9"], ("--opt-betas", "2")),
        (["{data}", "--opt", "nonsense"], ("--opt nonsense",)),
        (["{data}", "--opt", "adahessian"], ("--opt adahessian", "second derivatives")),
        (["{data}", "--aa", "nonsense"], ("--aa nonsense",)),
        (["{data}", "--aa", "rand-q9"], ("--aa rand-q9",)),
        (["{data}", "--sched", "up"], ("--sched", "'up'")),
        (["{data}", "--scale", "0.9", "0.1"], ("--scale", "0.9 0.1")),
        (["{data}", "--warmup-epochs", "3", "--epochs", "3"], ("--warmup-epochs 3", "--epochs 3")),
        (["{data}", "--model", "groupmamba_huge"], ("--model", "'groupmamba_huge'")),
        (["{data}", "--model-kwargs", "depths=(1,1)"], ("groupmamba_tiny", "depths")),
        (["{data}", "--model-kwargs", "nonsense=1"], ("groupmamba_tiny", "; --model-kwargs nonsense=... gives it")),
        (["{data}", "--model-kwargs", f"directions={('lr',) * 8}"], ("dims must be multiples of 8", "348", "352")),
        (["{data}", "--model-kwargs", "=1"], ("--model-kwargs", "'=1'")),
        (["{data}", "--model-kwargs", "num_classes=5"], ("--model-kwargs num_classes=5", "the data")),
        (["{data}", "--model-kwargs", "in_chans=1"], ("--model-kwargs in_chans=1", "3 channels")),
        (["{data}", "--model-kwargs", "pretrained=True"], ("--model-kwargs pretrained=True", "--pretrained")),
        (["{data}", "--model-kwargs", "features_only=True"], ("--model-kwargs features_only=True",)),
        (["{data}", "--model-kwargs", "name=a", "option=b"], ("groupmamba_tiny", "'name'")),
        (["{data}", "--model-kwargs", "dims=3"], ("groupmamba_tiny", "dims must be a sequence, got 3")),
        (["{data}", "--model-kwargs", "global_pool="], ("groupmamba_tiny", "3 values", "(1, 448, 1, 1)")),
        (["{data}", "--model", "vit_tiny_patch16_224", "--model-kwargs"], ("vit_tiny_patch16_224", "32 x 32", "224")),
        (["{data}", "--num-classes", "1"], ("--num-classes", "'1'")),
        (["{data}", "--no-kd", "--kd-model-name", "resnet18"], ("--no-kd", "--kd-model-name resnet18")),
        (["{data}", "--kd-model-name", "resnet_none"], ("--kd-model-name", "'resnet_none'")),
        (["{data}", "--weights", "a", "--pretrained"], ("--weights", "--pretrained")),
        (["{data}", "--sync-bn"], ("--sync-bn", "GPU")),
        (["{data}", "--fly"], ("groupmamba train: ", "--fly", "groupmamba train --help")),
        (["{data}", "--modle", "resnet18"], ("--modle resnet18; is --model meant?",)),
        ([""], ("DATA", "must be a path, got ''")),
        (["{data}", "--weights", ""], ("--weights", "must be a path, got ''")),
        (["{data}", "--config", "{tmp}/none.yaml"], ("--config", "none.yaml")),
    ],
)
def test_wrong_arguments_are_one_line(argv, words, data, tmp_path, capsys):
    argv = [text.format(data=data, tmp=tmp_path) for text in argv]
    small = [] if "--model-kwargs" in argv else SMALL[-5:]
    defaults = ["--device", "cpu", "--img-size", "32", "-j", "0", "--output", str(tmp_path / "run"), *small]
    status, line = refused(["train", *argv, *defaults], capsys)
    assert status == 2 and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{tmp}/nothing"], ("nothing", "no folder")),
        (["{data}", "--num-classes", "5"], ("--num-classes 5", "3 classes")),
        (["{data}", "--weights", "{tmp}/none.pth"], ("--weights", "none.pth")),
        (["{data}", "--resume", "{tmp}/none"], ("--resume", "none")),
        (["{data}", "--kd-model-path", "{tmp}/none.pth"], ("--kd-model-path", "none.pth")),
        (["{data}", "--kd-model-name", "resnet18"], ("teacher resnet18",)),
        (["{data}", "--weights", "{text}"], ("text.pth", "UnpicklingError: Unsupported operand 110)")),
    ],
)
def test_what_is_not_there_is_one_line(argv, words, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text.pth").write_text("no weights")
    argv = [text.format(data=data, tmp=tmp_path, text=tmp_path / "text.pth") for text in argv]
    status, line = refused(["train", *argv, "--output", str(tmp_path / "run"), *SMALL], capsys)
    assert status == 1 and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_an_output_that_cannot_be_is_one_line_before_any_work(place, data, tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("something")
    monkeypatch.setattr("groupmamba.training.classification.Folder", None)  # nothing is read
    status, line = refused(["train", str(data), *SMALL, "--output", str(tmp_path / place)], capsys)
    assert status == 1 and "--output" in line and str(tmp_path / place) in line, line
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "something"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: fast", ("lr", "'fast'")),
        ("lr: [1, 2]", ("lr", "[1, 2]")),
        ("epochs: 2.5", ("epochs", "'2.5'")),
        ("output: ''", ("output", "must be a path, got ''")),
        ("data: ''", ("data", "''")),
        ("nonsense: 1", ("unknown option 'nonsense'",)),
        ("model_ema: maybe", ("model_ema", "'maybe'")),
        ("opt_betas: [0.9]", ("opt_betas", "[0.9]")),
        ("sched: up", ("sched", "'up'")),
        ("- 1", ("list",)),
        ("a: [", ("--config",)),
    ],
)
def test_wrong_files_of_options_are_one_line(text, words, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(text)
    status, line = refused(["train", "somewhere", "--config", str(tmp_path / "options.yaml")], capsys)
    assert status == 2 and all(word in line for word in words), line


def test_args_yaml_trains_the_same_again(data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    more = [
        "--epochs",
        "2",
        "--lr",
        "1e-3",
        "--warmup-epochs",
        "1",
        "--opt-betas",
        "0.8",
        "0.99",
        "--clip-mode",
        "value",
    ]
    assert train(data, first, *more) == 0
    assert command("train", "--config", str(first / "args.yaml"), "--device", "cpu", "--output", str(second)) == 0
    assert losses(first) == losses(second)
    assert (first / "args.yaml").read_text() == (second / "args.yaml").read_text()
    saved = yaml.safe_load((first / "args.yaml").read_text())
    assert saved["lr"] == 1e-3 and saved["opt_betas"] == [0.8, 0.99] and saved["no_kd"] is True
    # The command line has more weight than the file.
    third = tmp_path / "third"
    argv = ["--config", str(first / "args.yaml"), "--output", str(third), "--device", "cpu", "--epochs", "3"]
    assert command("train", *argv) == 0
    assert len(rows(third / "summary.csv")) == 3


def test_every_option_can_be_given():
    parser = argparse.ArgumentParser(add_help=False)
    options.add_arguments(parser)
    for option in TRAIN.options.values():
        actions = [action for action in parser._actions if action.dest == option.dest]
        assert len(actions) == 1 and actions[0].default is argparse.SUPPRESS, option.name
    assert options.given(parser.parse_args(["here", "--no-model-ema", "--no-kd", "-b", "3"])) == {
        "data": "here",
        "model_ema": False,
        "no_kd": True,
        "batch_size": 3,
    }
