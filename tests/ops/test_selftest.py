# SPDX-License-Identifier: Apache-2.0
"""The selftest passes on what is installed, and fails when an op is wrong."""

import re
import resource
import subprocess
import sys

import pytest
import torch

import groupmamba_ext as ext
from groupmamba_ext import selftest


def test_selftest_passes():
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run([sys.executable, "-m", "groupmamba_ext.selftest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before < 60, "seconds of one core"
    assert re.search(r"^all \d+ passed$", done.stdout, re.MULTILINE)
    assert ext.build_info()["cpu_capability"] in done.stdout


def table(text):
    """The rows of the selftest's table, each a list of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_every_row_shows_errors_and_tolerances(capsys):
    assert selftest.main() == 0
    head, rule, *rows = table(capsys.readouterr().out)
    assert head == ["device", "dtype", "op", "output", "allowed", "grads", "allowed", ""]
    assert set(rule) == {"---"}
    assert len(rows) >= 24
    for device, dtype, op, output, allowed, grads, allowed_grads, verdict in rows:
        assert device in ("cpu", "cuda") and hasattr(torch, dtype) and hasattr(ext, op.partition(",")[0])
        assert 0 < float(output) <= float(allowed) < 0.05, "a tolerance that anything passes"
        assert 0 < float(grads) <= float(allowed_grads) < 0.05
        assert verdict == "passed"


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_selftest_notices_a_wrong_op(factor, monkeypatch, capsys):
    right = ext.depthwise_conv3x3
    monkeypatch.setattr(ext, "depthwise_conv3x3", lambda *a, **k: right(*a, **k) * factor)
    assert selftest.main() == 1
    text = capsys.readouterr().out
    failed = [row for row in table(text) if row[-1] == "FAILED"]
    assert failed and all(row[2] == "depthwise_conv3x3" for row in failed)
    assert all(float(row[3]) > float(row[4]) for row in failed)
    assert f"{len(failed)} of " in text and "report" in text and "`groupmamba info`" in text


def test_selftest_notices_a_wrong_gradient(monkeypatch, capsys):
    """Of the least of an op's inputs: 5% of a bias's gradient, in bfloat16 as well."""
    right = ext.layer_norm_pool

    def wrong(x, weight, bias, *args):
        return right(x, weight, bias + 0.05 * (bias - bias.detach()), *args)

    monkeypatch.setattr(ext, "layer_norm_pool", wrong)
    assert selftest.main() == 1
    failed = [row for row in table(capsys.readouterr().out) if row[-1] == "FAILED"]
    assert {row[1] for row in failed} >= {"float64", "float32", "bfloat16", "float16"}
    assert {row[2] for row in failed} == {"layer_norm_pool"}


def test_selftest_goes_on_after_an_op_that_raises(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(ext, "cross_selective_scan", broken)
    assert selftest.main() == 1
    rows = table(capsys.readouterr().out)[2:]
    failed = [row for row in rows if row[-1] == "FAILED"]
    assert [row[2:4] for row in failed] == [
        ["cross_selective_scan", "RuntimeError: no kernel image is available"]
    ] * len(failed)
    assert sum(row[-1] == "passed" for row in rows) >= 20


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
