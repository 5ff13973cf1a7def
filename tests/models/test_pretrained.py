# SPDX-License-Identifier: Apache-2.0
"""Weights of the models: the hub's files, checkpoints by path, and the hub's own save and load."""

import argparse
import subprocess
import sys
import types

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'models'")

from huggingface_hub.errors import EntryNotFoundError  # noqa: E402

from groupmamba import convert_released_state_dict  # noqa: E402
from groupmamba.models import GroupMamba, groupmamba_small, groupmamba_tiny  # noqa: E402
from support.models import released_state_dict, small  # noqa: E402

# As in the authors' repositories on the hub.
FILES = {
    "Abdelrahman-shaker/GroupMamba-Tiny": "groupmamba_tiny_ema.pth",
    "Abdelrahman-shaker/GroupMamba-Small": "groupmamba_small_ema.pth",
    "Abdelrahman-shaker/GroupMamba-Base": "groupmamba_base_ema.pth",
}


@pytest.fixture(scope="module")
def released():
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in released_state_dict("tiny").items()
    }


@pytest.fixture(scope="module")
def checkpoint(released, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "groupmamba_tiny_ema.pth"
    torch.save(released, path)
    return path


@pytest.fixture
def hub(checkpoint, monkeypatch):
    """timm's loader with the authors' repository of the tiny model behind it."""

    def download(repo_id, filename, **_):
        if FILES[repo_id] != filename:
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        assert repo_id.endswith("Tiny")
        return str(checkpoint)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)


def _agree(model, released):
    expected = convert_released_state_dict(released)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_the_hubs_files():
    for name in timm.list_models("groupmamba*"):
        config = timm.get_pretrained_cfg(name)
        assert FILES[config.hf_hub_id] == config.hf_hub_filename


def test_pretrained(hub, released):
    _agree(timm.create_model("groupmamba_tiny.in1k", pretrained=True), released)


def test_pretrained_with_other_heads_and_channels(hub, released):
    expected = convert_released_state_dict(released)
    with pytest.warns(UserWarning, match="1000 in place of 5"):
        model = timm.create_model("groupmamba_tiny", pretrained=True, num_classes=5, in_chans=1)
    assert model.head.weight.shape == model.dist_head.weight.shape == (5, 448)
    gray = expected["stem.conv.0.weight"].sum(1, keepdim=True)
    assert torch.allclose(model.stem.conv[0].weight, gray, atol=1e-6)
    assert torch.equal(model.class_block.norm2.weight, expected["class_block.norm2.weight"])
    model = timm.create_model("groupmamba_tiny", pretrained=True, distillation=False)
    assert model.dist_head is None
    assert torch.equal(model.head.weight, expected["head.weight"])
    backbone = timm.create_model("groupmamba_tiny", pretrained=True, features_only=True, out_indices=(1, 2))
    name = "stages.2.blocks.8.mlp.fc1.weight"
    assert torch.equal(backbone.model.state_dict()[name], expected[name])


def test_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = (
        r"groupmamba_small_ema\.pth of huggingface.co/Abdelrahman-shaker/GroupMamba-Small.*groupmamba_small\(weights="
    )
    with pytest.raises(RuntimeError, match=words):
        groupmamba_small(pretrained=True)


def _config_node():
    """A dictionary class of the name that the authors' training code pickles its configuration under."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        __module__, __qualname__ = "yacs.config", "CfgNode"

    module.CfgNode = CfgNode
    node = CfgNode(lr=1e-3, model=CfgNode(name="groupmamba_tiny"))
    node.__dict__["__immutable__"] = True
    return module, node


@pytest.mark.parametrize("wrap", ["model", "averages", "module", "safetensors"])
def test_checkpoints_by_path(released, tmp_path, monkeypatch, wrap):
    module, config = _config_node()
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    path = tmp_path / "checkpoint.pth"
    if wrap == "model":
        torch.save({"model": released, "epoch": 3, "config": config}, path)
    elif wrap == "averages":
        torch.save({"model": {"head.bias": torch.zeros(1)}, "model_ema": released, "config": config}, path)
    elif wrap == "module":
        prefixed = {f"module.{name}": value for name, value in released.items()}
        torch.save({"state_dict": prefixed, "args": argparse.Namespace(lr=1)}, path)
    else:
        from safetensors.torch import save_file

        path = tmp_path / "checkpoint.safetensors"
        save_file(released, path)
    monkeypatch.setitem(sys.modules, "yacs.config", None)  # as where it is not installed
    _agree(timm.create_model("groupmamba_tiny", weights=path), released)


def test_own_checkpoints_by_path(tmp_path):
    path = tmp_path / "checkpoint.pth"
    model = groupmamba_tiny()
    torch.save({"model": model.state_dict()}, path)
    for loaded in (
        timm.create_model("groupmamba_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)}),
        timm.create_model("groupmamba_tiny", checkpoint_path=str(path)),
    ):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


class _Dangerous:
    def __reduce__(self):
        return print, ("executed",)


def test_bad_checkpoints_are_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"weights .* got '.*none\.pth'"):
        groupmamba_tiny(weights=tmp_path / "none.pth")
    path = tmp_path / "bad.pth"
    for content, message in (
        (b"no checkpoint", "could not be loaded"),
        ({"model": _Dangerous()}, "could not be loaded"),
        ({"head.weight": torch.zeros(3)}, "Missing key"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(RuntimeError, match=rf"(?s)groupmamba_tiny: weights='.*bad\.pth'.*{message}"):
            groupmamba_tiny(weights=path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "fused", "distillation": False, "in_chans": 1},
        {"directions": ("lr", "tb") * 4, "gate_source": "output"},
        {"scan": "cross", "groups": 1},
    ],
)
def test_hub_round_trip(tmp_path, options):
    model = small(**options)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    again = GroupMamba.from_pretrained(tmp_path).eval()
    x = torch.randn(1, model.in_chans, 32, 32)
    assert torch.equal(again(x), model(x))
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(timms(x), model(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_released_weights_are_of_four_groups(hub, groups):
    with pytest.raises(RuntimeError, match=f"the authors' weights are for 4 groups, and the model has {groups}$"):
        groupmamba_tiny(pretrained=True, directions=("lr", "tb")[:groups])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gate_source": "output"}, r"are for gate_source='input', and the model has 'output'"),
        ({"directions": ("lr", "rl", "tb", "bt")}, r"are for directions=\('lr', 'tb', 'rl', 'bt'\), and the model has"),
    ],
)
def test_released_weights_with_other_options(hub, released, options, words):
    """They fit, and mean something else."""
    with pytest.warns(UserWarning, match=words):
        _agree(groupmamba_tiny(pretrained=True, **options), released)


def test_hub_round_trip_of_new_heads(tmp_path):
    model = small()
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    again = GroupMamba.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 32, 32)
    assert again.num_classes == 7 and torch.equal(again(x), model(x))


def test_missing_extras_are_named():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import groupmamba\n"
        "for name in ('models', 'vision'):\n"
        "    try:\n"
        "        __import__(f'groupmamba.{name}')\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "pip install 'groupmamba[models]'" in first
    assert "pip install 'groupmamba[vision]'" in second
