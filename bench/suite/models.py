# SPDX-License-Identifier: Apache-2.0
"""Whole models: images a second in evaluation and training, memory, and the latency of one image, beside other models.

Evaluation and training run under autocast, channels-last, eagerly or compiled; training is forward and backward,
without an optimizer. Every figure is given as called from Python and as replayed from a CUDA graph, which is the GPU's
own time. Weights are random.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import groupmamba_ext as ext
from groupmamba import convert_released_state_dict
from suite import checkouts, measure
from suite.checks import PEER_SLACK, Check, compare
from suite.problem import Case, Shape, as_tuple
from suite.runner import blank_row
from suite.timing import Timer

OURS = ("groupmamba_tiny", "groupmamba_small", "groupmamba_base")
VARIED = {  # the tiny model: the paper's ablation, and training as its recipes do
    "groupmamba_tiny, 4-D scanning": {"scan": "cross", "affinity": False},
    "groupmamba_tiny, no CAM": {"affinity": False},
    "groupmamba_tiny, drop path 0.2": {"drop_path_rate": 0.2},
}
TIMM = ("swin_tiny_patch4_window7_224", "convnext_tiny", "caformer_s18", "hiera_small_224")
VMAMBA = "vmamba_tiny_s1l8"
COMPILED = ", compiled"
RELEASED = "released/"
CHECK_SIDE = 64  # of the two images whose logits are compared with float64
KINDS = ("eval", "train", "latency")


@dataclass(frozen=True)
class Entry:
    """A model of the comparison; ``source`` is ours, timm, released or vmamba."""

    label: str
    source: str
    build: Callable[[], nn.Module]
    compiled: bool = False


def require() -> None:
    """Raises:
    ValueError: this version has no models.
    """
    if importlib.util.find_spec("groupmamba.models") is None:
        raise ValueError(f"'model' needs groupmamba.models, which groupmamba {ext.__version__} does not have")


def _ours(label: str) -> nn.Module:
    from groupmamba import models

    return getattr(models, label.split(",")[0])(**VARIED.get(label, {}))


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def entries(peers: Sequence[str], released: Path | None, vmamba: Path | None) -> list[Entry]:
    """This project's models and those of the peers asked for; compiled, too, with ``compile`` among them."""
    found = [Entry(name, "ours", lambda name=name: _ours(name)) for name in OURS]
    varied = [Entry(name, "ours", lambda name=name: _ours(name)) for name in VARIED]
    if "timm" in peers:
        found += [Entry(name, "timm", lambda name=name: _timm(name)) for name in TIMM]
    if "compile" in peers:
        found += [replace(entry, label=entry.label + COMPILED, compiled=True) for entry in list(found)]
    found += varied
    if "released" in peers:
        for name in OURS:
            build = lambda name=name: getattr(checkouts.load("released", released, "groupmamba"), name)()  # noqa: E731
            found.append(Entry(RELEASED + name, "released", build))
    if "vmamba" in peers:
        build = lambda: getattr(checkouts.load("vmamba", vmamba, "vmamba"), VMAMBA)()  # noqa: E731
        found.append(Entry(VMAMBA, "vmamba", build))
    return found


def _autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def images(batch: int, side: int, device: torch.device) -> Tensor:
    """Random images, channels-last, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(batch, side, side, 3, device=device).normal_(generator=generator)
    return x.permute(0, 3, 1, 2)


@torch.no_grad()
def check(name: str, device: torch.device, dtype: torch.dtype, other: nn.Module | None = None) -> Check:
    """Logits of two small images against the model in float64 through the reference.

    Args:
        name: one of :data:`OURS` or :data:`VARIED`, checked under autocast to ``dtype``.
        other: a released model to be checked in its place, in float32: its weights go into the model of that name.
    """
    torch.manual_seed(0)
    model = _ours(name).eval()
    if other is not None:
        model.load_state_dict(convert_released_state_dict(other.state_dict()))
    model = model.to(device)
    x = images(2, CHECK_SIDE, device)
    dtype = dtype if other is None else torch.float32
    with _autocast(device, dtype):
        got = model(x) if other is None else other.eval()(x)
        with ext.backend("reference"):
            own = model(x)
    with ext.backend("reference"):
        truth = model.double()(x.double())
    slack = 1.0 if other is None else PEER_SLACK
    return compare({"logits": got.float()}, {"logits": truth}, {"logits": own.float()}, dtype, slack)


def _call(model: nn.Module, x: Tensor, kind: str, dtype: torch.dtype) -> Callable[[int], object]:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def forward(i: int):
        with torch.no_grad(), _autocast(x.device, dtype):
            return model(x)

    def train(i: int):
        with _autocast(x.device, dtype):
            outputs = as_tuple(model(x))
        loss = sum(y.float().mean() for y in outputs)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return train if kind == "train" else forward


class ModelRunner:
    """Runs models on one device.

    Args:
        timer: of that device.
        side: of the images.
        progress: called with what is done next.
    """

    def __init__(self, timer: Timer, side: int, progress: Callable[[str], None]):
        self.timer, self.device, self.side, self.progress = timer, timer.device, side, progress
        self.red = False

    def rows(self, entry: Entry, batch: int, dtype: torch.dtype, kinds: Sequence[str]) -> Iterator[dict]:
        """One row a measurement (``eval``, ``train``, ``latency``); where one fails, with the reason for figures."""
        try:
            self.progress(f"{entry.label}: check")
            found = self._check(entry, dtype)
            wrong = None if found is None or found.passed else str(found)
            self.red |= wrong is not None
            torch.manual_seed(0)
            model = entry.build().to(self.device, memory_format=torch.channels_last)
        except Exception as error:
            if entry.source == "ours":
                raise
            # A peer's import or code may raise anything: the reason belongs in the report.
            found, wrong = None, f"{type(error).__name__}: {error}".splitlines()[0]
        for kind in kinds:
            case = self._case(entry, 1 if kind == "latency" else batch, dtype)
            if wrong is not None:
                yield blank_row(case, kind, error=wrong, check=None if found is None else found.json())
                continue
            self.progress(f"{entry.label}: {kind}")
            yield self._row(entry, case, kind, model, None if found is None else found.json())
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _case(self, entry: Entry, batch: int, dtype: torch.dtype) -> Case:
        shape = Shape(batch, 3, self.side, self.side)
        return Case("model", entry.label, shape, dtype, "channels_last", prepare=None, series=entry.source)

    def _check(self, entry: Entry, dtype: torch.dtype) -> Check | None:
        """The logits of this project's models and of the released; other models stand for themselves."""
        if entry.source == "ours":
            return check(entry.label.removesuffix(COMPILED), self.device, dtype)
        if entry.source == "released":
            other = entry.build().to(self.device)
            return check(entry.label.removeprefix(RELEASED), self.device, dtype, other)
        return None

    def _row(self, entry: Entry, case: Case, kind: str, model: nn.Module, found: dict | None) -> dict:
        row = blank_row(case, kind, check=found)
        model.train(kind == "train")
        if entry.compiled:
            torch._dynamo.reset()
        x = images(case.shape.batch, self.side, self.device)
        function = torch.compile(model) if entry.compiled else model
        try:
            call = _call(function, x, kind, case.dtype)
            times = self.timer(call, 1)
            memory = measure.peak_memory(call, self.device)
            launched = measure.kernels(call, self.device)
        except Exception as error:
            self.red |= entry.source == "ours"
            return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        return row | {
            "us": times.us,
            "graph_us": times.graph_us,
            "eager_us": times.eager_us,
            "graph_error": times.graph_error,
            "images_per_s": case.shape.batch * 1e6 / times.us,
            "peak_memory_bytes": memory,
            "launches": None if launched is None else sum(launched.values()),
        }


def compare_rows(rows: Sequence[dict]) -> None:
    """Gives this project's tiny model all others as peers, and every size the released model of that size."""
    found = [row for row in rows if row["op"] == "model"]
    for row in found:
        if row["series"] != "ours" or row["us"] is None:
            continue
        name = row["label"].removesuffix(COMPILED)
        for other in found:
            same = all(row[k] == other[k] for k in ("pass", "batch", "dtype", "shape"))
            wanted = other["label"] == RELEASED + name
            if name == OURS[0]:
                wanted |= other["series"] in ("timm", "vmamba") or other["label"] in VARIED
            if not (same and wanted):
                continue
            graphs = row["graph_us"] is not None and other["graph_us"] is not None
            which = "graph_us" if graphs else "eager_us"
            row["peers"][other["label"]] = {
                "ratio": None if other["us"] is None else other[which] / row[which],
                "mode": "graph" if graphs else "eager",
                "graph_us": other["graph_us"],
                "eager_us": other["eager_us"],
                "red": other["check"] is not None and not other["check"]["passed"],
                "error": other["error"],
            }
