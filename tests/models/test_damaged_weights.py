# SPDX-License-Identifier: Apache-2.0
"""Weights that this project wrote and that changed since: no flipped byte is loaded, wherever it lies."""

import zipfile

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'models'")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra 'train'")
pytest.importorskip("torchvision", reason="needs the extra 'train'")
pytest.importorskip("yaml", reason="needs the extra 'train'")

from groupmamba import checksum  # noqa: E402
from groupmamba.models import GroupMamba  # noqa: E402
from groupmamba.models.pretrained import read_checkpoint  # noqa: E402
from groupmamba.training.card import Card, read_card  # noqa: E402
from groupmamba.training.checkpoint import read_state, read_weights  # noqa: E402
from groupmamba_ext._command import CommandError  # noqa: E402
from support.models import small  # noqa: E402
from support.training import command, losses, make_pictures, train  # noqa: E402

WEIGHTS = {"a": torch.arange(5.0), "b.weight": torch.ones(2, 3, dtype=torch.bfloat16), "n": torch.tensor(7)}
CARD = Card("groupmamba_tiny", 2, classes=["ä cat", 'a "dog", sha256:' + "0" * 64])


def flip(path, position, mask):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def test_every_bit_of_a_file(tmp_path):
    """The length, the card, the names, the padding, the checksum itself with its name, and the tensors."""
    path = tmp_path / "w.safetensors"
    data = checksum.with_checksum(safetensors.save(WEIGHTS, CARD.header()))
    path.write_bytes(data)
    assert read_weights(path).keys() == WEIGHTS.keys()
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(RuntimeError):
                read_checkpoint(str(path))


def test_files_stay_what_they_were(tmp_path):
    """For readers that know nothing of it: the same tensors and metadata. Sealed again, the same bytes."""
    path = tmp_path / "w.safetensors"
    data = checksum.with_checksum(safetensors.save(WEIGHTS, CARD.header()))
    path.write_bytes(data)
    loaded = safetensors.load_file(path)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in WEIGHTS.items()
    )
    assert read_card(path) == CARD
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata.pop(checksum.KEY).startswith("sha256:") and metadata == CARD.header()
    assert checksum.with_checksum(data) == data
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0


def test_files_of_other_programs_are_read(tmp_path):
    path = tmp_path / "w.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.save_file(WEIGHTS, path, metadata)
        assert read_checkpoint(str(path)).keys() == WEIGHTS.keys()


def test_other_tensors_under_kept_metadata_are_found(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(checksum.with_checksum(safetensors.save(WEIGHTS)))
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    safetensors.save_file({**WEIGHTS, "a": torch.zeros(5)}, path, metadata)
    with pytest.raises(RuntimeError, match="groupmamba.checksum does not fit.*damaged"):
        read_checkpoint(str(path))


def test_folders_of_save_pretrained(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    GroupMamba.from_pretrained(tmp_path)
    flip(path, path.stat().st_size - 100, 1)
    for load in (
        lambda: GroupMamba.from_pretrained(tmp_path),
        lambda: GroupMamba.from_pretrained(tmp_path, strict=False),
        lambda: timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
    ):
        with pytest.raises(RuntimeError, match=rf"{tmp_path}.* loaded: its bytes are not those that were written"):
            load()


def test_hub_downloads(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    for place in ("huggingface_hub.hub_mixin", "timm.models._hub"):
        monkeypatch.setattr(f"{place}.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    GroupMamba.from_pretrained("someone/model")
    flip(path, path.stat().st_size - 100, 16)
    with pytest.raises(RuntimeError, match=r"model\.safetensors.*its bytes are not those that were written"):
        GroupMamba.from_pretrained("someone/model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=6, validation=2)


def test_runs(data, tmp_path, capsys):
    """A run goes on from the checkpoint before a damaged one; nothing is validated or predicted by damaged weights."""
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "2", "--checkpoint-hist", "2") == 0
    expected = losses(run)
    before, last = sorted((run / "checkpoints").iterdir())
    with zipfile.ZipFile(last / "state.pt") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    for name, position in (("model.safetensors", -50), ("state.pt", largest.header_offset + largest.file_size)):
        file = last / name
        flip(file, position, 8)
        with pytest.raises(CommandError, match=last.name):
            read_state(last)
        capsys.readouterr()
        assert train(data, run, "--epochs", "2", "--checkpoint-hist", "2") == 0
        error = capsys.readouterr().err
        assert f"{last} is no checkpoint that can be read" in error and f"going on from {before}" in error, error
        assert losses(run) == expected
        read_state(last)
    flip(run / "best.safetensors", -50, 8)
    picture = str(data / "validation" / "red" / "0.png")
    for argv in (
        ("predict", picture, "--weights", str(run), "--device", "cpu"),
        ("validate", str(data), "--weights", str(run), "--device", "cpu", "-j", "0"),
    ):
        assert command(*argv) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "best.safetensors" in line]
        assert "its bytes are not those that were written" in line
