# SPDX-License-Identifier: Apache-2.0
"""Several processes of ``groupmamba train`` over gloo on the CPU."""

import os
import signal
import time

import pytest

from support.training import PLAIN, SMALL, children, command, losses, make_pictures, rows, torchrun

pytest.importorskip("timm")

STILL = [*PLAIN, "--freeze-bn", "--lr", "1e-2", "--epochs", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=15)  # 45 of 8 a step, and 15 of two processes


def arguments(data, run, batch, *more):
    return ["train", str(data), "--output", str(run), *SMALL, "-b", str(batch), *STILL, *more]


def numbers(run, column="loss", name="steps.csv"):
    return [float(row[column]) for row in rows(run / name)]


def test_two_processes_give_the_losses_of_one(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(*arguments(data, one, 8)) == 0
    process = torchrun(2, arguments(data, two, 4))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(losses(two)) == 10 and numbers(two) == pytest.approx(numbers(one), abs=2e-5)
    assert numbers(two)[-1] < numbers(two)[0]
    for column in ("eval_top1", "ema_top1"):
        assert numbers(two, column, "summary.csv") == numbers(one, column, "summary.csv")
    assert numbers(two, "eval_loss", "summary.csv") == pytest.approx(numbers(one, "eval_loss", "summary.csv"), abs=1e-4)
    assert sum("epoch 1/2:" in line for line in err.splitlines()) == 1  # one process speaks


def test_one_process_goes_on_from_what_two_wrote(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(*arguments(data, one, 8)) == 0
    process = torchrun(2, arguments(data, two, 4, "--checkpoint-steps", "2", "--checkpoint-hist", "1"))
    deadline = time.monotonic() + 120
    while not list(two.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = children(process)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "groupmamba/training" not in err, err  # no traceback of this project's
    said = [line for line in err.splitlines() if line.startswith("groupmamba train:")]
    assert len(said) <= 1 and all("another process of this run has ended" in line for line in said), err
    argv = arguments(data, two, 8)
    while "-b" in argv:  # the images a step of all processes are those of the run
        del argv[argv.index("-b") : argv.index("-b") + 2]
    assert command(*argv) == 0
    assert len(losses(two)) == 10 and numbers(two) == pytest.approx(numbers(one), abs=2e-5)


def test_an_error_of_all_processes_is_one_line(data, tmp_path):
    process = torchrun(2, ["train", str(data), "--output", str(tmp_path / "run"), *SMALL, "--num-classes", "9"])
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("groupmamba train:")]
    assert len(said) == 1 and "--num-classes 9" in said[0], err


def test_variables_that_torchrun_did_not_set(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(*arguments(data, tmp_path / "run", 4)) == 1
    assert "without LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert command(*arguments(data, tmp_path / "run", 4)) == 1
    assert "WORLD_SIZE" in capsys.readouterr().err
