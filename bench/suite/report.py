# SPDX-License-Identifier: Apache-2.0
"""Rows of results as tables and as JSON, and their geometric means."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import groupmamba
import groupmamba_ext as ext

SCHEMA = 1
UNMEASURED = "-"
THROUGHPUT = ("layer", "ffn", "ablation")  # ops whose table has images a second


def environment(device: torch.device, script: str = "bench/run.py") -> dict:
    """The device, versions and date that a run's figures hold for, and its command line."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        detail = {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    else:
        name = _cpu_name()
        detail = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    return {
        "device": {"type": device.type, "name": name, **detail},
        "versions": {
            "groupmamba": ext.__version__,
            "sources": sources(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(script, sys.argv[1:]),
    }


def sources() -> str:
    """Twelve digits that name this tree: a hash of the imported packages, and of the kernels and benchmarks here."""
    root = Path(__file__).resolve().parents[2]
    files = [(Path(p.__file__).parent, "*.py") for p in (ext, groupmamba)]
    files += [(root / "csrc", "*.[ch]*"), (root / "bench", "*.py")]
    found = hashlib.sha256()
    for folder, pattern in files:
        for path in sorted(folder.rglob(pattern)):
            found.update(f"{folder.name}/{path.relative_to(folder).as_posix()}".encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _command(script: str, arguments: Sequence[str]) -> str:
    """The command line as a shell takes it; of absolute paths the last part, which says nothing of the machine."""
    names = [Path(a).name if a.startswith("/") else a for a in arguments]
    return shlex.join([script, *names])


def _cpu_name() -> str:
    """The model as Linux states it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def key(row: dict) -> tuple:
    """What identifies a row in a file of several runs."""
    return tuple(row[k] for k in ("op", "label", "shape", "batch", "dtype", "storage", "pass", "series"))


def means(rows: Sequence[dict]) -> list[dict]:
    """For each op, label, storage, dtype and pass: the mean over the stages of the share of the copy and of ratios.

    Rows that failed take no part; ``of`` says how many rows there are with them.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["op"] != "model" and row["series"] == "stages":
            fields = ("op", "label", "series", "storage", "dtype", "pass")
            groups.setdefault(tuple((f, row[f]) for f in fields), []).append(row)
    out = []
    for fields, everyone in groups.items():
        members = [row for row in everyone if row["us"] is not None]
        names = {name for row in members for name in row["peers"]}
        ratios = {}
        for name in sorted(names):
            found = [r["peers"][name]["ratio"] for r in members if r["peers"].get(name, {}).get("ratio") is not None]
            if found:
                ratios[name] = geometric_mean(found)
        shares = [row["percent_of_copy"] for row in members if row["percent_of_copy"] is not None]
        counts = {"rows": len(members), "of": len(everyone)}
        out.append({**dict(fields), **counts, "percent_of_copy": geometric_mean(shares), "ratios": ratios})
    return out


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant figures without an exponent; a dash for None."""
    if value is None:
        return UNMEASURED
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def cells(row: dict, peers: Sequence[str]) -> list[str]:
    """One line of the table: figures, or what is red."""
    start = [row["shape"], str(row["batch"]), row["dtype"], row["storage"], row["pass"]]
    if row["us"] is None:
        return [*start, f"RED  {row['error']}"]
    memory = None if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 2**20
    figures = [
        number(row["graph_us"], 4),
        number(row["eager_us"], 4),
        number(row["bytes"] / 1e6),
        number(row["gb_s"], 4),
        number(row["percent_of_copy"]),
        number(row["ns_per_token"] if row["series"] == "growth" else None),
        number(row["images_per_s"] if row["op"] in THROUGHPUT else None, 4),
        number(memory),
        UNMEASURED if row["launches"] is None else str(row["launches"]),
        *(number((row["over"] or {}).get(way)) for way in ("graph", "eager")),
    ]
    return [*start, *figures, *(ratio_cell(row["peers"].get(name)) for name in peers)]


def ratio_cell(peer: dict | None) -> str:
    """How many times longer the peer takes; ``e``: eager against eager; of a row of this project RED if that failed."""
    if peer is None:
        return UNMEASURED
    if peer["error"] is not None:
        return "RED" if peer.get("own") else "no ratio"
    return f"{number(peer['ratio'])}x{'e' if peer['mode'] == 'eager' else ''}"


KEYS = ("shape", "batch", "dtype", "storage", "pass")
FIGURES = (
    "graph us", "eager us", "MB", "GB/s", "% copy", "ns/token", "img/s", "peak MiB", "launches",
    "over d_state=1, graph", "over d_state=1, eager",
)  # fmt: skip


def aligned(body: Sequence[Sequence[str]], columns: Sequence[int]) -> list[str]:
    """Lines of equal columns: names to the left, figures to the right; what is red follows its names."""
    full = [line for line in body if len(line) == len(body[0])]
    names = range(len(KEYS))
    widths = {i: max(len(line[i]) for line in (body if i in names else full)) for i in columns}
    lines = []
    for line in body:
        cells = [line[i].ljust(widths[i]) if i in names else line[i].rjust(widths[i]) for i in columns if i < len(line)]
        if len(line) != len(body[0]):
            cells = [line[i].ljust(widths[i]) for i in names] + [line[-1]]
        lines.append("  ".join(cells).rstrip())
    return lines


def table(rows: Sequence[dict]) -> str:
    """Text with aligned columns, one block for each op, label and series; whole models have a table of their own."""
    lines: list[str] = []
    blocks: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["op"] != "model":
            blocks.setdefault((row["op"], row["label"], row["series"]), []).append(row)
    for (op, label, series), members in blocks.items():
        shown = list(dict.fromkeys(name for row in members for name in row["peers"]))
        header = [*KEYS, *FIGURES, *(f"vs {name}" for name in shown)]
        body = [cells(row, shown) for row in members]
        full = [line for line in body if len(line) == len(header)]
        # A column that nothing was measured for (graphs, memory and launches on the CPU) is left out.
        columns = [i for i in range(len(header)) if i < len(KEYS) or any(line[i] != UNMEASURED for line in full)]
        lines += ["", f"{op}: {label}, {series}", *aligned([header, *body], columns)]
        lines += growth(members)
        for mean in means(members):
            ratios = ", ".join(f"{number(value)}x {name}" for name, value in mean["ratios"].items())
            share = f"{number(mean['percent_of_copy'])}% of the copy" if mean["percent_of_copy"] else ""
            text = ", ".join(filter(None, (share, ratios)))
            part = "" if mean["rows"] == mean["of"] else f" ({mean['rows']} of {mean['of']} rows)"
            lines.append(f"geometric mean, {mean['dtype']}, {mean['storage']}, {mean['pass']}{part}: {text or 'none'}")
    return "\n".join(lines)


def growth(rows: Sequence[dict]) -> list[str]:
    """How much time and memory a token changes over a series of growing images, largest over smallest."""
    found = []
    for kind in dict.fromkeys(row["pass"] for row in rows if row["series"] == "growth"):
        chosen = [row for row in rows if row["pass"] == kind and row["us"] is not None]
        if len(chosen) < 2:
            continue
        spans = {"time": [row["ns_per_token"] for row in chosen]}
        if all(row["peak_memory_bytes"] for row in chosen):
            spans["memory"] = [
                row["peak_memory_bytes"] / (row["batch"] * row["height"] * row["width"]) for row in chosen
            ]
        text = ", ".join(f"{name} {max(values) / min(values):.2f}x" for name, values in spans.items())
        found.append(f"a token, largest over smallest of {len(chosen)} sizes, {kind}: {text}")
    return found


def head(run: dict) -> str:
    """The device, versions and, where it was measured, copy bandwidth of a run."""
    first = f"{run['device']['name']}, torch {run['versions']['torch']}, {run['date']}"
    copy = run.get("copy")
    if copy is None:
        return first
    return (
        f"{first}\ncopy of {copy['bytes'] >> 20} MiB by {copy['call']}: {copy['gb_s']:,.0f} GB/s "
        f"(Tensor.copy_: {copy['tensor_copy_gb_s']:,.0f} GB/s)"
    )


def write_json(path: Path, runs: Sequence[dict]) -> None:
    """Writes a file of runs; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"schema": SCHEMA, "runs": runs}, indent=1) + "\n")
    draft.replace(path)


def read_json(path: Path) -> list[dict]:
    """The runs of a file that :func:`write_json` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a result of bench/run.py with schema {SCHEMA}")
    return found["runs"]
