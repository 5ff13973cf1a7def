# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: a roofline, and how near each case comes to a copy of the bytes it has to move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

INK, MUTED, GRID = "#22223b", "#8d99ae", "#e6e8ee"
COLOURS = {
    "scan": "#d1495b",
    "cross": "#edae49",
    "conv": "#00798c",
    "norm": "#66a182",
    "layer": "#2e4057",
    "ffn": "#8c5e2a",
    "ablation": "#9c89b8",
}
MARKERS = {"forward": "o", "backward": "s", "forward+backward": "D"}
MAX_BARS = 28


def require_matplotlib() -> None:
    """Raises:
    ModuleNotFoundError: matplotlib is missing; the message names the extra that has it.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("needs matplotlib: pip install 'groupmamba[bench]'") from None


def draw(run: dict, path: Path) -> None:
    """Writes the picture of ``run`` as a PNG.

    Args:
        run: one run of a result file.
        path: where to.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in run["rows"] if row["us"] is not None and row["op"] in COLOURS]
    figure = Figure(figsize=(13, 7), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    label = _roofline(left, run, rows)
    _shares(right, rows)
    versions = f"groupmamba {run['versions']['groupmamba']}, torch {run['versions']['torch']}, {run['date'][:10]}"
    figure.suptitle(f"{run['device']['name']}", fontsize=15, fontweight="bold", color=INK, x=0.01, ha="left")
    figure.text(0.99, 0.985, versions, ha="right", va="top", color=MUTED, fontsize=9)
    figure.draw_without_rendering()  # settles the layout, which the angle of the slope depends on
    label.set_rotation(_angle(left))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _roofline(axes, run: dict, rows: Sequence[dict]):
    """Achieved arithmetic over intensity, below the two roofs that the same run measured; peers hang on their case.

    Returns the label that lies along the slope.
    """
    bandwidth = run["copy"]["gb_s"] * 1e9
    roofs = {name: tflops * 1e12 for name, tflops in run["gemm_tflops"].items()}
    points = [(row["flops"] / row["bytes"], row["flops"] / row["us"] * 1e6, row) for row in rows if row["flops"]]
    low = min((x for x, _, _ in points), default=0.5) / 3
    high = max([2 * max(roofs.values()) / bandwidth, *(2 * x for x, _, _ in points)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    ridge = max(roofs.values()) / bandwidth
    axes.plot([low, ridge], [low * bandwidth, ridge * bandwidth], color=INK, lw=2)
    label = axes.annotate(
        f"copy, {bandwidth / 1e9:,.0f} GB/s",
        (low * 1.15, low * 1.15 * bandwidth),
        xytext=(0, 7),
        textcoords="offset points",
        rotation_mode="anchor",
        color=INK,
        fontsize=9,
    )
    for name, roof in roofs.items():
        axes.plot([roof / bandwidth, high], [roof, roof], color=INK, lw=2)
        axes.annotate(
            f"matrix product, {name}, {roof / 1e12:,.3g} TFLOP/s",
            (high, roof),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=9,
        )
    for x, y, row in points:
        colour = COLOURS[row["op"]]
        theirs = [row["flops"] / row["us"] * 1e6 / p["ratio"] for p in row["peers"].values() if p["ratio"]]
        if theirs:
            axes.plot([x] * (len(theirs) + 1), [y, *theirs], color=colour, lw=0.8, alpha=0.35, zorder=2)
            axes.scatter([x] * len(theirs), theirs, s=16, facecolor="white", edgecolor=MUTED, lw=0.8, zorder=3)
        size = 30 + 0.4 * row["height"] if row["height"] <= 256 else 130
        axes.scatter(x, y, s=size, marker=MARKERS[row["pass"]], color=colour, edgecolor="white", lw=0.7, zorder=4)
    axes.set_xlabel("arithmetic intensity: FLOP a byte that has to move", color=INK)
    axes.set_ylabel("FLOP/s", color=INK)
    axes.set_title("Roofline", loc="left", color=INK)
    axes.grid(color=GRID, which="major")
    axes.set_axisbelow(True)
    _limits(axes, (low, high), low * bandwidth, 3 * max(roofs.values()), points)
    _legend(axes, rows)
    return label


def _limits(axes, span: tuple[float, float], bottom: float, top: float, points: Sequence[tuple]) -> None:
    """Room for both roofs, all points and all peers."""
    slowest = [y / max([1.0, *(p["ratio"] for p in row["peers"].values() if p["ratio"])]) for _, y, row in points]
    axes.set_xlim(*span)
    axes.set_ylim(min([bottom, *slowest]) / 2, top)


def _angle(axes) -> float:
    """The angle in degrees at which a line of slope 1 is seen."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    rise, run = axes.bbox.height / math.log(top / bottom), axes.bbox.width / math.log(right / left)
    return math.degrees(math.atan2(rise, run))


def _legend(axes, rows: Sequence[dict]) -> None:
    from matplotlib.lines import Line2D

    def dot(marker: str, colour: str, label: str, **options) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, label=label, **options)

    ops = dict.fromkeys(row["op"] for row in rows)
    passes = dict.fromkeys(row["pass"] for row in rows)
    handles = [dot("o", COLOURS[op], op) for op in ops] + [dot(MARKERS[p], MUTED, p) for p in passes]
    if any(row["peers"] for row in rows):
        handles.append(dot("o", MUTED, "a peer, same tensors", markerfacecolor="white"))
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9, labelcolor=INK)


def _shares(axes, rows: Sequence[dict]) -> None:
    """One bar a case: the time of a copy of as many bytes over the time taken."""
    chosen = [row for row in rows if row["op"] not in ("layer", "ffn", "ablation")] or list(rows)
    chosen = [row for row in chosen if row["pass"] != "forward+backward"][:MAX_BARS]
    names = []
    for place, row in enumerate(chosen):
        share = row["percent_of_copy"]
        alpha = 1.0 if row["pass"] == "forward" else 0.6
        axes.barh(place, 100, color=GRID, height=0.72)
        axes.barh(place, share, color=COLOURS[row["op"]], alpha=alpha, height=0.72)
        axes.text(share + 1, place, f"{share:.0f}%", va="center", fontsize=8, color=INK)
        storage = ", token-major" if row["storage"] == "token-major" else ""
        what = row["label"] if row["op"] == "norm" else row["op"]
        names.append(f"{what} {row['shape']} x {row['batch']}{storage}, {row['pass']}")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max([110, *(row["percent_of_copy"] + 10 for row in chosen)]))
    axes.set_xlabel("% of the speed of a copy of the same bytes", color=INK)
    axes.set_title("How near to a copy", loc="left", color=INK)
