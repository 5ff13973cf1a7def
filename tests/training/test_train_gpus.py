# SPDX-License-Identifier: Apache-2.0
"""``groupmamba train`` on two GPUs over NCCL: graphs, statistics, repeats, and a process that is killed."""

import os
import signal
import time

import pytest
import torch

from support.training import PLAIN, SMALL, children, command, losses, make_pictures, rows, torchrun

pytest.importorskip("timm")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
TWICE = [*SMALL, "--device", "cuda", "--img-size", "64", "--epochs", "2", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=50)  # 18 steps of 8


def two(data, run, *more):
    """What a run on two GPUs said."""
    process = torchrun(2, ["train", str(data), "--output", str(run), *TWICE, "-b", "4", *more])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def numbers(run):
    return [float(row["loss"]) for row in rows(run / "steps.csv")]


@pytest.mark.parametrize("teacher", [False, True])
def test_repeats_and_graphs_are_bitwise_equal(data, tmp_path, teacher):
    """With mixing, RandAugment, erasing, drop path and a moving average."""
    more = ["--drop-path", "0.2"]
    if teacher:
        assert command("train", str(data), "--output", str(tmp_path / "teacher"), *TWICE, "--epochs", "1") == 0
        more += ["--kd-model-path", str(tmp_path / "teacher" / "last.safetensors")]
    said = two(data, tmp_path / "first", *more)
    assert "each step is one CUDA graph" in said and "without a CUDA graph" not in said
    two(data, tmp_path / "second", *more)
    assert "without a CUDA graph: --no-cuda-graph" in two(data, tmp_path / "eager", *more, "--no-cuda-graph")
    assert len(losses(tmp_path / "first")) == 36
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert losses(tmp_path / "first") == losses(tmp_path / "eager")


@pytest.mark.parametrize("norms", ["--freeze-bn", "--sync-bn"])
def test_two_gpus_give_the_losses_of_one(data, tmp_path, norms):
    more = [*PLAIN, norms, "--no-amp", "--lr", "1e-3"]
    alone = [*TWICE, "-b", "8", *more]
    if norms == "--sync-bn":
        alone.remove(norms)
    assert command("train", str(data), "--output", str(tmp_path / "one"), *alone) == 0
    two(data, tmp_path / "two", *more)
    assert numbers(tmp_path / "two")[:10] == pytest.approx(numbers(tmp_path / "one")[:10], abs=2e-3)
    assert numbers(tmp_path / "two")[-1] < numbers(tmp_path / "two")[0]


def test_a_killed_process_ends_all_and_one_gpu_goes_on(data, tmp_path):
    run = tmp_path / "run"
    argv = ["train", str(data), "--output", str(run), *TWICE, "-b", "4", "--epochs", "40", "--checkpoint-steps", "2"]
    process = torchrun(2, [*argv, "--checkpoint-hist", "1"])
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(children(process)[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0 and time.monotonic() - began < 120
    said = [line for line in err.splitlines() if line.startswith("groupmamba train:")]
    assert len(said) <= 1 and "groupmamba/training" not in err, err
    done = len(losses(run))
    argv = [argument for argument in argv if argument not in ("-b", "4", "8")]
    argv[argv.index("--epochs") + 1] = "40"
    assert command(*argv) == 0
    assert len(losses(run)) == 40 * 18 > done
