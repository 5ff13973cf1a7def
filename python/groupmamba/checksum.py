# SPDX-License-Identifier: Apache-2.0
"""A SHA-256 inside the header of a safetensors file, over every byte of the file: weights that changed on a disk or on
the way are found when they are read.

The header's ``__metadata__`` holds ``"groupmamba.checksum": "sha256:<64 digits>"``, the digest of the file with these
digits as zeros. Readers that do not know it read the file as ever. Files without it, of other programs, are read
unchecked.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import BinaryIO

KEY = "groupmamba.checksum"
PREFIX = "sha256:"
_ZEROS = f"{PREFIX}{'0' * 64}"
_ALIGNMENT = 8  # of the tensors, as safetensors writes them
_MAX_HEADER = 100_000_000  # bytes, as safetensors has it
_PIECE = 1 << 20


def with_checksum(data: bytes) -> bytes:
    """The same tensors and metadata as in the safetensors file ``data``, with the checksum in its header."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    metadata = entries.pop("__metadata__", {})
    metadata.pop(KEY, None)
    text = json.dumps({"__metadata__": {KEY: _ZEROS, **metadata}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    size = len(text).to_bytes(8, "little")
    body = memoryview(data)[8 + length :]
    digest = hashlib.sha256(size + text)
    digest.update(body)
    text = text.replace(_ZEROS.encode(), f"{PREFIX}{digest.hexdigest()}".encode(), 1)
    return b"".join((size, text, body))


def check(path: str | os.PathLike) -> None:
    """Compares a safetensors file with the checksum in its header, if it has one.

    Raises:
        RuntimeError: the bytes are others than those that were written.
        OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        text = file.read(length) if length <= _MAX_HEADER else b""
        stored = _stored(text)
        if stored is not None and stored != _digest(size, text, stored, file):
            raise RuntimeError(
                f"its bytes are not those that were written ({KEY} does not fit): the file is damaged, or was changed "
                "by a program that kept its metadata; use another copy"
            )


def _stored(text: bytes) -> str | None:
    """The checksum in a header. One changed byte may hide its name or its prefix, not both."""
    try:
        metadata = json.loads(text)["__metadata__"]
        return next((value for key, value in metadata.items() if key == KEY or value.startswith(PREFIX)), None)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # no header, which safetensors says itself


def _digest(size: bytes, text: bytes, stored: str, file: BinaryIO) -> str:
    digest = hashlib.sha256(size + text.replace(stored.encode(), _ZEROS.encode(), 1))
    while piece := file.read(_PIECE):
        digest.update(piece)
    return f"{PREFIX}{digest.hexdigest()}"
