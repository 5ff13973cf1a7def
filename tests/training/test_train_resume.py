# SPDX-License-Identifier: Apache-2.0
"""Runs that were killed go on as if they had not been: every loss bit for bit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.training import KWARGS, SMALL, command, environment, losses, make_pictures, rows, train

for package in ("timm", "torchvision", "yaml", "safetensors"):
    pytest.importorskip(package, reason="needs the extra 'train'")


from safetensors.torch import load_file  # noqa: E402

from groupmamba.training import checkpoint  # noqa: E402
from groupmamba.training.classification import Classification  # noqa: E402
from groupmamba.training.step import Step  # noqa: E402
from groupmamba_ext._command import CommandError  # noqa: E402

# RandAugment, erasing, mixup and CutMix are the recipe's own.
ALL_RANDOM = ["--epochs", "3", "--drop-path", "0.2", "--drop", "0.1", "--lr", "1e-3", "--checkpoint-steps", "2"]
ALL_RANDOM += ["--model-ema-decay", "0.9"]
MOMENTS = (
    "step:2", "step:4", "average:3", "flush:2", "row:4", "rename:1", "flush:3", "validation:1", "remove:2", "link:4",
    "step:1",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """Weights of a teacher that the same script trained."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert train(data, run, "--epochs", "1", "--lr", "1e-3") == 0
    return run / "last.safetensors"


@pytest.fixture(scope="module")
def unbroken(data, teacher, tmp_path_factory):
    """As the runs that are killed, in a process of one thread: the order of a sum depends on how many there are."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    argv = ["train", str(data), "--output", str(run), *SMALL, *ALL_RANDOM, "--kd-model-path", str(teacher)]
    subprocess.run([sys.executable, "-m", "groupmamba", *argv], check=True, capture_output=True, env=environment())
    assert len(losses(run)) == 15
    return run


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_a_killed_run_goes_on_bit_for_bit(data, teacher, unbroken, tmp_path, workers):
    run = tmp_path / "run"
    options = [*ALL_RANDOM, "--kd-model-path", str(teacher), "-j", workers]
    argv = ["train", str(data), "--output", str(run), *SMALL, *options]
    script = str(Path(__file__).parents[1] / "support" / "killed_runs.py")
    done = subprocess.run(
        [sys.executable, script, *MOMENTS, "--", *argv], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(unbroken)
    for column in ("epoch", "step", "train_loss", "eval_loss", "eval_top1", "ema_loss", "lr"):
        assert [row[column] for row in rows(run / "summary.csv")] == [
            row[column] for row in rows(unbroken / "summary.csv")
        ]
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = (load_file(folder / name) for folder in (run, unbroken))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert done.stderr.count("going on from") >= 8


def test_the_seed_is_what_decides(data, teacher, unbroken, tmp_path):
    assert train(data, tmp_path / "run", *ALL_RANDOM, "--kd-model-path", str(teacher), "--seed", "43") == 0
    other, same = losses(tmp_path / "run"), losses(unbroken)
    assert not set(other) & set(same)


def test_resume_from_another_run_and_anew(data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(data, first, "--epochs", "2") == 0
    early = sorted((first / "checkpoints").iterdir())[0]
    assert train(data, second, "--epochs", "2", "--resume", str(early)) == 0
    assert [row["loss"] for row in rows(second / "steps.csv")] == losses(first)[5:]
    assert train(data, second, "--epochs", "2", "--resume", "none") == 0
    assert losses(second) == losses(first)
    capsys.readouterr()
    assert command("train", "--output", str(second)) == 0  # options are those of the run
    said = capsys.readouterr().err
    assert "is complete: 2 epochs" in said and "going on from" not in said


@pytest.mark.parametrize(
    "more",
    [
        ["--min-lr", "0.9"], ["--warmup-lr", "1"], ["--layer-decay", "0.5"], ["--no-amp"], ["--amp-dtype", "bfloat16"],
        ["--kd-model-name", "resnet10t"], ["--num-classes", "9"], ["--lr", "0.3"], ["--seed", "1"],
    ],
)  # fmt: skip
def test_an_option_differs_also_where_the_run_was_begun_without_it(unbroken, tmp_path, capsys, more):
    """And what the run has written stays as it is."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    written = (run / "args.yaml").read_bytes()
    assert command("train", "--output", str(run), *more) == 2
    said = capsys.readouterr().err
    assert f"{more[0]} " in said and "differs from the" in said and len(said.splitlines()) == 1, said
    assert (run / "args.yaml").read_bytes() == written


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_on_a_gpu_goes_on_bit_for_bit(data, teacher, tmp_path, capsys, dtype):
    """In a CUDA graph, and with float16's scaler without one; with all that is random, an average and a teacher."""
    first, second = tmp_path / "first", tmp_path / "second"
    more = [*ALL_RANDOM, "--device", "cuda", "--img-size", "64", "--amp-dtype", dtype, "--kd-model-path", str(teacher)]
    assert train(data, first, *more) == 0
    said = capsys.readouterr().err
    assert ("scaler" in said) == (dtype == "float16") and ("is one CUDA graph" in said) == (dtype == "bfloat16")
    early = sorted((first / "checkpoints").iterdir())[0]
    assert train(data, second, *more, "--resume", str(early)) == 0
    assert [row["loss"] for row in rows(second / "steps.csv")] == losses(first)[5:]
    ours, theirs = (load_file(run / "last.safetensors") for run in (first, second))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("error", [CommandError, KeyboardInterrupt])
def test_a_validation_that_ends_the_run_costs_no_step(error, data, tmp_path, monkeypatch, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(data, whole, "--epochs", "2") == 0
    real = Classification.evaluate

    def evaluate(self, *args):
        raise error("an image of this validation")

    monkeypatch.setattr(Classification, "evaluate", evaluate)
    assert train(data, run, "--epochs", "2") == (1 if error is CommandError else 130)
    assert f"started again, {run} goes on with this validation" in capsys.readouterr().err
    monkeypatch.setattr(Classification, "evaluate", real)
    monkeypatch.setattr(Step, "__call__", _counted(Step.__call__, calls := []))
    assert train(data, run, "--epochs", "2") == 0
    assert len(calls) == 5 and losses(run) == losses(whole)  # the steps of the second epoch alone
    for column in ("epoch", "step", "train_loss", "eval_loss", "ema_loss", "lr"):
        assert [row[column] for row in rows(run / "summary.csv")] == [
            row[column] for row in rows(whole / "summary.csv")
        ]


def _counted(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def test_the_best_weights_are_linked_by_whoever_comes_next(data, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(data, whole, "--epochs", "1") == 0
    real = checkpoint.Checkpoints.link

    def link(self, name, weights):
        if name == "best":
            raise KeyboardInterrupt
        real(self, name, weights)

    monkeypatch.setattr(checkpoint.Checkpoints, "link", link)
    assert train(data, run, "--epochs", "1") == 130
    monkeypatch.undo()
    assert train(data, run, "--epochs", "1") == 0
    ours, theirs = (load_file(folder / "best.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_goes_on_by_its_own_file_of_options(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "1") == 0
    capsys.readouterr()
    assert command("train", "--config", str(run / "args.yaml"), "--output", str(run), "--device", "cpu") == 0
    assert "is complete" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_its_options(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "1") == 0
    before = (run / "steps.csv").read_bytes()
    for options, words in (
        (["--epochs", "2"], ("--epochs 2", "the 1 of the run")),
        (["--epochs", "1", "-b", "4"], ("--batch-size 4", "takes 8")),
        (["--epochs", "1", "--mixup", "0.5"], ("--mixup 0.5", "0.8")),
    ):
        capsys.readouterr()
        assert train(data, run, *options) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert (run / "steps.csv").read_bytes() == before


def test_other_images_are_another_run(data, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    shutil.copytree(data, pictures)
    assert train(pictures, tmp_path / "run", "--epochs", "1") == 0
    (pictures / "train" / "red" / "3.png").unlink()
    capsys.readouterr()
    assert train(pictures, tmp_path / "run", "--epochs", "1") == 1
    assert "holds 41 images, and the run that goes on had 42" in capsys.readouterr().err


def test_a_spoiled_checkpoint_is_passed_over(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "2") == 0
    expected = losses(run)
    last = sorted((run / "checkpoints").iterdir())[-1]
    state = last / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert train(data, run, "--epochs", "2") == 0
    assert f"{last} is no checkpoint that can be read" in capsys.readouterr().err
    assert losses(run) == expected
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.pt").write_bytes(b"nothing")
    assert train(data, run, "--epochs", "2") == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("holds no checkpoint that can be read")


def test_a_checkpoint_is_what_its_folder_says(data, tmp_path):
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "1", "--checkpoint-steps", "2") == 0
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000005"]  # those inside the epoch make room
    folder = run / "checkpoints" / names[0]
    state = torch.load(folder / "state.pt", weights_only=True)
    assert (state["step"], state["epoch"], state["batch"]) == (5, 1, 0)
    assert (run / "last.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    import timm

    options = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "stem_dim": 8, "mlp_ratios": (2, 2, 2, 2)}
    assert set(options) == {text.partition("=")[0] for text in KWARGS}
    for weights in (folder / "model.safetensors", folder / "ema.safetensors", folder):
        timm.create_model("groupmamba_tiny", num_classes=3, weights=str(weights), **options)
    shutil.rmtree(run)
