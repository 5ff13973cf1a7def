# SPDX-License-Identifier: Apache-2.0
"""The table of whole models: one line a model, whatever was measured of it beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from suite.report import UNMEASURED, number

HEADER = (
    "model",
    "eval img/s, eager",
    "eval img/s, CUDA graph",
    "train img/s, eager",
    "train img/s, CUDA graph",
    "eval peak MiB",
    "train peak MiB",
    "batch 1, ms eager",
    "batch 1, ms CUDA graph",
    "launches",
)


def lines(rows: Sequence[dict]) -> list[list[str]]:
    """The header and one line for each model, batch, image size and dtype; RED where its logits are wrong."""
    models: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["op"] == "model":
            models.setdefault((row["label"], row["shape"], row["dtype"]), {})[row["pass"]] = row
    return [list(HEADER), *(_line(label, kinds) for (label, _, _), kinds in models.items())] if models else []


def _line(label: str, kinds: dict[str, dict]) -> list[str]:
    def cell(kind: str, key: str, scale: float = 1.0) -> str:
        row = kinds.get(kind)
        if row is None:
            return UNMEASURED
        if row["us"] is None:
            return "RED" if row["check"] is not None and not row["check"]["passed"] else "failed"
        return number(None if row[key] is None else row[key] * scale, 4)

    def images(kind: str, key: str) -> str:
        row = kinds.get(kind)
        if row is None or row["us"] is None:
            return cell(kind, key)
        return number(None if row[key] is None else row["batch"] * 1e6 / row[key], 4)

    return [
        label,
        images("eval", "eager_us"),
        images("eval", "graph_us"),
        images("train", "eager_us"),
        images("train", "graph_us"),
        cell("eval", "peak_memory_bytes", 2**-20),
        cell("train", "peak_memory_bytes", 2**-20),
        cell("latency", "eager_us", 1e-3),
        cell("latency", "graph_us", 1e-3),
        cell("latency", "launches").removesuffix(".0"),
    ]


def text(rows: Sequence[dict]) -> str:
    """The table with aligned columns, what this project's models are compared with, and why figures are missing."""
    body = lines(rows)
    widths = [max(len(line[i]) for line in body) for i in range(len(HEADER))]
    shown = ["", "models"]
    for line in body:
        cells = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        shown.append("  ".join(cells).rstrip())
    return "\n".join([*shown, "", *ratios(rows), *failures(rows)])


def ratios(rows: Sequence[dict]) -> list[str]:
    """How many times faster this project's models are than the others of the run, a line a model and measurement."""
    found = []
    for row in rows:
        shown = [f"{number(p['ratio'])}x {name}" for name, p in row["peers"].items() if p["ratio"] is not None]
        if row["op"] == "model" and shown:
            found.append(f"{row['label']}, {row['pass']} (batch {row['batch']}): " + ", ".join(shown))
    return found


def failures(rows: Sequence[dict]) -> list[str]:
    """Why a model has no figures, each reason once."""
    return list(dict.fromkeys(f"{r['label']}: {r['error']}" for r in rows if r["op"] == "model" and r["error"]))
