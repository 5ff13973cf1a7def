# SPDX-License-Identifier: Apache-2.0
"""Whole models: images a second in evaluation and training, memory, and the latency of one image, beside other models.

They run under autocast, channels-last, eagerly or compiled (`torch.compile` in its default mode, static shapes).
Training is forward, cross-entropy and backward; a step is that with fused AdamW. Every figure is given as called from
Python and as replayed from a CUDA graph, which is the GPU's own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import groupmamba_ext as ext
from groupmamba import convert_released_state_dict
from suite import measure, model_entries
from suite.checks import PEER_SLACK, Check, compare
from suite.model_calls import CALLS, KINDS, TRAINS, ModelCall, autocast, images, labels_of, loss_of
from suite.model_entries import COMPILED, OURS, RELEASED, VARIED, VMAMBA, Entry
from suite.problem import Case, Shape
from suite.runner import blank_row
from suite.timing import Timer
from suite.verdict import PEER_ERRORS, DeviceLost, reason, require_device

__all__ = ["KINDS", "ModelRunner", "check", "check_compiled", "compare_rows"]
CHECK_SIDE = 64  # of the two images whose logits and gradients are compared with float64
COMPARED_IMAGES = 8  # of a compiled model's batch


def _logits(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad(), autocast(x.device, dtype):
        return model.eval()(x)


def _gradient(function: Callable, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of all parameters in one vector.

    Raises:
        ValueError: one of them gets none.
    """
    model.train()
    with autocast(x.device, dtype):
        loss = loss_of(function(x), labels_of(x))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    without = [name for name, g in zip(parameters, gradients, strict=True) if g is None]
    if without:
        raise ValueError(f"{len(without)} parameters get no gradient, {without[0]!r} first")
    return torch.cat([g.flatten() for g in gradients])


def check(name: str, device: torch.device, dtype: torch.dtype, other: nn.Module | None = None) -> Check:
    """Logits and the gradient of two small images against the model in float64 through the reference.

    Args:
        name: of this project's models, checked under autocast to ``dtype``.
        other: a released model to be checked in its place, its logits in float32: its weights go into the model of that
            name.
    """
    torch.manual_seed(0)
    model = model_entries.ours(name, drop_path_rate=0.0)  # random depths would be others in every call
    if other is not None:
        model.load_state_dict(convert_released_state_dict(other.state_dict()))
    model = model.to(device)
    x = images(2, CHECK_SIDE, device)
    exact = torch.float32  # no autocast
    if other is not None:
        got, own = {"logits": _logits(other, x, exact)}, {}
        with ext.backend("reference"):
            own["logits"] = _logits(model, x, exact)
            truth = {"logits": _logits(model.double(), x.double(), exact)}
        return compare(got, truth, own, exact, PEER_SLACK)
    # Logits first: training moves the running statistics.
    got, own, truth = {"logits": _logits(model, x, dtype).float()}, {}, {}
    with ext.backend("reference"):
        own["logits"] = _logits(model, x, dtype).float()
        truth["logits"] = _logits(model.double(), x.double(), exact)
    model.float()
    got["gradient"] = _gradient(model, model, x, dtype)
    with ext.backend("reference"):
        own["gradient"] = _gradient(model, model, x, dtype)
        model.double()
        truth["gradient"] = _gradient(model, model, x.double(), exact)
    return compare(got, truth, own, dtype)


def check_compiled(call: ModelCall, model: nn.Module, kind: str) -> Check:
    """A compiled model's logits, or its gradient, against the same model called without compilation, in float32.

    Its own error sets the tolerance: that of the model under autocast, not compiled.
    """
    x, dtype, exact = call.x, call.dtype, torch.float32
    alike = dtype == exact  # then nothing but the order of sums is different, and there is no error of its own
    if kind in TRAINS:
        functions = (call.function, dtype), (model, exact), (model, dtype)
        got, truth, own = ({"gradient": _gradient(f, model, x, d)} for f, d in functions)
    else:
        got = {"logits": call(0)[:COMPARED_IMAGES].float()}
        truth, own = ({"logits": _logits(model, x[:COMPARED_IMAGES], d).float()} for d in (exact, dtype))
    return compare(got, truth, own, dtype, PEER_SLACK if alike else 1.0, worst=not alike)


def _comparable(entry: Entry, kind: str) -> bool:
    """Whether :func:`check_compiled` is made: all logits, gradients of this project's models without random depths."""
    return kind not in TRAINS or (entry.source == "ours" and "drop_path_rate" not in VARIED.get(entry.name, {}))


class ModelRunner:
    """Runs models on one device.

    Args:
        timer: of that device.
        side: of the images.
        progress: called with what is done next.
    """

    def __init__(self, timer: Timer, side: int, progress: Callable[[str], None]):
        self.timer, self.device, self.side, self.progress = timer, timer.device, side, progress
        self._checked: dict[tuple, Check] = {}

    def rows(self, entry: Entry, batch: int, dtype: torch.dtype, kinds: Sequence[str]) -> Iterator[dict]:
        """One row a measurement, of :data:`KINDS`; where one fails, with the reason for figures.

        Raises:
            DeviceLost: a peer left the device unusable.
        """
        waiting = list(kinds)
        try:
            for row in self._measured(entry, batch, dtype, kinds):
                waiting.remove(row["pass"])
                yield row
        except PEER_ERRORS as error:
            ours = entry.source == "ours"
            if isinstance(error, DeviceLost) or not waiting or (ours and not isinstance(error, Exception)):
                raise
            text = reason(error, place=ours)
            yield from (blank_row(self._case(entry, kind, batch, dtype), kind, error=text) for kind in waiting)
            if not ours:
                require_device(self.device, entry.label)
        finally:
            if entry.compiled:
                torch._dynamo.reset()
            measure.release(self.device)

    def _measured(self, entry: Entry, batch: int, dtype: torch.dtype, kinds: Sequence[str]) -> Iterator[dict]:
        self.progress(f"{entry.label}: check")
        found = self._check(entry, dtype)
        result = None if found is None else found.json()
        if found is not None and not found.passed:
            text = str(found) if entry.source == "ours" else f"imprecise: {found}"
            for kind in kinds:
                yield blank_row(self._case(entry, kind, batch, dtype), kind, error=text, check=result)
            return
        measure.release(self.device)
        before = measure.allocated(self.device)
        torch.manual_seed(0)
        model = entry.build().to(self.device, memory_format=torch.channels_last)
        function = torch.compile(model, dynamic=False) if entry.compiled else model
        for kind in kinds:
            self.progress(f"{entry.label}: {kind}")
            case = self._case(entry, kind, batch, dtype)
            row = blank_row(case, kind, check=result)
            try:
                row |= self._figures(entry, function, model, case, kind, before)
            except PEER_ERRORS as error:  # the other measurements may still be had
                if entry.source == "ours" and not isinstance(error, Exception):
                    raise
                row["error"] = reason(error, place=entry.source == "ours")
                if entry.source != "ours":
                    require_device(self.device, entry.label)
            yield row
            measure.release(self.device)

    def _case(self, entry: Entry, kind: str, batch: int, dtype: torch.dtype) -> Case:
        shape = Shape(1 if kind == "latency" else batch, 3, self.side, self.side)
        return Case("model", entry.label, shape, dtype, "channels_last", prepare=None, series=entry.source)

    def _check(self, entry: Entry, dtype: torch.dtype) -> Check | None:
        """This project's models and the released; of other models there is no second implementation here."""
        if entry.source not in ("ours", "released"):
            return None
        if (entry.name, dtype) not in self._checked:
            other = entry.build().to(self.device) if entry.source == "released" else None
            self._checked[entry.name, dtype] = check(entry.name.removeprefix(RELEASED), self.device, dtype, other)
        return self._checked[entry.name, dtype]

    def _figures(
        self, entry: Entry, function: Callable, model: nn.Module, case: Case, kind: str, before: int | None
    ) -> dict:
        model.train(kind in TRAINS)
        call = CALLS[kind](function, model, images(case.shape.batch, self.side, self.device), case.dtype)
        if entry.compiled and _comparable(entry, kind):
            self.progress(f"{entry.label}: {kind}, compiling")
            found = check_compiled(call, model, kind)
            if not found.passed:
                text = str(found) if entry.source == "ours" else f"imprecise: {found}"
                return {"error": f"compiled, {text}", "check": found.json()}
            model.train(kind in TRAINS)
            self.progress(f"{entry.label}: {kind}")
        times = self.timer(call, 1)
        fault = call.fault()
        if fault is not None:
            return {"error": fault}
        start = measure.allocated(self.device)
        memory = measure.peak_memory(call, self.device)
        launched = measure.kernels(call, self.device)
        return {
            "us": times.us,
            "graph_us": times.graph_us,
            "eager_us": times.eager_us,
            "graph_error": times.graph_error,
            "images_per_s": case.shape.batch * 1e6 / times.us,
            "peak_memory_bytes": memory,
            "total_memory_bytes": None if memory is None else start - before + memory,
            "launches": None if launched is None else sum(launched.values()),
            "parameters": sum(p.numel() for p in model.parameters()),
        }


def compare_rows(rows: Sequence[dict]) -> None:
    """Gives this project's tiny model all others as peers, and every size the released and VMamba's of that size."""
    found = [row for row in rows if row["op"] == "model"]
    for row in found:
        if row["series"] != "ours" or row["us"] is None:
            continue
        name = row["label"].removesuffix(COMPILED)
        for other in found:
            same = all(row[k] == other[k] for k in ("pass", "batch", "dtype", "shape"))
            wanted = other["label"] == RELEASED + name or VMAMBA.get(other["label"]) == name
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
                "own": other["series"] == "ours",
                "error": other["error"],
            }
