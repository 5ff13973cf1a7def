# SPDX-License-Identifier: Apache-2.0
"""The console command: how it starts, what a bug report needs, one line with a status for what cannot be done."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import groupmamba
import groupmamba_ext as ext
from groupmamba import cli, environment
from groupmamba.demo import command as demo
from groupmamba_ext import _command, _load, selftest

COMMAND = [sys.executable, "-m", "groupmamba"]


def refused(argv, capsys):
    """Exit status and message of a command that must print one line on stderr, and nothing else."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("groupmamba"), captured.err
    return status, lines[0]


def test_ways_to_the_version():
    assert groupmamba.__version__ == ext.__version__
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"groupmamba {ext.__version__}\n", "")


def test_help_lists_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "info", "selftest", "--version"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ("demo|info|selftest",)),
        (["fly"], ("'fly'",)),
        (["selftest", "--fast"], ("groupmamba selftest: ", "--fast")),
        (["demo", "--sise=64"], ("--sise=64; is --size meant?",)),
        (["demo", "--size", "8"], ("--size", "from 64 to 2048", "'8'")),
        (["demo", "--size", "100000"], ("--size", "2 GB", "'100000'")),
        (["demo", "--size", "9" * 5000], ("--size", "99...'")),
        (["demo", "--device", "tpu"], ("--device", "'tpu'")),
        (["demo", "--out", "picture.jpg"], ("--out", "PNG", "picture.jpg")),
        (["info", "--batch", "4", "--device", "cpu"], ("--batch and --device", "MODEL")),
        (["info", "groupmamba_tiny", "--batch", "0"], ("--batch", "'0'")),
        (["info", "groupmamba_tiny", "--batch", "²"], ("--batch", "'²'")),
        (["info", "groupmamba_tiny", "--batch", "1000000"], ("--batch", "65536")),
        (["info", "groupmamba_tiny", "--size", "50000"], ("--size", "14 GB", "2048")),
        (["info", "groupmamba_tiny", "--device", "cuda:0"], ("--device", "'cuda:0'")),
        (["info", "groupmamba_huge"], ("MODEL", "groupmamba_tiny", "'groupmamba_huge'")),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_arguments(argv, words, capsys):
    if "groupmamba_huge" in argv:
        pytest.importorskip("timm", reason="needs the extra 'models'")
    status, line = refused(argv, capsys)
    assert status == 2
    assert all(word in line for word in words)


NOT_HERE = {
    "cpu torch": ({"torch.version.cuda": None}, "was built without CUDA"),
    "no GPU": ({"torch.cuda.is_available": lambda: False}, "no driver, say"),
    "cpu build": ({"torch.cuda.is_available": lambda: True}, "no code for it"),
}


@pytest.fixture(params=list(NOT_HERE))
def no_gpu(request, monkeypatch):
    """A machine whose GPU cannot be used, and words of the reason."""

    def fails(*args):
        raise RuntimeError("no driver, say.\nAnd advice")

    def unsupported(index):
        raise RuntimeError("no code for it")

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.init", fails)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(_command, "check_device_supported", unsupported)
    changes, words = NOT_HERE[request.param]
    for name, value in changes.items():
        monkeypatch.setattr(name, value)
    return words


@pytest.mark.parametrize("argv", [["info", "groupmamba_tiny"], ["demo"]], ids=("info", "demo"))
def test_a_gpu_that_cannot_be_used(argv, no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "require_extras", lambda: None)
    status, line = refused([*argv, "--device", "cuda"], capsys)
    assert status == 1
    assert "--device cuda: " in line and no_gpu in line


@pytest.mark.parametrize("count", [0, 1])
def test_a_gpu_that_is_passed_over(count, no_gpu, monkeypatch, capsys):
    """By default the CPU does the work; a GPU that is there is not left out in silence."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert demo.devices(None) == [torch.device("cpu")]
    message = capsys.readouterr().err
    assert message.startswith("without the GPU: ") and no_gpu in message if count else message == ""


def test_info_says_why_there_is_no_gpu(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    if no_gpu != "no code for it":
        assert re.search(f"- GPU: none that can be used: .*{no_gpu}", text)


@pytest.mark.parametrize("usable", [True, False])
def test_info_says_whether_a_gpu_can_be_used(usable, monkeypatch, capsys):
    def check(index):
        if not usable:
            raise RuntimeError("built for other GPUs")

    class Properties:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    monkeypatch.setattr(environment, "check_device_supported", check)
    assert cli.main(["info"]) == (0 if usable else 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- GPU: ")]
    end = "can be used" if usable else "cannot be used: built for other GPUs"
    assert lines == [f"- GPU: cuda:{i}, Some GPU, compute capability 9.0, 80 GiB, {end}" for i in range(2)]


@pytest.mark.cuda
def test_info_on_a_gpu(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.cuda.get_device_name(0) in text and "can be used" in text
    assert re.search(r"- GPU driver: \d+\.", text)


def test_info_is_a_list_with_what_a_bug_report_needs(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;8.0")
    monkeypatch.setenv("GROUPMAMBA_SOMETHING", "1")
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    cli.main(["info"])
    text = capsys.readouterr().out
    assert all(re.match(r"- [\w ]+: \S", line) for line in text.splitlines())
    built = ext.build_info()
    for word in (
        ext.__version__,
        torch.__version__,
        built["cpu_capability"],
        built["torch_target"],
        built["cuda_version"] or "without the CUDA half",
        "numpy ",
        "GROUPMAMBA_SOMETHING=1",
        "TORCH_CUDA_ARCH_LIST=9.0;8.0",
    ):
        assert word in text
    assert "SECRET" not in text


def test_missing_ops(monkeypatch, tmp_path, capsys):
    def missing():
        raise RuntimeError("the compiled ops are not installed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_load, "load_error", lambda: "the compiled ops are not installed")
    monkeypatch.setattr(ext, "build_info", missing)
    assert cli.main(["info"]) == 1
    assert "the compiled ops are not installed" in capsys.readouterr().out
    monkeypatch.setattr(demo, "require_extras", lambda: None)
    for name, module in (("selftest", selftest), ("demo", demo)):
        monkeypatch.setattr(module, "load_error", lambda: "the compiled ops are not installed")
        status, line = refused([name], capsys)
        assert status == 1 and "the compiled ops are not installed" in line


def run_with(error):
    def command():
        raise error

    return _command.run_command("groupmamba test", command)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (_command.CommandError("several\n lines"), 1, "several lines"),
        (_command.UsageError("wrong"), 2, "wrong"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            1,
            "out of memory: CUDA out of memory. Tried",
        ),
        (MemoryError(), 1, "out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_goes_wrong_in_a_command(error, status, line, capsys):
    assert run_with(error) == status
    message = capsys.readouterr().err
    assert message.startswith(f"groupmamba test: {line}") and message.count("\n") == 1


def test_memory_that_the_cpu_does_not_have(capsys):
    assert _command.run_command("groupmamba test", lambda: torch.empty(1 << 60)) == 1
    message = capsys.readouterr().err
    assert message.startswith("groupmamba test: out of memory: ") and message.count("\n") == 1


def test_a_defect_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a defect"):
        run_with(RuntimeError("a defect"))
    with pytest.raises(ValueError, match="a defect"):
        run_with(ValueError("a defect"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "info"], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr == "groupmamba info: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("command", [[*COMMAND, "selftest"], [sys.executable, "-m", "groupmamba_ext.selftest"]])
def test_a_closed_pipe_and_ctrl_c(command):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **options) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""
    with subprocess.Popen(command, **options) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
        assert process.returncode == 130
        assert message.endswith("selftest: interrupted\n") and message.count("\n") == 1


def test_names_that_are_no_text(tmp_path):
    pytest.importorskip("sklearn")
    out = os.fsencode(tmp_path) + b"/\xff.png"
    command = [*COMMAND, "demo", "--size", "64", "--device", "cpu", "--out", out]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.path.exists(out) and done.stdout.endswith("\\udcff.png\n")
