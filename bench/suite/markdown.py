# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown tables: all of them for the documentation, a short one of the models for the README."""

from __future__ import annotations

from collections.abc import Sequence

from suite import accuracy, model_table, verdict
from suite.model_entries import COMPILED, RELEASED
from suite.report import THROUGHPUT, key, number

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def latest(runs: Sequence[dict]) -> list[dict]:
    """The rows of all runs in order; of rows that appear in several, the last.

    Its peers of the earlier runs stay beside it: each ratio is of one run.
    """
    rows: dict[tuple, dict] = {}
    for run in runs:
        for row in run["rows"]:
            earlier = rows.get(key(row), {"peers": {}})
            rows[key(row)] = row | {"peers": earlier["peers"] | row["peers"]}
    return list(rows.values())


def require_one_tree(runs: Sequence[dict]) -> None:
    """Figures that stand in one table are from one tree, one kind of device and one torch.

    Raises:
        ValueError: these are not, or do not say.
    """
    if not runs:
        raise ValueError("holds no run")
    for name, found in (
        ("trees", {run["versions"].get("sources") for run in runs}),
        ("devices", {run["device"]["name"] for run in runs}),
        ("versions of torch", {run["versions"]["torch"] for run in runs}),
    ):
        if len(found) > 1 or None in found:
            raise ValueError(f"must hold runs that say one tree, device and torch; {name}: {sorted(map(str, found))}")


def settings(runs: Sequence[dict]) -> list[str]:
    """What the figures hold for: a line for each device, tree and day, with the copy bandwidths of its runs."""
    found: dict[str, list[float]] = {}
    for run in runs:
        versions, copy = run["versions"], run["copy"]
        tree = f", tree {versions['sources']}" if versions.get("sources") else ""
        setting = (
            f"{run['device']['name']}, torch {versions['torch']}, groupmamba {versions['groupmamba']}{tree}, "
            f"{run['date'][:10]}; a kernel copy of {copy['bytes'] >> 20} MiB: "
        )
        found.setdefault(setting, []).append(copy["gb_s"])
    lines = []
    for setting, speeds in found.items():
        low, high = f"{min(speeds):,.0f}", f"{max(speeds):,.0f}"
        lines.append(f"{setting}{low if low == high else f'{low} to {high}'} GB/s.  ")
    return lines


def tables(runs: Sequence[dict], ops: Sequence[str] | None = None, stages: bool = False) -> str:
    """One table for every op (of ``ops``, if given), label and series (``stages``: the stage shapes alone); a row that
    failed says so in place of figures, and why stands below the tables."""
    rows = [row for row in latest(runs) if ops is None or row["op"] in ops]
    rows = [row for row in rows if not stages or row["op"] == "model" or row["series"] == "stages"]
    blocks: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["op"] != "model":
            blocks.setdefault((row["op"], row["label"], row["series"]), []).append(row)
    lines = settings(runs)
    for (_, label, series), members in blocks.items():
        title = f"**{label}**" if series in ("stages", "states") else f"**{label}**, {series}"
        lines += ["", title, "", *_table(members)]
    lines += _models(rows)
    failed = [*verdict.failures(rows), *verdict.peer_failures(rows)]
    return "\n".join([*lines, *([""] if failed else []), *(f"- {line}" for line in failed)])


def _lines(body: Sequence[Sequence[str]]) -> list[str]:
    """The first line of ``body`` as head; names to the left, figures to the right."""
    rule = "|---|" + "---:|" * (len(body[0]) - 1)
    head, *rest = ("| " + " | ".join(line) + " |" for line in body)
    return [head, rule, *rest]


def _models(rows: Sequence[dict]) -> list[str]:
    body = model_table.lines(rows)
    if not body:
        return []
    found = [*model_table.ratios(rows), *_accuracies(rows)]
    side = next(row["shape"] for row in rows if row["op"] == "model").partition("x")[2].replace("x", " x ")
    return ["", f"**Models**, {side}", "", *_lines(body), *([""] if found else []), *(f"- {line}" for line in found)]


def _accuracies(rows: Sequence[dict]) -> list[str]:
    labels = [row["label"] for row in rows if row["op"] == "model"]
    names = [label.removesuffix(COMPILED).removeprefix(RELEASED) for label in labels]
    lines = accuracy.sources(names)
    if lines:
        lines[0] = f"Top-1 on ImageNet-1K as published, {accuracy.FURTHER} with further images. {lines[0]}"
    return lines


SHORT = (  # of the README, behind this project's own
    "hgnetv2_b4", "convnext_tiny", "caformer_s18", "hiera_small_224", "swin_tiny_patch4_window7_224",
    "deit3_small_patch16_224", "tiny_vit_11m_224", "vmamba_tiny_s1l8", "released/groupmamba_tiny",
)  # fmt: skip
SHORT_NAMES = {"released/groupmamba_tiny": "groupmamba_tiny, the authors' code"}
SHORT_HEAD = (
    "model", "top-1", "parameters", "evaluation img/s, graph", "step img/s, graph", "step img/s, as called",
    "one image, ms as called / graph",
)  # fmt: skip


def short(runs: Sequence[dict]) -> str:
    """The README's table: this project's models and their peers, each figure the better of compiled and not compiled.

    Raises:
        ValueError: there are no models of this project in it, or they are not from one tree.
    """
    require_one_tree(runs)
    rows = [row for row in latest(runs) if row["op"] == "model"]
    models = model_table.grouped(rows)
    batches = {key[1:] for key in models if key[0] == "groupmamba_tiny"}
    if not batches:
        raise ValueError("holds no row of groupmamba_tiny")
    place = max(batches)  # the largest batch
    names = [name for name in ("groupmamba_tiny", "groupmamba_small", "groupmamba_base", *SHORT)]
    body = [SHORT_HEAD]
    for name in names:
        plain = models.get((name, *place), {})
        compiled = models.get((name + COMPILED, *place), {})
        if plain or compiled:
            body.append(_short_line(name, plain, compiled))
    batch, shape, dtype = place
    side = shape.partition("x")[2].replace("x", " x ")
    lines = [*settings(runs), "", *_lines(body), ""]
    lines.append(
        f"Batch {batch}, {side}, {dtype}, random weights. A step is forward, cross-entropy, backward and fused AdamW. "
        "Each figure is the better of the model as it is and compiled (<sup>c</sup>: by `torch.compile`). Top-1 on "
        f"ImageNet-1K as published, {accuracy.FURTHER} with further images."
    )
    failed = [*verdict.failures(rows), *verdict.peer_failures(rows)]
    return "\n".join([*lines, *([""] if failed else []), *(f"- {line}" for line in failed)])


def _short_line(name: str, plain: model_table.Kinds, compiled: model_table.Kinds) -> list[str]:
    def best(kind: str, value, better) -> str:
        """The better figure, a failure where there is no other, a dash where nothing was measured."""
        found = [(value(k[kind]), mark) for k, mark in ((plain, ""), (compiled, "<sup>c</sup>")) if _good(k.get(kind))]
        found = [(figure, mark) for figure, mark in found if figure is not None]
        if found:
            figure, mark = better(found)
            return number(figure, 4 if kind != "latency" else 3) + mark
        return model_table.figure(plain if kind in plain else compiled, kind, value)

    images, milliseconds = model_table.images, model_table.milliseconds
    shown = SHORT_NAMES.get(name, name)
    own = any(verdict.own(row) for row in (plain or compiled).values())
    return [
        f"**{shown}**" if own else shown,
        accuracy.cell(name) or "-",
        model_table.parameters(plain or compiled),
        best("eval", images("graph_us"), max),
        best("step", images("graph_us"), max),
        best("step", images("eager_us"), max),
        f"{best('latency', milliseconds('eager_us'), min)} / {best('latency', milliseconds('graph_us'), min)}",
    ]


def _good(row: dict | None) -> bool:
    return row is not None and row["us"] is not None


def _mib(row: dict) -> str:
    memory = row["peak_memory_bytes"]
    return "" if memory is None else number(memory / 2**20)


def _over(row: dict, way: str) -> str:
    value = (row.get("over") or {}).get(way)
    return "" if value is None else f"{number(value)}x"


COLUMNS = {
    "us, CUDA graph": lambda row: "" if row["graph_us"] is None else number(row["graph_us"], 4),
    "us, eager": lambda row: number(row["eager_us"], 4),
    "% of copy": lambda row: number(row["percent_of_copy"]) if row["percent_of_copy"] else "",
    "img/s": lambda row: number(row["images_per_s"], 4) if row["op"] in THROUGHPUT else "",
    "ns a token": lambda row: number(row["ns_per_token"]) if row["series"] == "growth" else "",
    "peak MiB": _mib,
    "launches": lambda row: "" if row["launches"] is None else str(row["launches"]),
    "time over d_state=1, CUDA graph": lambda row: _over(row, "graph"),
    "time over d_state=1, eager": lambda row: _over(row, "eager"),
}


def _ratio(row: dict, name: str) -> str:
    peer = row["peers"].get(name)
    if peer is None:
        return ""
    if peer["ratio"] is None:
        return "RED" if peer.get("own") else "no ratio"
    return f"{number(peer['ratio'])}x" + (" (eager)" if peer["mode"] == "eager" else "")


def _table(rows: Sequence[dict]) -> list[str]:
    """Lines of one table; columns that nothing was measured for are left out."""
    peers = dict.fromkeys(name for row in rows for name in row["peers"])
    columns = dict(COLUMNS) | {f"vs {name}": lambda row, name=name: _ratio(row, name) for name in peers}
    good = [row for row in rows if row["us"] is not None]
    columns = {title: cell for title, cell in columns.items() if any(cell(row) for row in good)}
    columns = columns or {"result": lambda row: ""}
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
