#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Backbones with a feature pyramid at the sizes of detection and segmentation, and whole detectors and segmenters.

    python bench/dense.py                                     # three backbones, as called, compiled, with CUDA graphs
    python bench/dense.py --cases mask_rcnn upernet --no-compile

Every row of a case is timed in turn with the others, several rounds, and has the median. See bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from groupmamba import use_cuda_graphs  # noqa: E402
from groupmamba.training.card import made  # noqa: E402
from groupmamba.training.setup import amp_dtype  # noqa: E402
from groupmamba.vision import PyramidBackbone, mask_rcnn, upernet  # noqa: E402
from groupmamba_ext._command import CommandError, UsageError, is_out_of_memory, one_line  # noqa: E402
from suite import report  # noqa: E402
from suite.arguments import OneLineParser, positive, writable  # noqa: E402

MODELS = ("groupmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny")
DROP_PATH, CLASSES, OBJECTS = 0.2, 80, 10
Size = tuple[int, int]


CALLED, COMPILED, GRAPHS, BOTH = HOWS = ("as called", "compiled", "graphs", "compiled, graphs")


class Case(NamedTuple):
    """What is timed: a network on images of these sizes, one size after the other, with gradients or without."""

    title: str
    network: str  # fpn, mask_rcnn or upernet
    batch: int
    sizes: tuple[Size, ...]
    training: bool

    @property
    def varied(self) -> bool:
        """Whether there are several sizes."""
        return len(self.sizes) > 1


# mmdetection's multi-scale sizes, images of 4 : 3 and 16 : 9 in both orientations, padded to multiples of 32.
VARIED = ((480, 640), (544, 736), (608, 1088), (672, 896), (736, 1312), (800, 1088), (896, 672), (1088, 800))


def cases(batch: int, quick: bool) -> dict[str, Case]:
    """By the name that the command line gives."""
    large: tuple[Size, ...] = ((800, 1344),)
    square: tuple[Size, ...] = ((512, 512),)
    varied = VARIED
    if quick:
        large, square, varied = ((64, 96),), ((64, 64),), ((64, 96), (96, 64))
    found = {}
    for training in (True, False):
        what, name = ("training", "") if training else ("evaluation", "-eval")
        found[f"fpn-800{name}"] = Case(f"FPN, 800 x 1333, {what}", "fpn", batch, large, training)
        found[f"fpn-512{name}"] = Case(f"FPN, 512 x 512, {what}", "fpn", 4 * batch, square, training)
        found[f"fpn-varied{name}"] = Case(f"FPN, varied sizes, {what}", "fpn", batch, varied, training)
    found["mask_rcnn"] = Case("Mask R-CNN, 800 x 1333, training step", "mask_rcnn", batch, large, True)
    found["mask_rcnn-varied"] = Case("Mask R-CNN, varied sizes, training step", "mask_rcnn", batch, varied, True)
    found["upernet"] = Case("UPerNet, 512 x 512, training step", "upernet", 4 * batch, square, True)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="bench/dense.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"default: {' '.join(MODELS)}"
    )
    parser.add_argument("--cases", nargs="+", choices=tuple(cases(1, False)), metavar="CASE",
                        help=f"default: all of {' '.join(cases(1, False))}")  # fmt: skip
    parser.add_argument(
        "--batch-size", type=positive, default=4, help="images of detection (default: 4); of others 4 x"
    )
    parser.add_argument("--steps", type=positive, default=8, help="of each of the rounds, for each size (default: 8)")
    parser.add_argument("--rounds", type=positive, default=5, help="whose median counts (default: 5)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes of them")
    parser.add_argument("--quick", action="store_true", help="small images, one step: to try the program")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the results")
    parser.add_argument("--append", action="store_true", help="keep the runs that FILE already holds")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch_size, args.steps, args.rounds = 1, 1, 1
    return args


class Call:
    """One step of a network on images of one size after the other; weights get gradients and are not changed."""

    def __init__(self, model: str, case: Case, device: torch.device, how: str):
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.amp = amp_dtype(device, None, None)
        self.network = _network(model, case).to(device).to(memory_format=torch.channels_last).train(case.training)
        # The detector itself makes lists of boxes; what computes is the backbone.
        part = self.network.backbone if case.network == "mask_rcnn" else self.network
        if how in (COMPILED, BOTH):
            # For any size the pyramid's last level, which torchvision pools, would be compiled for odd and even maps.
            if case.varied:
                part = part.body
            part.forward = torch.compile(part.forward, dynamic=True if case.varied else None)
        if how in (GRAPHS, BOTH):
            use_cuda_graphs(part)
        self.inputs = [self._inputs(size) for size in case.sizes]

    def _inputs(self, size: Size) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(size[0])
        batch = self.case.batch
        if self.case.network != "mask_rcnn":
            images = torch.randn(batch, *size, 3, generator=generator).to(self.device).permute(0, 3, 1, 2)
            labels = torch.randint(0, CLASSES, (batch, *size), generator=generator).to(self.device)
            return (images, labels)
        width = min(size[1], 1333)
        images = [torch.rand(3, size[0], width, generator=generator).to(self.device) for _ in range(batch)]
        return images, [_objects(size[0], width, generator, self.device) for _ in range(batch)]

    def __call__(self, i: int) -> None:
        images, targets = self.inputs[i % len(self.inputs)]
        with (
            torch.set_grad_enabled(self.case.training),
            torch.autocast(self.device.type, self.amp, enabled=self.amp is not None),
        ):
            if self.case.network == "mask_rcnn":
                loss = torch.stack([value.float() for value in self.network(images, targets).values()]).sum()
            elif self.case.network == "upernet":
                loss = nn.functional.cross_entropy(self.network(images).float(), targets)
            else:
                loss = torch.stack([m.float().square().mean() for m in self.network(images).values()]).sum()
        if self.case.training:
            loss.backward()
            for parameter in self.network.parameters():
                parameter.grad = None
        self.loss = loss.detach()


def _network(model: str, case: Case) -> Any:
    options = {"drop_path_rate": DROP_PATH}

    def make() -> nn.Module:
        if case.network == "fpn":
            return PyramidBackbone(model, **options)
        if case.network == "upernet":
            return upernet(model, CLASSES, backbone_options=options)
        detector = mask_rcnn(model, CLASSES + 1, backbone_options=options)
        detector.transform._skip_resize = True  # images have their sizes
        return detector

    return made(model, make, option="--models")


def _objects(height: int, width: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """As many rectangles as COCO has objects in an image."""
    corner = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([0.6 * width, 0.6 * height])
    extent = (0.05 + 0.3 * torch.rand(OBJECTS, 2, generator=generator)) * torch.tensor([width, height])
    boxes = torch.cat([corner, corner + extent], 1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    labels = torch.randint(1, CLASSES + 1, (OBJECTS,), generator=generator)
    return {"boxes": boxes.to(device), "labels": labels.to(device), "masks": masks.to(device)}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def graphs() -> int:
    """How many graphs torch.compile has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure(case: Case, args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """Rows of one case: by model, and by `HOWS`."""
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out = {COMPILED, BOTH} if args.no_compile else set()
    if device.type != "cuda":
        left_out |= {GRAPHS, BOTH}
    for model in args.models:
        for how in (how for how in HOWS if how not in left_out):
            title = f"{model}, {how}"
            try:
                rows[title], calls[title] = _first_steps(model, case, device, how)
            except (CommandError, UsageError):
                raise
            except Exception as error:  # torch.compile raises exceptions of many kinds
                reason = "out of memory" if is_out_of_memory(error) else one_line(error)[:160]
                rows[title] = {"problem": f"{type(error).__name__}: {reason}"}
    steps = args.steps * len(case.sizes)
    found: dict[str, list[float]] = {title: [] for title in calls}
    before = graphs()
    for turn in range(args.rounds + 1):
        for title, call in calls.items():
            wait(device)
            began = time.perf_counter()
            for i in range(steps):
                call(i)
            wait(device)
            if turn or args.quick:  # the first warms up
                found[title].append(case.batch * steps / (time.perf_counter() - began))
    for title, values in found.items():
        rows[title].update(img_per_s=statistics.median(values), rounds=values)
        if not torch.isfinite(calls[title].loss):
            rows[title] = {"problem": "the loss is not finite"}
    if graphs() > before:  # of which of them torch does not say
        for title in calls:
            if title.endswith(COMPILED):
                rows[title]["compiled again"] = graphs() - before
    return rows


def _first_steps(model: str, case: Case, device: torch.device, how: str) -> tuple[dict[str, Any], Call]:
    """The call after every size was seen, on a GPU five times, and what memory that took: at its peak, and how much
    more the fifth time than the fourth, which is nothing where memory is flat. Graphs are recorded the third time."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    call = Call(model, case, device, how)
    reserved = []
    for _ in range(5 if device.type == "cuda" else 1):
        for i in range(len(case.sizes)):
            call(i)
        wait(device)
        reserved.append(torch.cuda.memory_reserved() if device.type == "cuda" else 0)
    row: dict[str, Any] = {}
    if device.type == "cuda":
        row["gigabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        row["reserved more"] = (reserved[4] - reserved[3]) / 1e9
    return row, call


def lines(case: Case, rows: dict[str, dict[str, Any]], models: list[str]) -> Iterator[str]:
    """A table of one case."""
    yield f"**{case.title}**, {case.batch} images"
    yield ""
    hows = [how for how in HOWS if any(f"{model}, {how}" in rows for model in models)]
    yield f"| img/s | {' | '.join(f'{how} | {models[0]} / it' for how in hows)} | GB |"
    yield f"|---|{2 * len(hows) * '---:|'}---:|"
    for model in models:
        cells = [f"`{model}`"]
        for how in hows:
            row, ours = rows.get(f"{model}, {how}", {}), rows.get(f"{models[0]}, {how}", {})
            speed = row.get("img_per_s")
            cells.append("-" if speed is None else f"{speed:,.1f}")
            cells.append(f"{ours['img_per_s'] / speed:.2f}" if speed and "img_per_s" in ours else "-")
        gigabytes = rows.get(f"{model}, {CALLED}", {}).get("gigabytes")
        yield "| " + " | ".join([*cells, "-" if gigabytes is None else f"{gigabytes:.1f}"]) + " |"
    yield ""
    for title, row in rows.items():
        if "problem" in row:
            yield f"{title}: {row['problem']}"
        if row.get("reserved more", 0) > 0.05:
            yield f"{title}: {row['reserved more']:.2f} GB more were reserved the fifth time round than the fourth"
        if "compiled again" in row:
            yield f"{title}: {row['compiled again']} graphs were compiled while it was timed"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    known = cases(args.batch_size, args.quick)
    results: dict[str, Any] = {}
    try:
        for name in args.cases or known:
            case = known[name]
            torch._dynamo.reset()
            results[name] = {**case._asdict(), "rows": measure(case, args, device)}
            print("\n".join(lines(case, results[name]["rows"], args.models)), flush=True)
            print(flush=True)
            if args.json is not None:
                _write(args, {**report.environment(device, "bench/dense.py"), "dense": results})
    except CommandError as error:
        print(f"bench/dense.py: {one_line(error)}", file=sys.stderr)
        return error.status
    ours = [row for case in results.values() for title, row in case["rows"].items() if title.startswith("groupmamba")]
    return int(any("problem" in row for row in ours))


def _write(args: argparse.Namespace, run: dict[str, Any]) -> None:
    """One run more in the file, or this one alone; written after every case."""
    if not hasattr(args, "earlier"):
        args.earlier = json.loads(args.json.read_text()) if args.append and args.json.exists() else []
    args.json.write_text(json.dumps([*args.earlier, run], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
