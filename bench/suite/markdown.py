# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown tables for the README: the latest figure of every row, and the runs that they are from."""

from __future__ import annotations

from collections.abc import Sequence

from suite import model_table
from suite.report import THROUGHPUT, key, number

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def latest(runs: Sequence[dict]) -> list[dict]:
    """The rows of all runs in order; of rows that appear in several, the last."""
    rows: dict[tuple, dict] = {}
    for run in runs:
        rows |= {key(row): row for row in run["rows"]}
    return list(rows.values())


def tables(runs: Sequence[dict], ops: Sequence[str] | None = None, stages: bool = False) -> str:
    """One table for every op (of ``ops``, if given), label and series (``stages``: the stage shapes alone); a red row
    says so in place of figures."""
    blocks: dict[tuple, list[dict]] = {}
    for row in latest(runs):
        if row["op"] == "model" or (ops is not None and row["op"] not in ops):
            continue
        if stages and row["series"] != "stages":
            continue
        blocks.setdefault((row["op"], row["label"], row["series"]), []).append(row)
    settings: dict[str, list[float]] = {}
    for run in runs:
        versions, copy = run["versions"], run["copy"]
        setting = (
            f"{run['device']['name']}, torch {versions['torch']}, groupmamba {versions['groupmamba']}, "
            f"{run['date'][:10]}; a kernel copy of {copy['bytes'] >> 20} MiB: "
        )
        settings.setdefault(setting, []).append(copy["gb_s"])
    speeds = {setting: dict.fromkeys(f"{speed:,.0f}" for speed in sorted(found)) for setting, found in settings.items()}
    lines = [f"{setting}{' and '.join(found)} GB/s.  " for setting, found in speeds.items()]
    for (_, label, series), rows in blocks.items():
        lines += ["", f"**{label}**" + ("" if series == "stages" else f", {series}"), "", *_table(rows)]
    if ops is None or "model" in ops:
        lines += _models(latest(runs))
    return "\n".join(lines)


def _models(rows: Sequence[dict]) -> list[str]:
    body = model_table.lines(rows)
    if not body:
        return []
    rule = "|---|" + "---:|" * (len(body[0]) - 1)
    head, *rest = ("| " + " | ".join(line) + " |" for line in body)
    return ["", "**Models**, 224 x 224", "", head, rule, *rest, "", *(f"- {line}" for line in model_table.ratios(rows))]


def _mib(row: dict) -> str:
    memory = row["peak_memory_bytes"]
    return "" if memory is None else number(memory / 2**20)


COLUMNS = {
    "us, CUDA graph": lambda row: "" if row["graph_us"] is None else number(row["graph_us"], 4),
    "us, eager": lambda row: number(row["eager_us"], 4),
    "% of copy": lambda row: number(row["percent_of_copy"]) if row["percent_of_copy"] else "",
    "img/s": lambda row: number(row["images_per_s"], 4) if row["op"] in THROUGHPUT else "",
    "ns a token": lambda row: number(row["ns_per_token"]) if row["series"] == "growth" else "",
    "peak MiB": _mib,
    "launches": lambda row: "" if row["launches"] is None else str(row["launches"]),
}


def _ratio(row: dict, name: str) -> str:
    peer = row["peers"].get(name)
    if peer is None or peer["ratio"] is None:
        return "RED" if peer is not None and peer["red"] else ""
    return f"{number(peer['ratio'])}x" + (" (eager)" if peer["mode"] == "eager" else "")


def _table(rows: Sequence[dict]) -> list[str]:
    """Lines of one table; columns that nothing was measured for are left out."""
    peers = dict.fromkeys(name for row in rows for name in row["peers"])
    columns = dict(COLUMNS) | {f"vs {name}": lambda row, name=name: _ratio(row, name) for name in peers}
    good = [row for row in rows if row["us"] is not None]
    columns = {title: cell for title, cell in columns.items() if any(cell(row) for row in good)}
    lines = ["| " + " | ".join(["shape", "batch", "dtype", "pass", *columns]) + " |"]
    lines.append("|" + "---|" * 4 + "---:|" * len(columns))
    for row in rows:
        storage = ", token-major" if row["storage"] == "token-major" else ""
        cells = [row["shape"] + storage, str(row["batch"]), row["dtype"], row["pass"]]
        if row["us"] is None:
            cells += ["RED", *[""] * (len(columns) - 1)]
        else:
            cells += [cell(row) for cell in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def replace_block(text: str, block: str) -> str:
    """``text`` with ``block`` between the two markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"
