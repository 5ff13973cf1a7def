# SPDX-License-Identifier: Apache-2.0
"""The paper's ablation on one layer's code: 4-D scanning, one direction a group, and that with channel affinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from suite.layer_cases import LAYER_PASSES, layer_problem
from suite.problem import Case
from suite.shapes import stage_shapes

CROSS, GROUPED, AFFINITY = "4-D scanning", "grouped", "grouped + CAM"
OPTIONS = {
    CROSS: {"scan": "cross", "affinity": False},
    GROUPED: {"affinity": False},
    AFFINITY: {},
}
BASELINES = {GROUPED: CROSS, AFFINITY: GROUPED}  # the row that each one's ratio is to


def ablation_cases(
    device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Sequence[int] | None
) -> Iterator[Case]:
    """The three variants side by side at every stage."""
    for dtype in dtypes:
        for shape in stage_shapes(device, quick, batches):
            for label in OPTIONS:
                prepare = partial(layer_problem, shape, dtype, OPTIONS[label])
                yield Case("ablation", label, shape, dtype, "channels_last", prepare, LAYER_PASSES)


def compare(rows: Sequence[dict]) -> None:
    """Gives each row its baseline as a peer, of this project's own: how many times longer the baseline takes."""

    def place(row: dict) -> tuple:
        return tuple(row[k] for k in ("shape", "batch", "dtype", "pass"))

    found = {(row["label"], place(row)): row for row in rows if row["op"] == "ablation"}
    for (label, where), row in found.items():
        other = found.get((BASELINES.get(label), where))
        if other is None or row["us"] is None:
            continue
        failed = other["us"] is None
        graphs = row["graph_us"] is not None and other["graph_us"] is not None
        which = "graph_us" if graphs else "eager_us"
        row["peers"][other["label"]] = {
            "ratio": None if failed else other[which] / row[which],
            "mode": "graph" if graphs else "eager",
            "graph_us": other["graph_us"],
            "eager_us": other["eager_us"],
            "own": True,
            "error": other["error"],
        }
