# SPDX-License-Identifier: Apache-2.0
"""The console command: the demo writes its picture and notices wrong results, info and errors read well."""

import sys

import pytest
import torch

import groupmamba_ext as ext
from groupmamba import cli, demo

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


def test_demo_without_an_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--size", "128", "--device", "cpu"]) == 0
    with Image.open(tmp_path / "groupmamba_demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 5000  # photographs, not empty frames
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" ms") for line in lines) == 4
    assert any("relative error" in line for line in lines)
    assert lines[-1] == "picture: groupmamba_demo.png"


@pytest.mark.cuda
def test_demo_on_the_gpu(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "a.png"), "--size", "128"]) == 0
    assert "cuda: relative error" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "size"), [("RGB", (50, 160)), ("L", (160, 70)), ("RGBA", (90, 90))])
def test_demo_with_a_file(mode, size, tmp_path):
    source, out = tmp_path / "photo.png", tmp_path / "picture.png"
    Image.radial_gradient("L").resize(size).convert(mode).save(source)
    assert cli.main(["demo", str(source), "--out", str(out), "--size", "64", "--device", "cpu"]) == 0
    assert out.stat().st_size > 10_000


def test_demo_fails_on_wrong_results(tmp_path, monkeypatch, capsys):
    original = ext.grouped_selective_scan

    def wrong(u, *args, **options):
        y = original(u, *args, **options)
        return y if u.dtype == torch.float64 else y + 0.01

    monkeypatch.setattr(ext, "grouped_selective_scan", wrong)
    assert cli.main(["demo", "--out", str(tmp_path / "a.png"), "--size", "64", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.jpg"], ("missing.jpg",)),
        (["--size", "8"], ("--size", "8")),
        (["--device", "tpu"], ("--device", "'tpu'")),
        (["--out", "no/such/folder/a.png"], ("--out", "no/such/folder")),
    ],
    ids=("image", "size", "device", "out"),
)
def test_demo_errors(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *argv]) == 1
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import then raises ModuleNotFoundError
    assert cli.main(["demo"]) == 1
    message = capsys.readouterr().err
    assert "matplotlib" in message and "pip install 'groupmamba[demo]'" in message


def test_embedding_is_deterministic_and_keeps_the_aspect():
    photo = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(0))
    features = demo.embed(photo)
    assert features.shape == (1, demo.DIM, 10, 15)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(features, demo.embed(photo))


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (ext.__version__, torch.__version__, *ext.build_info()):
        assert word in text


def test_help_lists_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "info", "selftest"))
