# SPDX-License-Identifier: Apache-2.0
"""The demo: photographs of every kind, its picture, wrong results, and one line for what cannot be done."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

import groupmamba_ext as ext
from groupmamba import cli
from groupmamba.demo import command as demo
from groupmamba.demo.features import DIM, embed
from groupmamba_ext._command import check_out

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
demo_photo = pytest.importorskip("groupmamba.demo.photo")


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


@pytest.fixture
def no_work(monkeypatch):
    """Whatever is wrong must be found before any work."""
    monkeypatch.setattr(demo, "run", lambda *args: pytest.fail("the demo ran"))


def refused(argv, capsys):
    """The one line of a demo that cannot be done here."""
    assert cli.main(["demo", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    "out", ["no/such/folder/a.png", ".", "folder.png", "pipe.png", "file/a.png", "/proc/a.png", "a" * 300 + ".png"]
)
def test_places_that_cannot_be_written(out, no_work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.png")
    line = refused(["--out", out], capsys)
    assert "--out" in line or "name too long" in line
    assert out in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("out", ["locked/a.png", "locked.png"])
def test_places_that_may_not_be_written(out, no_work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "locked.png").touch(mode=0o400)
    line = refused(["--out", out], capsys)
    assert "--out cannot be written" in line and out in line


def test_the_check_of_out_changes_nothing(tmp_path):
    check_out(tmp_path / "new.png")
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old.png"
    old.write_bytes(b"something")
    check_out(old)
    assert old.read_bytes() == b"something"


def png_header(width, height):
    """A PNG that says it has so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def photograph():
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg")).resize((96, 64))


def encoded(kind):
    buffer = io.BytesIO()
    photograph().save(buffer, kind)
    return buffer.getvalue()


NO_PHOTOGRAPHS = {
    "bomb": (lambda: png_header(30_000, 30_000), "limit against decompression bombs, PIL.Image.MAX_IMAGE_PIXELS = 89,"),
    "large": (
        lambda: png_header(10_000, 10_000),
        "limit against decompression bombs, PIL.Image.MAX_IMAGE_PIXELS = 89,",
    ),
    "empty": (lambda: b"", "is not an image that Pillow can read"),
    "text": (lambda: b"hello", "is not an image that Pillow can read"),
    "truncated png": (lambda: encoded("png")[:5000], "truncated"),
    "truncated jpeg": (lambda: encoded("jpeg")[:900], "truncated"),
    "truncated webp": (lambda: encoded("webp")[:900], "cannot be read"),
    "broken png": (lambda: encoded("png")[:60] + bytes(200) + encoded("png")[260:], "cannot be read"),
}


@pytest.mark.parametrize("name", list(NO_PHOTOGRAPHS))
def test_files_that_are_no_photograph(name, no_work, tmp_path, capsys):
    path = tmp_path / "photo.jpg"
    data, words = NO_PHOTOGRAPHS[name]
    path.write_bytes(data())
    line = refused([path, "--out", tmp_path / "a.png"], capsys)
    assert f"IMAGE {path} " in line and words in line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["missing.jpg", "folder", "pipe"])
def test_no_file(name, no_work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    line = refused([name], capsys)
    assert "IMAGE must be an existing file" in line and name in line


def pixels_of(path, size=96):
    return demo_photo.load_photo(path, size, 4)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def ramp():
    """Brightness from 0 to 1, left to right."""
    return np.tile(np.linspace(0, 1, 96), (64, 1))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", (65535 * ramp()).astype(np.uint16)),
        ("a.tiff", ramp().astype(np.float32)),
        ("b.tiff", (1e6 * ramp()).astype(np.int32)),
    ],
    ids=("16 bits", "float32", "32 bits"),
)
def test_deep_images_keep_their_greys(name, values, tmp_path):
    photo = pixels_of(saved(Image.fromarray(values), tmp_path / name)).pixels
    assert (photo[..., 0] - torch.from_numpy(ramp())).abs().max() < 0.01
    assert torch.equal(photo[..., 0], photo[..., 2])


def test_deep_images_of_one_grey_or_with_holes(tmp_path):
    flat = np.full((8, 8), 7, np.float32)
    assert pixels_of(saved(Image.fromarray(flat), tmp_path / "a.tiff")).pixels.unique().tolist() == [0]
    flat[:, 4:], flat[0, 0] = 9, np.nan
    assert pixels_of(saved(Image.fromarray(flat), tmp_path / "b.tiff")).pixels.isfinite().all()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "RGBA", "YCbCr"])
def test_modes_agree(mode, tmp_path):
    image = photograph().convert(mode)
    path = saved(image, tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png"))
    expected = pixels_of(saved(photograph(), tmp_path / "b.png")).pixels
    error = (pixels_of(path).pixels - expected).abs().mean()
    assert error < (0.1 if mode == "P" else 0.01)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode, tmp_path):
    image = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 48, 64))
    options = {}
    if mode == "P":
        image = Image.new("P", (96, 64), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 48, 64))
        options = {"transparency": 1}
    photo = pixels_of(saved(image.convert(mode), tmp_path / "a.png", **options)).pixels
    assert photo[:, :40].max() == 0 and photo[:, 56:].min() == 1


def test_photographs_lie_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright = pixels_of(saved(photograph().rotate(-90, expand=True), tmp_path / "a.png")).pixels
    turned = pixels_of(saved(photograph(), tmp_path / "b.png", exif=exif)).pixels
    assert turned.shape == (96, 64, 3)
    assert torch.equal(turned, upright)


def test_the_first_of_several_images(tmp_path):
    frames = [Image.new("RGB", (96, 64), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    photo = pixels_of(tmp_path / "a.gif")
    assert photo.pixels[0, 0].tolist() == [1, 0, 0]
    assert photo.notes == ["the first of 3 images in the file"]


@pytest.mark.parametrize(
    ("size", "rows", "columns", "note"),
    [
        ((30, 2000), 256, 64, "the middle 30 x 120 of 30 x 2,000 pixels"),
        ((2000, 30), 64, 256, "the middle 120 x 30 of 2,000 x 30 pixels"),
        ((1, 5), 256, 64, "the middle 1 x 4 of 1 x 5 pixels"),
        ((400, 100), 64, 256, None),
        ((1, 1), 256, 256, None),
        ((300, 299), 256, 256, None),
    ],
)
def test_bounded_aspect(size, rows, columns, note, tmp_path):
    photo = pixels_of(saved(photograph().resize(size), tmp_path / "a.png"), 256)
    assert photo.pixels.shape == (rows, columns, 3)
    assert photo.notes == ([note] if note else [])


@pytest.mark.parametrize("size", [(30, 2000), (2000, 30), (1, 1)])
def test_the_picture_has_a_bounded_size(size, tmp_path, capsys):
    source, out = saved(photograph().resize(size), tmp_path / "a.png"), tmp_path / "b.png"
    assert cli.main(["demo", str(source), "--out", str(out), "--size", "64", "--device", "cpu"]) == 0
    with Image.open(out) as picture:
        assert picture.width == 1892 and 700 < picture.height < 2000
    assert ("the middle" in capsys.readouterr().out) == (2000 in size)


def test_quiet_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "groupmamba", "demo", "--size", "64", "--device", "cpu", "--out", "a.png"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("problem", ["missing", "broken"])
def test_missing_extra_is_named(problem, no_work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if problem == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # import then raises ModuleNotFoundError
    else:
        (tmp_path / "matplotlib.py").write_text("raise ImportError('built for another numpy')")
        monkeypatch.delitem(sys.modules, "matplotlib")
        monkeypatch.syspath_prepend(tmp_path)
    line = refused([], capsys)
    assert "matplotlib" in line
    assert ("pip install 'groupmamba[demo]'" if problem == "missing" else "built for another numpy") in line


def test_embedding_is_deterministic_and_keeps_the_aspect():
    photo = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(0))
    features = embed(photo)
    assert features.shape == (1, DIM, 10, 15)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(features, embed(photo))
