# SPDX-License-Identifier: Apache-2.0
"""The table of whole models: one line a model, whatever was measured of it beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from suite import accuracy
from suite.report import UNMEASURED, number
from suite.verdict import own

FAILED = ("RED", "failed")  # this project's, a peer's
Kinds = dict[str, dict]  # the rows of one model by what they measure


def grouped(rows: Sequence[dict]) -> dict[tuple, Kinds]:
    """The rows of whole models by label, batch, image and dtype; the latency of one image is with every batch."""
    models: dict[tuple, Kinds] = {}
    found = [row for row in rows if row["op"] == "model"]
    for row in found:
        if row["pass"] != "latency":
            models.setdefault((row["label"], row["batch"], row["shape"], row["dtype"]), {})[row["pass"]] = row
    for row in found:
        if row["pass"] == "latency":
            same = [k for k in models if (k[0], k[2], k[3]) == (row["label"], row["shape"], row["dtype"])]
            for key in same or [(row["label"], row["batch"], row["shape"], row["dtype"])]:
                models.setdefault(key, {})["latency"] = row
    return models


def figure(kinds: Kinds, kind: str, value: Callable[[dict], float | None]) -> str:
    """A cell: the figure, RED or failed where there is none (this project's, a peer's), or a dash."""
    row = kinds.get(kind)
    if row is None:
        return UNMEASURED
    if row["us"] is None:
        return FAILED[0] if own(row) else FAILED[1]
    return number(value(row), 4)


def images(mode: str) -> Callable[[dict], float | None]:
    """Images a second, as called (``eager_us``) or in a graph (``graph_us``)."""
    return lambda row: None if row[mode] is None else row["batch"] * 1e6 / row[mode]


def milliseconds(mode: str) -> Callable[[dict], float | None]:
    """Of one call."""
    return lambda row: None if row[mode] is None else row[mode] * 1e-3


def _memory(key: str, unit: float) -> Callable[[dict], float | None]:
    return lambda row: None if row.get(key) is None else row[key] / unit


def parameters(kinds: Kinds) -> str:
    """In millions."""
    counts = [row["parameters"] for row in kinds.values() if row.get("parameters") is not None]
    return f"{counts[0] / 1e6:.1f} M" if counts else UNMEASURED


def _launches(kinds: Kinds) -> str:
    launched = kinds.get("latency", {}).get("launches")
    return UNMEASURED if launched is None else str(launched)


COLUMNS: dict[str, Callable[[str, Kinds], str]] = {
    "top-1": lambda label, kinds: accuracy.cell(label) or UNMEASURED,
    "parameters": lambda label, kinds: parameters(kinds),
    "eval img/s, eager": lambda label, kinds: figure(kinds, "eval", images("eager_us")),
    "eval img/s, CUDA graph": lambda label, kinds: figure(kinds, "eval", images("graph_us")),
    "train img/s, eager": lambda label, kinds: figure(kinds, "train", images("eager_us")),
    "train img/s, CUDA graph": lambda label, kinds: figure(kinds, "train", images("graph_us")),
    "step img/s, eager": lambda label, kinds: figure(kinds, "step", images("eager_us")),
    "step img/s, CUDA graph": lambda label, kinds: figure(kinds, "step", images("graph_us")),
    "eval peak MiB": lambda label, kinds: figure(kinds, "eval", _memory("peak_memory_bytes", 2**20)),
    "train peak MiB": lambda label, kinds: figure(kinds, "train", _memory("peak_memory_bytes", 2**20)),
    "step GB": lambda label, kinds: figure(kinds, "step", _memory("total_memory_bytes", 1e9)),
    "batch 1, ms eager": lambda label, kinds: figure(kinds, "latency", milliseconds("eager_us")),
    "batch 1, ms CUDA graph": lambda label, kinds: figure(kinds, "latency", milliseconds("graph_us")),
    "launches": lambda label, kinds: _launches(kinds),
}


def lines(rows: Sequence[dict]) -> list[list[str]]:
    """The header and one line for each model, batch, image size and dtype.

    Columns without any figure are left out, but for those of calls that failed, as called.
    """
    models = grouped(rows)
    several = len({key[1:] for key in models}) > 1
    body = []
    for (label, batch, shape, dtype), kinds in models.items():
        name = f"{label} ({batch} x {shape}, {dtype})" if several else label
        body.append([name, *(cell(label, kinds) for cell in COLUMNS.values())])
    header = ["model", *COLUMNS]

    def wanted(i: int) -> bool:
        none = (UNMEASURED,) if "eager" in header[i] else (UNMEASURED, *FAILED)
        return any(line[i] not in none for line in body)

    shown = [i for i in range(len(header)) if wanted(i)]
    return [[line[i] for i in shown] for line in (header, *body)] if models else []


def text(rows: Sequence[dict]) -> str:
    """The table with aligned columns, and what this project's models are compared with."""
    body = lines(rows)
    if not body:
        return ""
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    shown = ["", "models"]
    for line in body:
        cells = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        shown.append("  ".join(cells).rstrip())
    further = any(accuracy.FURTHER in cell for line in body for cell in line)
    note = [f"top-1: as published, {accuracy.FURTHER} with images beyond ImageNet-1K"] if further else []
    return "\n".join([*shown, *note, "", *ratios(rows)]).rstrip()


def ratios(rows: Sequence[dict]) -> list[str]:
    """How many times faster this project's models are than the others of the run, a line a model and measurement."""
    found = []
    for row in rows:
        shown = [f"{number(p['ratio'])}x {name}" for name, p in row["peers"].items() if p["ratio"] is not None]
        if row["op"] == "model" and shown:
            found.append(f"{row['label']}, {row['pass']} (batch {row['batch']}, {row['dtype']}): " + ", ".join(shown))
    return found
