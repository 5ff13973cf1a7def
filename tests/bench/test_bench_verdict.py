# SPDX-License-Identifier: Apache-2.0
"""The benchmark's verdict: what fails of this project turns a run red and is never hidden, what fails of a peer does
not and is named."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groupmamba
import groupmamba_ext as ext
from groupmamba_ext.backend import current_backend
from suite import markdown, op_cases, peers, report, runner, timing, verdict  # noqa: E402
from suite.checks import Truth, compare  # noqa: E402
from suite.peers import Peer  # noqa: E402
from suite.problem import Shape  # noqa: E402
from support.bench import CPU, ROOT, quick  # noqa: E402

SHAPE = Shape(2, 12, 5, 7)
PLAIN = ("--op", "norm", "--pass", "forward")  # four rows


# this project's own -------------------------------------------------------------------------


def test_a_single_wrong_image_is_noticed():
    problem = op_cases._scan(Shape(40, 16, 4, 4), torch.bfloat16, "group-major", CPU)
    right = problem.function
    assert Truth(problem).check().passed

    def wrong(**tensors):
        y = right(**tensors)
        return torch.cat([y[:-1], 1.2 * y[-1:]])

    problem.function = wrong
    check = Truth(problem).check()
    assert not check.passed and "error" in str(check)


def test_a_wrong_gradient_is_noticed():
    problem = op_cases._modulated(SHAPE, torch.float32, CPU)
    right = problem.function
    problem.function = lambda **t: right(**(t | {"gate": t["gate"] + 0.1 * (t["gate"] - t["gate"].detach())}))
    check = Truth(problem).check()
    assert not check.passed and check.tensor == "dgate"


@pytest.mark.parametrize("order", [1, -1])
def test_a_result_that_is_not_finite_is_not_hidden_behind_another(order):
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    truth = dict(list({"first": good.double(), "output": bad.double()}.items())[::order])
    for got in (good, bad):
        results = {"first": good * (1 + 4e-6), "output": got}  # the first is close to its limit, and passes
        check = compare(
            {name: results[name] for name in truth}, truth, {n: truth[n].float() for n in truth}, good.dtype
        )
        assert not check.passed and check.tensor == "output"


def test_red_rows_have_no_figures_and_the_status_is_1(monkeypatch, capsys, tmp_path):
    right = ext.grouped_selective_scan
    monkeypatch.setattr(ext, "grouped_selective_scan", lambda *a, **k: right(*a, **k) * 1.1)
    path = tmp_path / "red.json"
    assert quick("--op", "scan", "norm", "--pass", "forward", "--json", path) == 1
    out = capsys.readouterr().out
    scan, norm = out.split("norm: layer_norm_pool")
    assert "RED" in scan and "relative error" in scan and "x" not in scan.split("RED")[1].split("\n")[0]
    assert "RED" not in norm.split("\n\n")[0] and "forward (0 of 2 rows): none" in scan
    assert "RED: grouped_selective_scan: " in norm and "RED: 2 of this project's rows failed" in norm
    for row in report.read_json(path)[0]["rows"]:
        red = row["op"] == "scan"
        assert (row["us"] is None) == red and (row["error"] is not None) == red and bool(row["peers"]) != red
    text = markdown.tables(report.read_json(path))
    assert "| RED |" in text and "- RED: grouped_selective_scan: " in text


def test_what_is_raised_is_a_red_row_and_the_others_are_measured(monkeypatch, capsys, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setattr(ext, "layer_norm_pool", broken)
    path = tmp_path / "red.json"
    assert quick(*PLAIN, "--json", path) == 1
    out = capsys.readouterr().out
    assert "RED: layer_norm_pool: RuntimeError: no kernel (test_bench_verdict.py:" in out
    rows = report.read_json(path)[0]["rows"]
    assert [row["us"] is None for row in rows] == [True, True, False, False]


def test_a_pass_without_memory_is_red_and_the_others_stay(monkeypatch, capsys, tmp_path):
    right = runner.Runner._row

    def row(self, case, kind, *rest):
        if kind == "backward":
            raise torch.OutOfMemoryError("tried to allocate")
        return right(self, case, kind, *rest)

    monkeypatch.setattr(runner.Runner, "_row", row)
    path = tmp_path / "red.json"
    assert quick("--op", "norm", "--peers", "none", "--json", path) == 1
    assert "out of memory: tried to allocate" in capsys.readouterr().out
    rows = report.read_json(path)[0]["rows"]
    assert len(rows) == len({report.key(row) for row in rows}) == 12
    assert all((row["us"] is None) == (row["pass"] != "forward") for row in rows)


def test_without_its_graph_a_row_is_red(monkeypatch, capsys):
    monkeypatch.setattr(timing.Timer, "__call__", lambda self, *a: timing.Times(5.0, graph_error="cannot capture"))
    assert quick(*PLAIN, "--peers", "none") == 1
    out = capsys.readouterr().out
    assert "RED: layer_norm_pool: no CUDA graph: cannot capture (norm 64x14x14 forward and 1 more)" in out
    assert "RED: 4 of this project's rows failed" in out


def test_missing_rows_are_red(monkeypatch, capsys):
    right = runner.Runner._measured

    def measured(self, case, passes):
        yield from list(right(self, case, passes))[1:]

    monkeypatch.setattr(runner.Runner, "_measured", measured)
    assert quick(*PLAIN) == 1
    assert "4 rows are missing" in capsys.readouterr().out


# a peer's -----------------------------------------------------------------------------------


def wrong_peer(monkeypatch):
    """Plain PyTorch right as the truth, wrong as the peer."""
    right = ext.reference.layer_norm_pool

    def wrong(x, *args, **kwargs):
        y, pooled = right(x, *args, **kwargs)
        return y + 0.5 * (current_backend() == "reference"), pooled

    monkeypatch.setattr(ext.reference, "layer_norm_pool", wrong)


def test_an_imprecise_peer_gets_no_ratio_and_turns_nothing_red(monkeypatch, capsys, tmp_path):
    wrong_peer(monkeypatch)
    path = tmp_path / "peer.json"
    assert quick(*PLAIN, "--json", path) == 0
    out = capsys.readouterr().out
    assert "RED" not in out and "this project's results are right" in out
    line = next(line for line in out.splitlines() if line.startswith("peer pytorch: imprecise: output 0"))
    assert line.endswith(", so no ratio (norm 64x14x14 forward)") or " and 1 more)" in line
    wrong_block, right_block = out.split("norm: modulated_layer_norm")
    rows = [line for line in wrong_block.splitlines() if line.startswith(("64x14x14", "348x7x7"))]
    assert len(rows) == 2 and all(line.endswith("  no ratio") for line in rows)
    assert "no ratio" not in right_block.split("\n\n")[0]
    text = markdown.tables(report.read_json(path))
    assert "RED" not in text and "| no ratio |" in text and "- peer pytorch: imprecise: output 0" in text


class Misbehaved:
    """What a peer may do when it is called."""

    def raises(**tensors):
        raise ZeroDivisionError

    def leaves(**tensors):
        sys.exit("usage: peer")

    def takes_all_memory(**tensors):
        raise torch.OutOfMemoryError("tried to allocate\n9 GiB")

    def returns_less(**tensors):
        return tensors["x"]

    def is_not_finite(**tensors):
        return tuple(t * float("nan") for t in ext.layer_norm_pool(**tensors))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "ZeroDivisionError"),
        ("leaves", "SystemExit: usage: peer"),
        ("takes_all_memory", "out of memory: tried to allocate"),
        ("returns_less", "ValueError: zip() "),
        ("is_not_finite", "imprecise: output 0: relative error inf"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_nothing_that_a_peer_does_turns_a_run_red(name, said, later, monkeypatch, capsys):
    calls = []

    def function(**tensors):
        calls.append(1)
        # Right when it is checked, and wrong when it is timed.
        return ext.layer_norm_pool(**tensors) if later and len(calls) == 1 else getattr(Misbehaved, name)(**tensors)

    def peer(self, case, problem):
        calls.clear()
        return Peer("pytorch", function) if case.label == "layer_norm_pool" else None

    monkeypatch.setattr(peers.Peers, "_pytorch", peer)
    assert quick(*PLAIN) == 0
    out = capsys.readouterr().out
    assert "RED" not in out
    if not later or name not in ("returns_less", "is_not_finite"):  # which shows in results alone
        assert f"peer pytorch: {said}" in out


def broken_settings():
    raise AttributeError("no such setting")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda *_: sys.exit(3), "SystemExit: 3"),
        (lambda *_: Peer("pytorch", None, error="cannot be had"), "cannot be had"),
        (lambda *_: Peer("pytorch", lambda **t: t, settings=broken_settings), "AttributeError: no such setting"),
    ],
)
def test_a_peer_that_cannot_be_made_says_why(make, said, monkeypatch, capsys):
    monkeypatch.setattr(peers.Peers, "_pytorch", make)
    assert quick(*PLAIN) == 0
    assert f"peer pytorch: {said}, so no ratio (norm 64x14x14 forward and 3 more)" in capsys.readouterr().out


def test_a_peer_that_takes_the_device_ends_the_run_and_is_named(monkeypatch, capsys, tmp_path):
    def lost(device, peer):
        raise verdict.DeviceLost(f"peer {peer} left the device unusable: illegal address")

    monkeypatch.setattr(runner, "require_device", lost)
    monkeypatch.setattr(peers.Peers, "_pytorch", lambda *_: Peer("pytorch", Misbehaved.raises))
    path = tmp_path / "lost.json"
    assert quick(*PLAIN, "--json", path) == 1
    assert "cut short, peer pytorch left the device unusable: illegal address: 1 of 4" in capsys.readouterr().err
    (row,) = report.read_json(path)[0]["rows"]
    assert row["us"] > 0


# stopping -----------------------------------------------------------------------------------


def test_what_was_measured_stays_after_an_interrupt(monkeypatch, capsys, tmp_path):
    def slow(self, case, problem):
        if case.label == "modulated_layer_norm":
            raise KeyboardInterrupt  # while a peer is waited for: this project's own row is there
        return None

    monkeypatch.setattr(peers.Peers, "_pytorch", slow)
    path = tmp_path / "part.json"
    assert quick(*PLAIN, "--json", path) == 130
    streams = capsys.readouterr()
    assert "interrupted: 3 of 4 rows measured" in streams.err
    assert "norm: layer_norm_pool" in streams.out and "norm: modulated_layer_norm" in streams.out
    assert [row["us"] > 0 for row in report.read_json(path)[0]["rows"]] == [True] * 3


@pytest.fixture
def command():
    """The command in a process of its own, away from the checkout's root."""

    def start(*arguments, **environment):
        paths = [str(Path(package.__file__).parents[1]) for package in (ext, groupmamba)]  # what this process tests
        return subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "run.py"), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        )

    return start


def test_ctrl_c(command, tmp_path):
    path = tmp_path / "part.json"
    process = command("--device", "cpu", "--quick", "--op", "layer", "scan", "--json", path)
    assert "] GroupedMamba2d 64x14x14" in process.stderr.readline()  # progress, while it runs
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert "layer: GroupedMamba2d" in out and len(json.loads(path.read_text())["runs"][0]["rows"]) >= 2


def test_a_strangers_first_run(command):
    out, err = command("--device", "cpu", "--quick").communicate(timeout=240)
    assert "14 rows in " in out and out.endswith("; this project's results are right\n"), out + err
    assert "[6/6, " in err


def test_without_an_installation_there_is_one_line(command, tmp_path):
    (tmp_path / "groupmamba.py").write_text("raise ModuleNotFoundError('no groupmamba')")
    out, err = command("--quick", PYTHONPATH=str(tmp_path)).communicate(timeout=120)
    assert err.splitlines() == ["bench/run.py: needs this project installed: pip install '.[bench]' (no groupmamba)"]
