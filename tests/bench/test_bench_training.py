# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training, in little on the CPU: its rows, its file, its errors."""

import json
import subprocess
import sys

import pytest

from support.bench import ROOT
from support.training import environment

pytest.importorskip("timm")


def run(*arguments):
    argv = [sys.executable, str(ROOT / "bench" / "training.py"), "--device", "cpu", "--img-size", "32", *arguments]
    return subprocess.run(argv, env=environment(), text=True, capture_output=True)


def test_rows_and_file(tmp_path):
    file = tmp_path / "out.json"
    small = ["--models", "test_resnet", "--batch-size", "4", "--steps", "1", "--no-kd", "--json", str(file)]
    done = run(*small, "--pictures", "20", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert run(*small, "--append").returncode == 0
    first, second = json.loads(file.read_text())
    rows = first["training"]["test_resnet"]
    assert set(rows["steps"]) == {"bare step", "step, as called"} and "files" not in second["training"]["test_resnet"]
    assert rows["steps"]["bare step"]["of bare step"] == 1
    assert {"loader alone", "step alone", "both"} < set(rows["files"])
    for row in (*rows["steps"].values(), rows["files"]["both"]):
        assert row["img_per_s"] > 0 and row["img_per_s"] == sorted(row["rounds"])[len(row["rounds"]) // 2]
    assert first["device"]["type"] == "cpu" and first["command"].startswith("bench/training.py --device cpu")
    for words in ("bare step", "loader alone", "of the smaller"):
        assert words in done.stdout


def test_an_unknown_model_is_one_line():
    done = run("--models", "nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'nothing'" in done.stderr
