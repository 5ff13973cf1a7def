#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Writes the table and curves of docs/stamps.md from finished runs, and pictures of what a run finds."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import torch

    from groupmamba_ext._command import CommandError, run_command
except ImportError as problem:
    sys.exit(f"report.py: needs this project installed: pip install '.[train]' ({problem})")

from pages import address, finish, replace_block, write_runs  # noqa: E402
from stamps.runs import BACKBONES, TASKS, read_results  # noqa: E402

BEGIN, END = "<!-- stamps:begin -->", "<!-- stamps:end -->"
TITLES = {"detector": "mask mAP, %", "segmenter": "mean IoU, %"}
TIMES = 3  # what the end must be of the run's first tenth, in average precision
COLOURS = dict(zip(BACKBONES, ("#d1495b", "#00798c", "#edae49"), strict=True))

Results = Sequence[dict[str, Any]]


def chosen(results: Results, task: str, backbone: str) -> list[dict[str, Any]]:
    """The runs of one task and backbone, by seed."""
    return sorted(
        (one for one in results if (one["task"], one["backbone"]) == (task, backbone)), key=lambda r: r["seed"]
    )


def first_tenth(run: dict[str, Any]) -> float:
    """The figure at the first validation that is not before a tenth of the run."""
    steps = run["settings"]["steps"]
    return next(value for step, value in run["history"] if step >= steps / 10)


def _spread(values: Sequence[float], digits: int = 1) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(results: Results, task: str) -> Iterator[str]:
    """Lines of one task's table, and what follows from it."""
    yield f"| {TITLES[task]} | at a tenth of the run | at its end | end / tenth | img/s, training |"
    yield "|---|---:|---:|---:|---:|"
    ends: dict[str, list[float]] = {}
    tenths: dict[str, list[float]] = {}
    for backbone in BACKBONES:
        runs = chosen(results, task, backbone)
        if not runs:
            continue
        ends[backbone] = [run["history"][-1][1] for run in runs]
        tenths[backbone] = [first_tenth(run) for run in runs]
        low = statistics.fmean(tenths[backbone])
        ratio = f"{statistics.fmean(ends[backbone]) / low:.1f}" if low > 0 else "from zero"
        speed = "shared" if any(run["shared"] for run in runs) else f"{_spread([r['images_per_s'] for r in runs], 0)}"
        cells = [f"`{backbone}`", _spread(tenths[backbone]), _spread(ends[backbone]), ratio, speed]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    ours, swin = BACKBONES[:2]
    if ours in ends:
        enough = all(end > 0 and end >= TIMES * low for end, low in zip(ends[ours], tenths[ours], strict=True))
        yield f"At least {TIMES} times the first tenth's, each seed: {'yes' if enough else 'no'}."
    if ours in ends and len(ends.get(swin, [])) > 1:
        bound = statistics.fmean(ends[swin]) - statistics.stdev(ends[swin])
        reached = statistics.fmean(ends[ours]) >= bound
        yield f"No less than Swin-T's mean less one standard deviation, {bound:.1f}: {'yes' if reached else 'no'}."
    yield ""


def block(results: Results, picture: str | None = None, listing: str | None = None) -> str:
    """All between the markers; addresses as they are seen from the page."""
    devices = sorted({run["device"] for run in results})
    facts = [*devices, *sorted({f"torch {run['torch']}" for run in results}), *sorted({run["date"] for run in results})]
    settings = results[0]["settings"]
    lines = [", ".join(facts) + (f" ([all runs]({listing}))." if listing else "."), ""]
    seeds = len({run["seed"] for run in results})
    lines.append(
        f"{settings['steps']} steps of {settings['batch']} images of {settings['size']} pixels, {seeds} seeds; mean ± "
        f"standard deviation over the seeds."
    )
    lines.append("")
    for task in TASKS:
        if any(run["task"] == task for run in results):
            lines += table(results, task)
    if picture:
        lines += [f"![Mask mAP and mean IoU by step]({picture})", ""]
    return "\n".join(lines).rstrip()


def draw_curves(results: Results, file: Path) -> None:
    """Writes the curves as a PNG: each task's figure by step, mean and range of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained", facecolor="white")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for backbone in BACKBONES:
            runs = chosen(results, task, backbone)
            if not runs:
                continue
            points = list(zip(*(run["history"] for run in runs), strict=False))
            steps = [point[0][0] for point in points]
            values = [[value for _, value in point] for point in points]
            axes.plot(steps, [statistics.fmean(v) for v in values], color=COLOURS[backbone], label=backbone)
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=COLOURS[backbone], alpha=0.2, lw=0)
        axes.set(xlabel="step", ylabel=TITLES[task], ylim=(0, None))
        finish(axes)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def draw_pairs(weights: Path, data: Path, count: int, file: Path) -> None:
    """Writes a PNG of validation scenes: the image, the truth, and what the run's weights find.

    Raises:
        CommandError: the weights or the scenes can't be read.
    """
    from matplotlib.figure import Figure

    from groupmamba.training.card import find_weights, model_of
    from groupmamba.training.dense import task_arguments
    from groupmamba.training.distributed import Processes
    from groupmamba.training.output import Screen
    from groupmamba.training.setup import amp_dtype
    from groupmamba.training.task import task_of

    model, card = model_of(find_weights(str(weights)))
    kind = task_of(card.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task: Any = kind(task_arguments(kind, card, {"data": str(data)}), Processes(), device, Screen(True))
    task.card = card
    source = task.read_validation(card)
    model.to(device).to(memory_format=torch.channels_last)
    count = min(count, len(source))
    figure = Figure(figsize=(9, 3 * count), layout="constrained")
    for row, axes in enumerate(figure.subplots(count, 3, squeeze=False)):
        image, target = source.load(row * len(source) // count)
        image = image.as_subclass(torch.Tensor)
        found, _ = task.drawn(model, image.to(device), amp_dtype(device, None, None), None)
        pictures = {"image": image, "truth": task.drawn_truth(image, target), "found": found}
        for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
            axis.imshow(picture.permute(1, 2, 0).cpu().numpy())
            axis.set(xticks=[], yticks=[], frame_on=False)
            if row == 0:
                axis.set_title(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="folders of run.py, or files of --json")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the markers of this page")
    parser.add_argument("--curves", type=Path, metavar="PNG", help="draw the curves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs into one file")
    parser.add_argument("--scenes", type=Path, nargs=2, metavar=("DATA", "PNG"),
                        help="draw scenes, the truth and what the one run RUNS finds; not to be published")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    args = parse(argv)
    return run_command("report.py", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    """Writes what was asked for, or prints the tables.

    Raises:
        CommandError: the runs can't be read, or the page has no markers.
    """
    if args.scenes is not None:
        if len(args.runs) != 1:
            raise CommandError(f"--scenes is of one run, got {len(args.runs)}")
        draw_pairs(args.runs[0], args.scenes[0], 6, args.scenes[1])
        return 0
    results = read_results(args.runs)

    text = block(results, address(args.curves, args.page), address(args.json, args.page))
    if args.json is not None:
        write_runs(results, args.json)
    if args.curves is not None:
        draw_curves(results, args.curves)
    if args.page is not None:
        args.page.write_text(replace_block(args.page.read_text(), text, BEGIN, END))
    if args.page is None and args.json is None:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
