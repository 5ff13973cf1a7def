# SPDX-License-Identifier: Apache-2.0
"""The drawing of ``groupmamba demo``: one PNG with the scan paths, the groups' responses, their reach and the gates."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from groupmamba.demo.inspection import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BACKGROUND, TEXT, FAINT = "#10141b", "#e8ecf2", "#8b96a5"
COLOURS = ("#ffb84d", "#3fd0c0", "#ff6f91", "#74a9ff")
NAMES = {
    "lr": "rows, left to right",
    "rl": "rows, right to left",
    "tb": "columns, top to bottom",
    "bt": "columns, bottom to top",
}
LINES = 9  # rows or columns of the scan path that are drawn
NOTES_SIZE, NOTES_SPACING = 8.5, 1.5  # points, lines
DECADES = 5  # range of the gradient norms that is shown


def _path(direction: str, height: int, width: int) -> np.ndarray:
    """Ends of the drawn rows or columns in scan order, (2 * LINES, 2) points (x, y)."""
    across, along = (height, width) if direction in ("lr", "rl") else (width, height)
    positions = (np.arange(LINES) + 0.5) * across / LINES
    ends = np.tile([0.03 * along, 0.97 * along], LINES)
    points = np.stack([ends, positions.repeat(2)], 1)
    if direction in ("tb", "bt"):
        points = points[:, ::-1]
    return points[::-1] if direction in ("rl", "bt") else points


def _draw_path(axes: Axes, direction: str, height: int, width: int, colour: str) -> None:
    points = _path(direction, height, width)
    steps = len(points) - 1
    for i in range(steps):
        start, end = points[i], points[i + 1]
        fade = 0.35 + 0.65 * i / steps  # later parts of the path are brighter
        if i % 2:
            axes.add_collection(
                LineCollection([[start, end]], colors=colour, linewidths=0.7, linestyles=":", alpha=fade)
            )
            continue
        axes.annotate(
            "",
            xy=end,
            xytext=start,
            arrowprops={
                "arrowstyle": "-|>,head_length=0.45,head_width=0.22",
                "color": colour,
                "lw": 1.7,
                "alpha": fade,
            },
        )
    axes.plot(*points[0], "o", color=colour, markersize=7, markeredgecolor="white", markeredgewidth=1)
    axes.plot(*points[-1], "s", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=1)


def _notes_text(notes: list[str]) -> str:
    legend = [
        "Paths run from the circle to the square.",
        "Responses and output: their three main components as red, green and blue.",
        f"Reach: gradient of the marked token with respect to every input token, {DECADES} decades.",
    ]
    return "\n".join(textwrap.fill(line, 44) for line in (*legend, "", *notes))


def _notes_height(notes: list[str]) -> float:
    """In inches."""
    return (_notes_text(notes).count("\n") + 1) * NOTES_SIZE * 1.2 * NOTES_SPACING / 72


def _write_notes(axes: Axes, notes: list[str]) -> None:
    axes.set_axis_off()
    style: dict[str, Any] = {"fontsize": NOTES_SIZE, "va": "top", "linespacing": NOTES_SPACING}
    axes.text(0, 1, _notes_text(notes), color=FAINT, transform=axes.transAxes, **style)


def _reach_image(reach: np.ndarray, photo: np.ndarray, colour: str) -> np.ndarray:
    """The photograph in dim grey under the gradient norms, on a logarithmic scale of DECADES."""
    strength = np.clip(1 + np.log10(reach / (np.quantile(reach, 0.999) + 1e-30) + 1e-12) / DECADES, 0, 1) ** 1.5
    rows = np.linspace(0, reach.shape[0] - 1, photo.shape[0]).round().astype(int)
    columns = np.linspace(0, reach.shape[1] - 1, photo.shape[1]).round().astype(int)
    strength = strength[np.ix_(rows, columns)][..., None]
    grey = photo.mean(-1, keepdims=True)
    return np.clip(grey * 0.28 * (1 - strength) + np.array(to_rgb(colour)) * strength, 0, 1)


def _draw_gates(axes: Axes, gates: np.ndarray) -> None:
    groups, channels = gates.shape
    for g in range(groups):
        positions = np.arange(channels) + g * (channels + 1)
        colour = COLOURS[g % len(COLOURS)]
        axes.bar(positions, gates[g], width=0.82, color=colour)
        axes.text(positions.mean(), -0.08, f"group {g + 1}", color=colour, fontsize=9, ha="center", va="top")
    axes.axhline(0.5, color=FAINT, linewidth=0.8, linestyle=":")
    axes.set(xlim=(-1, groups * (channels + 1) - 1), ylim=(0, 1), yticks=[0, 0.5, 1], xticks=[], facecolor=BACKGROUND)
    axes.tick_params(colors=FAINT, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "left", color=FAINT)
    axes.set_title(
        f"channel affinity: how much of each of the {gates.size} channels passes, decided by the whole image",
        color=TEXT,
        fontsize=10,
        loc="left",
        pad=6,
    )


def draw(picture: Picture, out: Path) -> None:
    """Writes the PNG."""
    photo = picture.photo.numpy()
    rows, columns = photo.shape[:2]
    height, width = picture.reach.shape[:2]
    groups = len(picture.directions)

    # Sizes in inches. An image lies at its own aspect within a cell, whose height is bounded.
    cell, gap, header, footer, gates = 3.2, 0.36, 1.15, 0.45, 1.0
    image_height = min(cell * rows / columns, 1.5 * cell)
    notes_height = _notes_height(picture.notes)
    heights = [image_height, image_height, max(image_height, notes_height), gates]
    total_width = (cell + 0.1) * (groups + 1) + 0.7
    total_height = header + sum(heights) + 3 * gap + footer
    figure = Figure(figsize=(total_width, total_height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        4,
        groups + 1,
        height_ratios=heights,
        left=0.5 / total_width,
        right=1 - 0.2 / total_width,
        top=1 - header / total_height,
        bottom=footer / total_height,
        hspace=gap / (sum(heights) / len(heights)),
        wspace=0.1 / cell,
    )

    def headline(text: str, depth: float, **style: Any) -> None:
        figure.text(0.5 / total_width, 1 - depth / total_height, text, va="center", **style)

    headline("GroupMamba on a photograph", 0.36, color=TEXT, fontsize=19, fontweight="bold")
    headline(
        f"{'Four' if groups == 4 else groups} groups of channels, each scanned along its own path. The layer's weights "
        "are random: this shows how information moves, not what training finds.",
        0.72,
        color=FAINT,
        fontsize=10.5,
    )

    def image(row: int, column: int, pixels: np.ndarray, colour: str, title: str, **style: Any) -> Axes:
        axes = figure.add_subplot(grid[row, column])
        axes.imshow(pixels, aspect="auto", **style)
        axes.set_box_aspect(rows / columns)
        axes.set_anchor("N")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=1.4)
        axes.set_title(title, color=colour, fontsize=10, pad=5)
        return axes

    tokens: dict[str, Any] = {"interpolation": "bicubic"}
    image(0, 0, photo, TEXT, f"the photograph, {columns} x {rows} pixels")
    image(1, 0, picture.output.numpy(), TEXT, f"the layer's output, {width} x {height} tokens", **tokens)
    for g, direction in enumerate(picture.directions):
        colour = COLOURS[g % len(COLOURS)]
        dim: dict[str, Any] = {"extent": (0, columns, rows, 0)}
        axes = image(0, g + 1, photo * 0.42, colour, f"group {g + 1}: {NAMES[direction]}", **dim)
        _draw_path(axes, direction, rows, columns, colour)
        image(1, g + 1, picture.responses[:, :, g].numpy(), colour, f"response of group {g + 1}", **tokens)
        pixels = _reach_image(picture.reach[:, :, g].numpy(), photo, colour)
        axes = image(2, g + 1, pixels, colour, "what reaches the marked token", extent=(0, width, height, 0))
        y, x = picture.marked
        axes.plot(x + 0.5, y + 0.5, "+", color="white", markersize=11, markeredgewidth=1.8)
    _write_notes(figure.add_subplot(grid[2, 0]), picture.notes)
    _draw_gates(figure.add_subplot(grid[3, :]), picture.gates.numpy())
    figure.savefig(out, dpi=110, facecolor=BACKGROUND, format="png")
