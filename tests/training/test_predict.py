# SPDX-License-Identifier: Apache-2.0
"""``groupmamba predict``: classes by their names, and maps that show what they say."""

import pytest
import torch

from support.training import KWARGS, PLAIN, command, make_pictures, train

pytest.importorskip("timm")

import timm
from safetensors.torch import load_file

import groupmamba.models
from groupmamba.training.card import model_of, read_card
from groupmamba.training.predict import explain

SIZES = {"depths": (1, 1, 2, 1), "dims": (16, 16, 32, 32), "stem_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_from_a_folder_to_a_prediction(data, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "picture.png"
    assert train(data, run, "--epochs", "4", *PLAIN, "--lr", "1e-2") == 0
    capsys.readouterr()
    images = [str(data / "validation" / name / "0.png") for name in ("red", "blue")]
    assert command("predict", *images, "--weights", str(run), "--device", "cpu", "--out", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == images[0] and lines[1].split()[0] == "red" and lines[4] == images[1]
    assert lines[5].split()[0] == "blue" and "█" in lines[5] and lines[-1] == str(out)
    shares = [float(line.split()[1].rstrip("%")) for line in lines[1:4]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_predicted_is_one_line(data, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    model = timm.create_model("groupmamba_tiny", num_classes=3, **SIZES)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    image, bare = str(data / "validation" / "red" / "0.png"), str(tmp_path / "bare.pth")
    kwargs = [f"{name}={value}" for name, value in SIZES.items()]
    for argv, status, words in (
        ([image, "--weights", str(tmp_path / "none")], 1, ("--weights", "none")),
        ([image, "--weights", str(tmp_path / "bare.pth")], 2, ("--model",)),
        ([image, "--weights", str(text), "--model", "groupmamba_tiny"], 1, ("text.png",)),
        ([image, "--weights", str(tmp_path / "bare.pth"), "--out", "x.jpg"], 2, ("--out", "x.jpg")),
        ([image, "--weights", str(tmp_path / "bare.pth"), "--model", "groupmamba_base"], 1, ("another size",)),
        ([image, "--weights", "x", "--out", str(tmp_path / "none" / "x.png")], 1, ("--out", "none/x.png")),
        (
            [str(text), "--weights", bare, "--model", "groupmamba_tiny", "--model-kwargs", *kwargs],
            1,
            (f"{text} can't be read as an image: no image in a format that Pillow knows",),
        ),
        (
            ["nowhere.jpg", "--weights", bare, "--model", "groupmamba_tiny", "--model-kwargs", *kwargs],
            1,
            ("nowhere.jpg can't be read as an image: No such file or directory",),
        ),
        (["", "--weights", bare], 2, ("IMAGE", "must be a path, got ''")),
    ):
        assert command("predict", *argv, "--device", "cpu") == status
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_model_kwargs_of_a_bare_checkpoint(data, tmp_path, capsys):
    """Both commands build the model from --model and --model-kwargs, and give what the checkpoint with a card gives."""
    run, out, image = tmp_path / "run", str(tmp_path / "picture.png"), str(data / "validation" / "red" / "0.png")
    assert train(data, run, "variant=fused", "--epochs", "1", *PLAIN) == 0
    torch.save(load_file(run / "last.safetensors"), tmp_path / "bare.pth")
    bare = ["--weights", str(tmp_path / "bare.pth"), "--model", "groupmamba_tiny", "--device", "cpu"]
    kwargs = ["--model-kwargs", *KWARGS, "variant=fused"]
    for argv in (["predict", image, "--out", out], ["validate", str(data), "-j", "0"]):
        size = ["--img-size", "32"] if argv[0] == "validate" else []
        said = []
        for options in (["--weights", str(run / "last.safetensors"), "--device", "cpu"], [*bare, *size, *kwargs]):
            capsys.readouterr()
            assert command(*argv, *options) == 0
            said.append(capsys.readouterr().out.split())
        if argv[0] == "validate":
            assert said[0] == said[1]
        assert command(*argv, *bare) == 1  # of another size
        assert "another size" in capsys.readouterr().err
    for more, words in (
        (["variant=paper"], "variant='paper' is not the variant='fused' that"),
        (["scan=cross"], "scan='cross'"),
        (["num_classes=3"], "num_classes=3 can't be given"),
    ):
        argv = ["predict", image, "--weights", str(run / "last.safetensors"), "--model-kwargs", *KWARGS, *more]
        assert command(*argv, "--device", "cpu", "--out", out) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["released", "fused", "paper"])
def test_maps_are_of_the_groups_and_change_nothing(variant, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions differ with and without gradients
    torch.manual_seed(0)
    model = timm.create_model("groupmamba_tiny", num_classes=3, variant=variant, **SIZES).to(device).eval()
    for parameter in model.parameters():  # away from the initial values, at which branches hardly count
        parameter.data += 0.1 * torch.randn_like(parameter)
    image = torch.randn(1, 3, 96, 128, device=device)
    with torch.no_grad():
        expected = model(image)[0].cpu()
    logits, maps = explain(model, image)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    titles = [title for title, _ in maps]
    if variant == "paper":
        assert titles == ["Grad-CAM"]
        return
    assert titles[1:] == [f"group {i + 1}, {name}" for i, name in enumerate(model.stages[2].blocks[-1].attn.directions)]
    for title, values in maps[1:]:
        assert values.shape == (6, 8) and values.max() == 1 and values.min() >= 0, title
    # A group that passes nothing on draws on nothing.
    model.stages[2].blocks[-1].attn.mamba.in_proj_weight.data[1].zero_()
    _, maps = explain(model, image)
    assert [bool(values.any()) for _, values in maps[1:]] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.stage_maps[-1]._forward_hooks and not model.stages[2].blocks[-1].attn.mamba._forward_pre_hooks


def test_maps_of_other_groups(device):
    """One a group, named after its direction where it has one; a group of a cross scan has several."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 64, device=device)
    for options, names in (
        ({"directions": ("tb",)}, ["group 1, tb"]),
        ({"directions": ("lr", "bt") * 4}, [f"group {i + 1}, {('lr', 'bt')[i % 2]}" for i in range(8)]),
        ({"scan": "cross"}, [f"group {i + 1}" for i in range(4)]),
        ({"gate_source": "output"}, [f"group {i + 1}, {d}" for i, d in enumerate(("lr", "tb", "rl", "bt"))]),
    ):
        model = timm.create_model("groupmamba_tiny", num_classes=3, **options, **SIZES).to(device).eval()
        _, maps = explain(model, image)
        assert [title for title, _ in maps] == ["Grad-CAM", *names]
        assert all(values.shape == (4, 4) and values.isfinite().all() for _, values in maps[1:])


def test_a_checkpoint_names_its_groups_and_gate(data, tmp_path, capsys):
    """From its header alone `validate` and `predict` build the model; training from it with others says so."""
    run, more = tmp_path / "run", ("directions=('lr','tb','lr','tb','lr','tb','lr','tb')", "gate_source=output")
    assert train(data, run, *more, "--epochs", "1", *PLAIN) == 0
    card = read_card(run / "last.safetensors")
    assert card.model_kwargs["directions"] == ["lr", "tb"] * 4 and card.model_kwargs["gate_source"] == "output"
    model, _ = model_of(run / "last.safetensors")
    layer = model.stages[0].blocks[0].attn
    assert (layer.groups, layer.directions, layer.gate_source) == (8, ("lr", "tb") * 4, "output")
    out, image = tmp_path / "picture.png", str(data / "validation" / "red" / "0.png")
    assert command("predict", image, "--weights", str(run), "--device", "cpu", "--out", str(out)) == 0
    assert command("validate", str(data), "--weights", str(run), "--device", "cpu", "-j", "0") == 0
    capsys.readouterr()
    again = ("directions=('lr','tb','rl','bt','lr','tb','rl','bt')", "--weights", str(run), "--epochs", "1", *PLAIN)
    assert train(data, tmp_path / "again", *again) == 0
    text = "".join(capsys.readouterr())
    assert "was trained with gate_source='output', and the model has gate_source='input'" in text
    assert f"was trained with directions={('lr', 'tb') * 4}, and the model has directions=" in text


def test_other_models_have_classes_and_no_maps():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    logits, maps = explain(model, torch.randn(1, 3, 64, 64))
    assert logits.shape == (3,) and maps == []


assert groupmamba.models
