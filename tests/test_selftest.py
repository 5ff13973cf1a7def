# SPDX-License-Identifier: Apache-2.0
"""The selftest passes on what is installed, and fails when an op is wrong."""

import subprocess
import sys

import torch

import groupmamba_ext as ext
from groupmamba_ext import selftest


def test_selftest_passes():
    done = subprocess.run([sys.executable, "-m", "groupmamba_ext.selftest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout and ext.build_info()["cpu_capability"] in done.stdout


def test_selftest_notices_a_wrong_op(monkeypatch, capsys):
    right = ext.depthwise_conv3x3
    monkeypatch.setattr(ext, "depthwise_conv3x3", lambda *a, **k: right(*a, **k) * 1.1)
    assert selftest.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_reference_backend_from_the_environment():
    code = "from groupmamba_ext.backend import current_backend; print(current_backend())"
    environment = {"GROUPMAMBA_BACKEND": "reference", "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "reference", done.stderr
    environment["GROUPMAMBA_BACKEND"] = "fast"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "GROUPMAMBA_BACKEND must be one of" in done.stderr and "'fast'" in done.stderr


def test_import_is_quiet():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import groupmamba_ext"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert torch.ops.groupmamba is not None
