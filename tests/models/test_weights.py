# SPDX-License-Identifier: Apache-2.0
"""Checkpoints into models: everything that belongs there or an error, whatever trainers wrapped around it."""

import json
import warnings
import zipfile

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'models'")

from huggingface_hub.errors import EntryNotFoundError  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.models._hub import save_for_hf  # noqa: E402
from torch import nn  # noqa: E402

from groupmamba.models import GroupMamba, groupmamba_small, groupmamba_tiny  # noqa: E402
from groupmamba.models.pretrained import SIZES  # noqa: E402
from support.models import small, tiny  # noqa: E402


def agree(model, expected):
    """Every entry of ``model`` has the value that it has in the dictionary ``expected``."""
    state = model.state_dict()
    different = [name for name, value in state.items() if not torch.equal(value, expected[name])]
    assert not different and len(state) > 0, different


@pytest.fixture(scope="module")
def state():
    """Of a model of 10 classes, every entry drawn at random."""
    torch.manual_seed(5)
    values = small().state_dict()
    return {name: torch.randn_like(v) if v.is_floating_point() else v + 3 for name, v in values.items()}


@pytest.fixture
def file(state, tmp_path):
    return saved(state, tmp_path)


def saved(content, folder, name="checkpoint.pth"):
    torch.save(content, folder / name)
    return folder / name


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_heads_of_the_same_number_of_classes(file, state):
    agree(tiny(num_classes=10, weights=file), state)
    agree(tiny(num_classes=10, pretrained=True, pretrained_cfg_overlay={"file": str(file)}), state)
    agree(tiny(num_classes=10, pretrained=True, pretrained_cfg_overlay={"state_dict": state}), state)


@pytest.mark.parametrize("classes", [7, 1000])
def test_other_heads_are_dropped_with_a_warning(file, state, classes):
    words = f"10 in place of {classes}.*head.weight, head.bias, dist_head.weight, dist_head.bias are not loaded"
    with pytest.warns(UserWarning, match=words):
        model = tiny(num_classes=classes, weights=file)
    heads = {name: value for name, value in model.state_dict().items() if "head" in name}
    assert len(heads) == 4 and not any(torch.isnan(value).any() for value in heads.values())
    agree(model, {**state, **heads})
    with pytest.warns(UserWarning, match=r"3 in place of 10\): dist_head.weight, dist_head.bias are not"):
        other = {**state, "dist_head.weight": torch.zeros(3, 40), "dist_head.bias": torch.zeros(3)}
        model = tiny(num_classes=10, pretrained=True, pretrained_cfg_overlay={"state_dict": other})
    assert torch.equal(model.head.weight, state["head.weight"]) and model.dist_head.weight.shape == (10, 40)


@pytest.mark.parametrize(
    "options",
    [
        {"distillation": False},
        {"num_classes": 0},
        {"num_classes": 0, "distillation": False},
        {"num_classes": 0, "global_pool": ""},
        {"features_only": True},
        {"features_only": True, "out_indices": (0, 1)},
        {"features_only": True, "out_indices": (-2,)},
        {"features_only": True, "feature_cls": "hook", "out_indices": (1, 2)},
        {"features_only": True, "feature_cls": "fx", "out_indices": (2,)},
        {"features_only": True, "feature_cfg": {"prune": False}},
    ],
)
def test_parts_left_away_on_purpose(file, state, options, tmp_path):
    """Without a warning, and the other way round a backbone's own checkpoint fills it."""
    options = {"num_classes": 10, **options}
    model = tiny(weights=file, **options)
    prefix = {"hook": "body.", "fx": "graph_module."}.get(options.get("feature_cls"), "model.")
    agree(model, {**state, **{prefix + name: value for name, value in state.items()}})
    agree(tiny(weights=saved(model.state_dict(), tmp_path, "own.pth"), **options), model.state_dict())


BACKBONES = {
    "classes": {"num_classes": 10},
    "other classes": {"num_classes": 3},
    "pooled": {"num_classes": 0},
    "map": {"num_classes": 0, "global_pool": ""},
    "features": {"features_only": True},
    "hook": {"features_only": True, "feature_cls": "hook"},
}


@pytest.mark.filterwarnings("ignore:The checkpoint is for another number")
@pytest.mark.parametrize("outputs", BACKBONES)
def test_strict_whatever_the_output(state, outputs, tmp_path):
    without = {name: value for name, value in state.items() if name != "stages.1.blocks.1.mlp.fc1.weight"}
    wrong = {**state, "stages.2.blocks.0.norm2.weight": torch.zeros(33)}
    resnet = timm.create_model("resnet18", num_classes=10).state_dict()
    for content, words in (
        (without, "Missing keys: stages.1.blocks.1.mlp.fc1.weight$"),
        ({**state, "stages.9.weight": torch.zeros(1)}, "Unexpected keys: stages.9.weight$"),
        (wrong, r"Wrong shapes: stages.2.blocks.0.norm2.weight \(33,\) in place of \(32,\)$"),
        ({"nonsense": torch.zeros(3)}, "Missing keys: .* more; Unexpected keys: nonsense$"),
        (resnet, "Missing keys: .* more; Unexpected keys: .*conv1.weight.* more"),
        ({}, "Missing keys: "),
    ):
        path = saved(content, tmp_path)
        with pytest.raises(RuntimeError, match=rf"groupmamba_tiny: weights='{path}' could not be loaded.*{words}"):
            tiny(weights=path, **BACKBONES[outputs])


def test_a_missing_head_is_named(state, tmp_path):
    path = saved({name: value for name, value in state.items() if "head" not in name}, tmp_path)
    with pytest.raises(RuntimeError, match="Missing keys: head.weight, head.bias, dist_head.weight, dist_head.bias$"):
        tiny(weights=path, num_classes=10)
    agree(tiny(weights=path, features_only=True), {f"model.{name}": value for name, value in state.items()})


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
@pytest.mark.parametrize("outputs", ["classes", "features"])
def test_other_channels(file, state, outputs, channels):
    model = tiny(weights=file, in_chans=channels, **BACKBONES[outputs])
    weight = next(value for name, value in model.state_dict().items() if name.endswith("stem.conv.0.weight"))
    expected = timm.models.adapt_input_conv(channels, state["stem.conv.0.weight"])
    assert weight.shape[1] == channels and torch.equal(weight, expected)


def test_own_channels(tmp_path):
    """A checkpoint for 4 channels fills a model for 4 as it is, and no model for 5."""
    source = small(in_chans=4)
    path = saved(source.state_dict(), tmp_path)
    agree(tiny(weights=path, in_chans=4, num_classes=10), source.state_dict())
    with pytest.raises(
        RuntimeError, match=r"Wrong shapes: stem.conv.0.weight \(8, 4, 7, 7\) in place of \(8, 5, 7, 7\)"
    ):
        tiny(weights=path, in_chans=5, num_classes=10)


def test_another_number_of_groups_is_named(file):
    with pytest.raises(RuntimeError, match="does not fit the model. It has 4 groups in place of 8. Wrong shapes: "):
        tiny(num_classes=10, directions=("lr", "tb") * 4, weights=file)


def test_another_size_is_named(tmp_path):
    path = saved(groupmamba_tiny().state_dict(), tmp_path)
    words = r"another size: dims \(64, 128, 348, 448\) and depths \(3, 4, 9, 3\) \(groupmamba_tiny\) in place of dims"
    for options in ({}, {"features_only": True}, {"num_classes": 0}):
        with pytest.raises(RuntimeError, match=words):
            groupmamba_small(weights=path, **options)
    with pytest.raises(RuntimeError, match=words):
        tiny(weights=path, features_only=True, out_indices=(0, 1))


PREFIXES = (
    *("model.", "backbone.", "module.", "_orig_mod.", "encoder."),
    *("module.model.", "_orig_mod.module.", "module._orig_mod.", "model.backbone._orig_mod."),
    *("backbone.body.model.", "encoder.model.model.", "_forward_module.", "ema_model.", "student.module."),
    *("module._fsdp_wrapped_module.", "_fsdp_wrapped_module.module.", "model._checkpoint_wrapped_module."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("outer", [None, "model", "state_dict", "model_ema", "state_dict_ema", "module"])
def test_prefixes(state, tmp_path, prefix, outer):
    content = {prefix + name: value for name, value in state.items()}
    if outer is not None:
        content = {outer: content, "epoch": 3, "optimizer": {"state": {}}, "args": {"lr": 0.1}}
    agree(tiny(num_classes=10, weights=saved(content, tmp_path)), state)


def test_dtypes_of_another_kind_are_named(state, tmp_path):
    content = {**state, "head.weight": (100 * state["head.weight"]).to(torch.int8)}
    with pytest.raises(RuntimeError, match="Wrong dtypes: head.weight torch.int8 in place of torch.float32"):
        tiny(num_classes=10, weights=saved(content, tmp_path))


def test_an_address_without_an_answer():
    overlay = {"hf_hub_id": None, "url": "http://127.0.0.1:9/none.pth"}
    with pytest.raises(RuntimeError, match="the weights of http://127.0.0.1:9/none.pth could not be loaded"):
        timm.create_model("groupmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay)


class _Around(nn.Module):
    def __init__(self, model, name="model"):
        super().__init__()
        self.add_module(name, model)


@pytest.mark.parametrize("wrap", ["ema", "swa", "compiled", "compiled blocks", "trainer around averages"])
def test_wrappers(state, tmp_path, wrap):
    model = tiny(num_classes=10)
    model.load_state_dict(state)
    if wrap == "ema":
        wrapped = timm.utils.ModelEmaV3(model)
    elif wrap == "swa":
        wrapped = torch.optim.swa_utils.AveragedModel(torch.compile(model))
        assert "n_averaged" in wrapped.state_dict()
    elif wrap == "trainer around averages":
        wrapped = _Around(torch.optim.swa_utils.AveragedModel(model), "backbone")
    elif wrap == "compiled":
        wrapped = _Around(torch.compile(model))
    else:
        wrapped = model
        for stage in wrapped.stages:
            stage.blocks[0] = torch.compile(stage.blocks[0])
        assert any(".blocks.0._orig_mod." in name for name in wrapped.state_dict())
    agree(tiny(num_classes=10, weights=saved({"state_dict": wrapped.state_dict()}, tmp_path)), state)


def test_what_stands_beside_the_model_is_named(state, tmp_path):
    content = {**{f"model.{name}": value for name, value in state.items()}, "criterion.weight": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="Unexpected keys: criterion.weight$"):
        tiny(num_classes=10, weights=saved(content, tmp_path))
    content = {f"{prefix}{name}": value for prefix in ("model.", "encoder.") for name, value in state.items()}
    with pytest.raises(RuntimeError, match="several models, at 'encoder.', 'model.'"):
        tiny(num_classes=10, weights=saved(content, tmp_path))
    inner = "stages.0._orig_mod.blocks.0.norm2.weight"
    with pytest.raises(RuntimeError, match="both become 'stages.0.blocks.0.norm2.weight'"):
        tiny(num_classes=10, weights=saved({**state, inner: torch.zeros(16)}, tmp_path))


class _Dangerous:
    def __reduce__(self):
        return print, ("executed",)


def _bad_files(folder):
    good = folder / "good.safetensors"
    save_file({"x": torch.zeros(1000)}, good)
    files = {
        "text.pth": b"epoch: 3\nlr: 0.1\n",
        "text.safetensors": b"epoch: 3\nlr: 0.1\n",
        "empty.pth": b"",
        "empty.safetensors": b"",
        "truncated.safetensors": good.read_bytes()[:-1000],
        "header.safetensors": good.read_bytes()[:20],
        "huge header.safetensors": b"\xff" * 64,
        "json.pth": b'{"model": 3}',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        yield folder / name
    for name, content in {
        "list.pth": [torch.zeros(3)],
        "int.pth": 5,
        "tensor.pth": torch.zeros(3),
        "none.pth": None,
        "list inside.pth": {"state_dict": [torch.zeros(3)]},
        "numbers.pth": {"head.weight": 3.0},
        "number keys.pth": {0: torch.zeros(3)},
        "code.pth": {"model": _Dangerous()},
        "module.pth": nn.Linear(2, 2),
    }.items():
        yield saved(content, folder, name)
    yield saved({"head.weight": torch.zeros(1000)}, folder, "whole.pth")
    cut = folder / "cut.pth"
    cut.write_bytes((folder / "whole.pth").read_bytes()[:-700])
    yield cut
    with zipfile.ZipFile(folder / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    yield folder / "archive.pth"


@pytest.mark.parametrize("outputs", ["classes", "features"])
def test_files_that_are_no_checkpoints(tmp_path, capsys, outputs):
    for path in _bad_files(tmp_path):
        with pytest.raises(RuntimeError) as caught:
            tiny(weights=path, **BACKBONES[outputs])
        assert str(caught.value).startswith(f"groupmamba_tiny: weights={str(path)!r} could not be loaded: "), path
        with pytest.raises(RuntimeError, match=path.name):
            tiny(pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **BACKBONES[outputs])
    assert "executed" not in capsys.readouterr().out


def test_no_path_and_no_file(tmp_path):
    for weights in (3, {"head.weight": torch.zeros(3)}, b"checkpoint.pth"):
        with pytest.raises(TypeError, match=f"weights must be a path, got {type(weights).__name__}"):
            tiny(weights=weights)
    for weights in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(FileNotFoundError, match=f"weights must be .* got '{weights}'"):
            tiny(weights=weights)


@pytest.fixture(params=["save_pretrained", "safetensors", "pickle"])
def folder(request, tmp_path):
    """A model of 4 channels, 6 classes, and its folder: of the hub's own kind, or of timm's."""
    model = tiny(num_classes=6, in_chans=4, variant="fused", directions=("bt", "lr", "lr", "rl"), drop_path_rate=0.1)
    if request.param == "save_pretrained":
        model.save_pretrained(tmp_path / "model")
    else:
        save_for_hf(model, tmp_path / "model", safe_serialization=request.param == "safetensors",
                    model_args=model.init_arguments)  # fmt: skip
    return model.eval(), tmp_path / "model"


def test_folders_load_each_way_round(folder):
    model, path = folder
    for again in (
        timm.create_model(f"local-dir:{path}", pretrained=True),
        GroupMamba.from_pretrained(path),
        tiny(num_classes=6, in_chans=4, variant="fused", directions=("bt", "lr", "lr", "rl"), weights=path),
    ):
        agree(again, model.state_dict())
        x = torch.randn(1, 4, 32, 32)
        assert torch.equal(again.eval()(x), model(x))
    assert not GroupMamba.from_pretrained(path).training
    with pytest.warns(UserWarning, match="6 in place of 3"):
        assert GroupMamba.from_pretrained(path, num_classes=3).head.out_features == 3
    with pytest.warns(UserWarning, match="6 in place of 3"):
        timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=3)
    features = timm.create_model(f"local-dir:{path}", pretrained=True, features_only=True)
    agree(features.model, model.state_dict())


def test_folders_say_what_is_wrong(folder, state):
    model, path = folder
    (file,) = (p for p in path.iterdir() if p.name.startswith(("model.", "pytorch_model.")))
    content = {"nonsense": torch.zeros(3)}
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    for load in (
        lambda: timm.create_model(f"local-dir:{path}", pretrained=True),
        lambda: GroupMamba.from_pretrained(path),
        lambda: tiny(weights=path),
    ):
        with pytest.raises(RuntimeError, match=rf"{file}.*Missing keys: .*Unexpected keys: nonsense"):
            load()


def test_folders_name_no_other_weights(file, state, tmp_path):
    """The folder of a model that was filled from a file is complete without that file."""
    model = tiny(num_classes=10, weights=file)
    for name in ("own", "timm"):
        model.save_pretrained(tmp_path / name) if name == "own" else save_for_hf(
            model, tmp_path / name, model_args=model.init_arguments
        )
        assert "checkpoint.pth" not in json.dumps(json.loads((tmp_path / name / "config.json").read_text()))
    file.unlink()
    for name in ("own", "timm"):
        agree(timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True), state)


def test_config_follows_the_model(tmp_path):
    model = tiny(num_classes=10, in_chans=4)
    model.reset_classifier(0, "")
    model.save_pretrained(tmp_path / "map")
    assert GroupMamba.from_pretrained(tmp_path / "map").state_dict().keys() == model.state_dict().keys()
    model.reset_classifier(4, "avg")
    model.save_pretrained(tmp_path / "classes")
    again = timm.create_model(f"local-dir:{tmp_path / 'classes'}", pretrained=True)
    agree(again, model.state_dict())
    assert tuple(again.pretrained_cfg["input_size"]) == (4, 224, 224) and again.pretrained_cfg["num_classes"] == 4
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="needs all 4 stages, got a model pruned to its first 2"):
        model.save_pretrained(tmp_path / "pruned")
    for name, sizes in SIZES.items():
        with torch.device("meta"):
            assert GroupMamba(**sizes)._config_for_both()["architecture"] == name


def test_hub_of_timms_kind(folder, monkeypatch):
    """``hf-hub:`` names a repository with the same two files."""
    model, path = folder

    def download(repo_id, filename, **_):
        if not (path / filename).exists():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    agree(timm.create_model("hf-hub:someone/model", pretrained=True), model.state_dict())
