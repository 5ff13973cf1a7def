# SPDX-License-Identifier: Apache-2.0
"""``groupmamba info MODEL``: its table, and one line for models, sizes and batches that cannot be had."""

import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm", reason="needs the extra 'models'")

from groupmamba.cli import main  # noqa: E402
from groupmamba.model_info import multiply_adds, training_bytes  # noqa: E402
from groupmamba.models import groupmamba_tiny  # noqa: E402
from support.models import small  # noqa: E402


def test_info_command(capsys, monkeypatch):
    monkeypatch.setattr("groupmamba.model_info.SECONDS", 0.0)
    assert main(["info", "groupmamba_tiny", "--batch", "1", "--size", "64", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "23.36 M" in text
    assert re.search(r"inference +[\d.,]+ images/s, float32, batch 1, cpu", text)


def test_info_command_of_other_options(capsys, monkeypatch):
    monkeypatch.setattr("groupmamba.model_info.SECONDS", 0.0)
    small = ["--batch", "1", "--size", "64", "--device", "cpu"]
    assert main(["info", "groupmamba_tiny", "--model-kwargs", "directions=('lr','tb')", "num_classes=10", *small]) == 0
    text = capsys.readouterr().out
    assert text.startswith("groupmamba_tiny, directions=('lr', 'tb'), num_classes=10, 64 x 64 pixels\n")
    parameters = sum(p.numel() for p in groupmamba_tiny(directions=("lr", "tb"), num_classes=10).parameters())
    assert f"parameters      {parameters / 1e6:.2f} M" in text
    assert main(["info", "groupmamba_tiny", "--model-kwargs", f"directions={('lr',) * 8}", *small]) == 2
    line = capsys.readouterr().err
    assert "MODEL groupmamba_tiny can't be made so: dims must be multiples of 8" in line and line.count("\n") == 1


@pytest.mark.cuda
def test_info_command_on_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("groupmamba.model_info.SECONDS", 0.0)
    assert main(["info", "groupmamba_tiny", "--batch", "2", "--size", "64"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"training +[\d.,]+ images/s, bfloat16 autocast, batch 2, cuda, [\d.]+ GiB", text)


def test_multiply_adds_stay_on_the_device(device):
    model = small().to(device)
    assert multiply_adds(model, 64) == multiply_adds(small(), 64)
    assert next(model.parameters()).device.type == device


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["vit_tiny_patch16_224", "--size", "100"], ("vit_tiny_patch16_224 does not take images of 100 x 100 pixels",)),
        (["resnet18", "--size", "32", "--batch", "1"], ("no training of resnet18 with --batch 1", "more than 1 value")),
    ],
    ids=("size", "one token"),
)
def test_info_of_what_a_model_does_not_take(argv, words, capsys, monkeypatch):
    monkeypatch.setattr("groupmamba.model_info.SECONDS", 0.0)
    assert main(["info", *argv, "--device", "cpu"]) == 1
    line = capsys.readouterr().err
    assert all(word in line for word in words) and line.count("\n") == 1


def test_info_of_more_than_fits(capsys, monkeypatch):
    """Before the work: Linux would end the process without a word."""
    monkeypatch.setattr("groupmamba.model_info.multiply_adds", lambda *args: pytest.fail("the model ran"))
    assert main(["info", "groupmamba_tiny", "--batch", "65536", "--device", "cpu"]) == 1
    line = capsys.readouterr().err
    assert re.search(
        r"--batch 65536 of 224 x 224 pixels needs at least [\d,.]+ GiB .* are free; at most --batch \d+ can fit", line
    )
    assert line.count("\n") == 1


def test_training_bytes():
    """What autograd keeps, by its own account on the CPU."""
    model = small().train()
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(torch.randn(1, 3, 64, 64))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    expected = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert y is not None and training_bytes(model, 64) == pytest.approx(expected, rel=0.1)


@pytest.mark.cuda
def test_info_of_more_than_fits_on_a_gpu(capsys):
    assert main(["info", "groupmamba_base", "--batch", "65536", "--device", "cuda"]) == 1
    assert "out of memory" in capsys.readouterr().err


def test_missing_timm_is_named():
    code = (
        "import sys; sys.modules['timm'] = None; from groupmamba.cli import main; "
        "sys.exit(main(['info', 'groupmamba_tiny']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "groupmamba info: groupmamba.models needs timm: pip install 'groupmamba[models]'\n"
