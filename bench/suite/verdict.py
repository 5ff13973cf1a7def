# SPDX-License-Identifier: Apache-2.0
"""What failed, read from the rows: of this project's own, which makes a run red, and of a peer's, which does not."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

PEER_ERRORS = (Exception, SystemExit)  # a peer is not this project's code: whatever it raises is its answer


class DeviceLost(RuntimeError):
    """A peer left the device unusable, so that nothing more can be measured in this process."""


def reason(error: BaseException, *, place: bool = False) -> str:
    """One line for a report.

    Args:
        place: name the file and line that raised it.
    """
    first = next(iter(str(error).splitlines()), "")
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    text = f"{kind}: {first}" if first else kind
    frames = traceback.extract_tb(error.__traceback__) if place else []
    frames = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def require_device(device: torch.device, peer: str) -> None:
    """To be called after a peer failed.

    Raises:
        DeviceLost: it left the device unusable.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceLost(f"peer {peer} left the device unusable: {reason(error)}") from error


def own(row: dict) -> bool:
    """Whether a row is of this project's code: all are but those of other whole models."""
    return row["op"] != "model" or row["series"] == "ours"


def failure(row: dict) -> str | None:
    """Why a row has no figures or not all of them."""
    if row["us"] is None:
        return row["error"] or "not measured"
    return None if row["graph_error"] is None else f"no CUDA graph: {row['graph_error']}"


def _where(row: dict) -> str:
    return f"{row['label']}, {row['pass']}" if row["op"] == "model" else f"{row['op']} {row['shape']} {row['pass']}"


def _grouped(found: Iterator[tuple[str, str]]) -> list[str]:
    """Each text once, with the first place that it is true of, and how many there are."""
    places: dict[str, list[str]] = {}
    for text, where in found:
        places.setdefault(text, []).append(where)
    more = {text: f" and {len(where) - 1} more" if len(where) > 1 else "" for text, where in places.items()}
    return [f"{text} ({where[0]}{more[text]})" for text, where in places.items()]


def failures(rows: Sequence[dict]) -> list[str]:
    """What failed of this project's own, each reason once; a run is red if there is anything."""
    return _grouped((f"RED: {row['label']}: {failure(row)}", _where(row)) for row in rows if own(row) and failure(row))


def peer_failures(rows: Sequence[dict]) -> list[str]:
    """Why peers have no ratio or no graph, each reason once."""

    def found() -> Iterator[tuple[str, str]]:
        for row in rows:
            if not own(row) and failure(row):
                yield f"peer {row['label']}: {failure(row)}", _where(row)
            if row["op"] == "model":  # its peers are rows of their own
                continue
            for name, peer in row["peers"].items():
                if peer.get("own"):
                    continue
                if peer["error"] is not None:
                    yield f"peer {name}: {peer['error']}, so no ratio", _where(row)
                elif peer.get("graph_error") is not None:
                    yield f"peer {name}: no CUDA graph: {peer['graph_error']}", _where(row)

    return _grouped(found())


def failed_rows(rows: Sequence[dict]) -> int:
    """How many of this project's rows failed."""
    return sum(own(row) and failure(row) is not None for row in rows)
