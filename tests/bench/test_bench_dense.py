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


import dense  # noqa: E402

ARGUMENTS = ("--device", "cpu", "--quick")


def run(*arguments):
    """In this process, which has imported what the program needs: its exit status."""
    return dense.main([*ARGUMENTS, *map(str, arguments)])


def test_rows_and_file(tmp_path, one_thread):
    """As a program of its own, and once more behind what that wrote."""
    file = tmp_path / "out.json"
    chosen = ["fpn-varied", "mask_rcnn", "upernet"]
    small = ["--models", "groupmamba_tiny", "convnext_atto", "--no-compile", "--json", str(file)]
    argv = [sys.executable, str(ROOT / "bench" / "dense.py"), *ARGUMENTS, *small, "--cases", *chosen]
    done = subprocess.run(argv, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert run(*small, "--cases", "fpn-800", "--append") == 0
    first, second = json.loads(file.read_text())
    assert list(first["dense"]) == chosen and list(second["dense"]) == ["fpn-800"]
    for case in first["dense"].values():
        assert set(case["rows"]) == {"groupmamba_tiny, as called", "convnext_atto, as called"}
        assert all(row["img_per_s"] > 0 and len(row["rounds"]) == 2 for row in case["rows"].values())
    assert first["dense"]["fpn-varied"]["sizes"] == [[64, 96], [96, 64]]
    assert done.stdout.count("| `groupmamba_tiny` |") == 3 and "| 1.00 |" in done.stdout


def test_an_unknown_model_is_one_line(capsys):
    assert run("--models", "nothing", "--cases", "fpn-512") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'nothing'" in said
    with pytest.raises(SystemExit) as end:
        run("--cases", "nothing")
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
