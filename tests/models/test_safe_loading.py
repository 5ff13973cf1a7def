# SPDX-License-Identifier: Apache-2.0
"""Nothing in a checkpoint is executed, by whatever door it comes in; importing opens no connection."""

import argparse
import contextlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'models'")
pytest.importorskip("safetensors", reason="needs the extra 'train'")
pytest.importorskip("torchvision", reason="needs the extra 'train'")
pytest.importorskip("yaml", reason="needs the extra 'train'")

from groupmamba.models import GroupMamba  # noqa: E402
from groupmamba.models.pretrained import read_checkpoint  # noqa: E402
from support.models import small, tiny  # noqa: E402
from support.training import command, make_pictures, train  # noqa: E402


class Call:
    """Pickled as a call of ``function`` while it is read."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


class Built:
    """Pickled as an object whose ``__setstate__`` is called."""

    def __init__(self, mark):
        self.mark = mark

    def __getstate__(self):
        return {"mark": self.mark}

    def __setstate__(self, state):
        Path(state["mark"]).touch()


def attacks(mark):
    """What a checkpoint may hold that makes the file ``mark`` when it is executed."""
    code = f"open({mark!r}, 'w').close()"
    yield "os.system", {"model": Call(os.system, f"touch {mark}")}
    yield "exec", {"model": Call(exec, code)}
    yield "eval", {"model": Call(eval, code)}
    yield "subprocess", {"model": Call(subprocess.run, ["touch", mark])}
    yield "open", {"model": Call(open, mark, "w")}
    yield "getattr", {"model": Call(getattr, Call(__import__, "os"), "system")}
    yield "pickle in a pickle", {"model": Call(pickle.loads, pickle.dumps(Call(exec, code)))}
    yield "torch.load", {"model": Call(torch.load, mark)}
    yield "setstate", {"model": Built(mark)}
    yield "a name", {Call(eval, f"{code} or 'head.weight'"): torch.zeros(3)}
    yield "in the configuration", {"model": {}, "args": argparse.Namespace(lr=Call(exec, code))}
    yield "state of an allowed type", {"model": {}, "args": Call(argparse.Namespace, state={"x": Call(exec, code)})}
    yield "at the root", Call(exec, code)


def files(folder, mark):
    """Each attack as an archive, in torch's old format, as a bare pickle, and under a safe file's name."""
    for number, (title, content) in enumerate(attacks(mark)):
        for kind, write in {
            "zip.pth": lambda path, content=content: torch.save(content, path),
            "old.pth": lambda path, content=content: torch.save(content, path, _use_new_zipfile_serialization=False),
            "pickle.pkl": lambda path, content=content: path.write_bytes(pickle.dumps(content)),
            "protocol 0.bin": lambda path, content=content: path.write_bytes(pickle.dumps(content, protocol=0)),
            "named.safetensors": lambda path, content=content: torch.save(content, path),
        }.items():
            path = folder / f"{number} {kind}"
            write(path)
            yield title, path


def test_the_attacks_work(tmp_path):
    """Read the way that this project never reads, they are executed, or this file would show nothing."""
    mark = tmp_path / "mark"
    count = 0
    for title, path in files(tmp_path, str(mark)):
        mark.unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # what comes after the call does not matter
            if path.suffix in (".pth", ".safetensors"):
                torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
            else:
                pickle.loads(path.read_bytes())
        count += mark.exists()
        assert mark.exists() or title in ("getattr", "torch.load"), path
    assert count >= 50


def test_no_door_executes(tmp_path):
    mark = tmp_path / "mark"
    for title, path in files(tmp_path, str(mark)):
        with pytest.raises(RuntimeError, match="no checkpoint that can be read safely"):
            read_checkpoint(str(path))
        assert not mark.exists(), path
        if title in ("exec", "setstate") and path.suffix == ".pth":  # each door of a model, by formats it takes
            with pytest.raises(RuntimeError, match="could not be loaded"):
                tiny(weights=path)
            folder = tmp_path / f"folder of {path.name}"
            folder.mkdir()
            for name in ("pytorch_model.bin", "model.pth"):
                path.rename(folder / name)
                path = folder / name
                for load in (
                    lambda folder=folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
                    lambda path=path: timm.create_model("groupmamba_tiny", checkpoint_path=str(path)),
                ):
                    with pytest.raises(Exception) as caught:
                        load()
                    assert not isinstance(caught.value, AssertionError)
            assert not mark.exists(), path


def test_no_command_executes(tmp_path, capsys):
    mark = tmp_path / "mark"
    data = make_pictures(tmp_path / "pictures", train=4, validation=1)
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "1") == 0
    picture = str(data / "validation" / "red" / "0.png")
    attack = {"model": Call(exec, f"open({str(mark)!r}, 'w').close()")}
    bad = tmp_path / "bad.pth"
    torch.save(attack, bad)
    (checkpoint,) = (run / "checkpoints").iterdir()
    torch.save(attack, checkpoint / "state.pt")
    capsys.readouterr()
    for argv in (
        ("predict", picture, "--weights", str(bad), "--model", "groupmamba_tiny", "--device", "cpu"),
        ("validate", str(data), "--weights", str(bad), "--model", "groupmamba_tiny", "--device", "cpu", "-j", "0"),
    ):
        assert command(*argv) == 1
        assert "bad.pth" in capsys.readouterr().err
    for options in (
        ("--kd-model-path", str(bad), "--kd-model-name", "groupmamba_tiny"),
        ("--resume", str(checkpoint)),
    ):
        assert train(data, tmp_path / "other", "--epochs", "2", *options) == 1, options
        assert str(options[1]) in capsys.readouterr().err
    assert train(data, run, "--epochs", "2") == 1
    assert "no checkpoint that can be read" in capsys.readouterr().err
    assert not mark.exists()


def test_a_configuration_is_data(tmp_path, capsys):
    mark = tmp_path / "mark"
    config = tmp_path / "args.yaml"
    config.write_text(f"epochs: !!python/object/apply:os.system ['touch {mark}']\n")
    assert command("train", str(tmp_path), "--config", str(config)) == 2
    assert "--config" in capsys.readouterr().err
    assert not mark.exists()


OFFLINE = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request",
                 "http.client.connect", "ftplib.connect", "os.system"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(hook)
import importlib, pkgutil
import groupmamba, groupmamba_ext
for package in (groupmamba, groupmamba_ext):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", "._C", ".libgroupmamba")):
            importlib.import_module(module.name)
import torch
from groupmamba.models import groupmamba_tiny
model = groupmamba_tiny(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), stem_dim=8, mlp_ratios=(2, 2, 2, 2)).eval()
print(tuple(model(torch.randn(1, 3, 32, 32)).shape))
import socket
try:
    socket.create_connection(("127.0.0.1", 9))
except SystemExit:
    print("the hook works")
"""


def test_nothing_is_fetched(tmp_path):
    """By importing any module, or building and running a model without ``pretrained``."""
    for package in ("segmentation_models_pytorch", "matplotlib"):
        pytest.importorskip(package, reason="needs the extra 'all'")
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["(1, 1000)", "the hook works"]


def test_weights_that_were_saved_hold_no_code(tmp_path):
    """What is written here needs none of the doors: tensors and text."""
    model = small()
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) in (
        [".json", ".safetensors"],
        [".json", ".md", ".safetensors"],
    )
    again = GroupMamba.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
