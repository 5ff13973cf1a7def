# SPDX-License-Identifier: Apache-2.0
"""The benchmark of detectors and segmenters, in little on the CPU: its rows, its file, its errors."""

import json
import subprocess
import sys

import pytest

from support.bench import ROOT
from support.training import environment

pytest.importorskip("timm")
pytest.importorskip("segmentation_models_pytorch", reason="needs the extra 'vision'")
pytest.importorskip("safetensors", reason="needs the extra 'train'")


def run(*arguments):
    argv = [sys.executable, str(ROOT / "bench" / "dense.py"), "--device", "cpu", "--quick", *arguments]
    return subprocess.run(argv, env=environment(), text=True, capture_output=True)


def test_rows_and_file(tmp_path):
    file = tmp_path / "out.json"
    chosen = ["fpn-varied", "mask_rcnn", "upernet"]
    small = ["--models", "groupmamba_tiny", "convnext_atto", "--no-compile", "--json", str(file)]
    done = run(*small, "--cases", *chosen)
    assert done.returncode == 0, done.stderr
    assert run(*small, "--cases", "fpn-800", "--append").returncode == 0
    first, second = json.loads(file.read_text())
    assert list(first["dense"]) == chosen and list(second["dense"]) == ["fpn-800"]
    for case in first["dense"].values():
        assert set(case["rows"]) == {"groupmamba_tiny, as called", "convnext_atto, as called"}
        assert all(row["img_per_s"] > 0 and len(row["rounds"]) == 2 for row in case["rows"].values())
    assert first["dense"]["fpn-varied"]["sizes"] == [[64, 96], [96, 64]]
    assert done.stdout.count("| `groupmamba_tiny` |") == 3 and "| 1.00 |" in done.stdout


def test_an_unknown_model_is_one_line():
    done = run("--models", "nothing", "--cases", "fpn-512")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'nothing'" in done.stderr
    done = run("--cases", "nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
