#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and curves of docs/ablation.md from finished runs."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import scipy.stats

    from groupmamba_ext._command import run_command
except ImportError as problem:
    sys.exit(f"report.py: needs this project installed: pip install '.[ablation]' ({problem})")

from ablation.arms import ARMS, COMPARISONS, LARGE, PAPER, Comparison, Settings, arm_runs, large_runs  # noqa: E402
from ablation.results import FAILED_BELOW, failed, read_all  # noqa: E402
from pages import address, finish, replace_block, write_runs  # noqa: E402

BEGIN, END = "<!-- ablation:begin -->", "<!-- ablation:end -->"
EXPECTED = 92.0  # percent of the test images, of every run of an arm
LEVEL = 0.95
COLOURS = ("#8d99ae", "#00798c", "#edae49", "#d1495b")

Results = dict[str, dict[str, Any]]


class Found:
    """Finished runs, by what they are of."""

    def __init__(self, results: Results):
        self.results = results
        values = dict(next(iter(results.values()))["settings"])
        values["rates"] = tuple(values["rates"])
        self.settings = Settings(**values)

    def arm(self, name: str) -> dict[int, dict[str, Any]]:
        """The runs of an arm, by seed."""
        runs = (self.results.get(run.name) for run in arm_runs(self.settings, (name,)))
        return {run["seed"]: run for run in runs if run is not None}

    def large(self, rate: float, arm: str) -> dict[int, dict[str, Any]]:
        """The runs of the large model at one rate, by seed."""
        runs = (self.results.get(run.name) for run in large_runs(self.settings, rate) if run.arm.name == arm)
        return {run["seed"]: run for run in runs if run is not None}

    def missing(self) -> list[str]:
        """Names of runs that are not there; of the large model those up to the rate at which all seeds failed."""
        names = [run.name for run in arm_runs(self.settings) if run.name not in self.results]
        for rate in self.settings.rates:
            names += [run.name for run in large_runs(self.settings, rate) if run.name not in self.results]
            plain = self.large(rate, LARGE[0].name).values()
            if len(plain) == self.settings.seeds and all(map(failed, plain)):
                break
        return names


def difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> tuple[float, float, float] | None:
    """The mean difference of accuracies over the seeds that both have, and its interval; None for fewer than two."""
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        return None
    first, second = ([runs[seed]["accuracy"] for seed in seeds] for runs in (ours, theirs))
    mean = statistics.fmean(a - b for a, b in zip(first, second, strict=True))
    if len({a - b for a, b in zip(first, second, strict=True)}) == 1:
        return mean, mean, mean
    interval = scipy.stats.ttest_rel(first, second).confidence_interval(LEVEL)
    return mean, float(interval.low), float(interval.high)


def _spread(values: Sequence[float], digits: int = 2) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _speed(runs: Sequence[dict[str, Any]]) -> str:
    """Images a second in training; nothing for runs that shared their device."""
    if any(run["processes_on_device"] > 1 for run in runs):
        return "shared"
    text = f"{statistics.median(run['images_per_s'] for run in runs):,.0f}"
    return text if all(run["graph"] for run in runs) else f"{text}, no graph"


def comparison_table(found: Found, comparison: Comparison) -> Iterator[str]:
    """Lines of one table."""
    against = (
        "the row above" if comparison.reference is None else comparison.rows[comparison.reference].replace("`", "")
    )
    papers = comparison.name == "parts"
    head = ["", "test accuracy, %", f"difference to {against}, 95% interval", "parameters", "img/s, training"]
    yield f"**{comparison.title}**"
    yield ""
    yield "| " + " | ".join([*head, *(["the paper, ImageNet-1K, %"] if papers else [])]) + " |"
    yield "|---" + "|---:" * (len(head) - 1 + papers) + "|"
    above: str | None = None
    for name, title in comparison.rows.items():
        runs, other = found.arm(name), comparison.reference or above
        cells = [title, *["not measured"] * 4]
        if runs:
            values = list(runs.values())
            cells[1] = _spread([run["accuracy"] for run in values])
            step = None if other in (None, name) else difference(runs, found.arm(other))
            cells[2] = "" if other in (None, name) else "not measured"
            if step is not None:
                cells[2] = f"{step[0]:+.2f} ({step[1]:+.2f} to {step[2]:+.2f})"
            cells[3] = f"{values[0]['parameters'] / 1e6:.2f} M"
            cells[4] = _speed(values)
        yield "| " + " | ".join([*cells, *([f"{PAPER[name]:.2f}"] if papers else [])]) + " |"
        above = name
    yield ""


def verdict(found: Found) -> Iterator[str]:
    """Whether the order of the means is the paper's, and which steps the intervals tell from none."""
    means = {name: [run["accuracy"] for run in found.arm(name).values()] for name in PAPER}
    if not all(means.values()):
        return
    ours, theirs = (
        sorted(PAPER, key=value.__getitem__) for value in ({n: statistics.fmean(v) for n, v in means.items()}, PAPER)
    )
    agree = "as in the paper" if ours == theirs else f"the paper's is {_order(theirs)}"
    names = list(PAPER)
    steps = [difference(found.arm(b), found.arm(a)) for a, b in zip(names, names[1:], strict=False)]
    known = [step for step in steps if step is not None]
    clear = sum(step[1] > 0 or step[2] < 0 for step in known)
    yield f"From the lowest mean to the highest: {_order(ours)}; {agree}."
    yield f"Intervals that leave out zero: {clear} of {len(known)}."
    yield ""


def _order(names: Sequence[str]) -> str:
    return ", ".join(ARMS[name].title for name in names)


def large_table(found: Found) -> Iterator[str]:
    """Lines of the table of failures at rising rates."""
    settings = found.settings
    yield f"**`{settings.large}`, variant `paper`, at rising learning rates: failures**"
    yield ""
    yield "| highest rate | " + " | ".join(f"{arm.title} | their accuracies, %" for arm in LARGE) + " |"
    yield "|---:" * (1 + 2 * len(LARGE)) + "|"
    for rate in settings.rates:
        cells = [f"{rate:g}"]
        for arm in LARGE:
            runs = found.large(rate, arm.name)
            lost = sum(map(failed, runs.values()))
            cells.append(f"{lost} of {len(runs)}" if runs else "not run")
            cells.append(", ".join(_end(run) for _, run in sorted(runs.items())))
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield (
        f"{settings.large_steps} steps of {settings.batch} images. A run fails where a loss is not finite, or where it "
        f"ends below {FAILED_BELOW:.0f}% test accuracy."
    )
    yield ""


def _end(run: dict[str, Any]) -> str:
    at = run["not_finite_at"]
    return f"{run['accuracy']:.1f}" if at is None else f"not finite at step {at}"


def block(found: Found, picture: str | None = None, listing: str | None = None) -> str:
    """All between the markers.

    Args:
        found: the runs.
        picture, listing: addresses of the curves and of the file of all runs, seen from the page.
    """
    settings, runs = found.settings, list(found.results.values())
    lines = [", ".join(_machines(runs)) + (f" ([all runs]({listing}))." if listing else "."), ""]
    lines.append(
        f"{settings.epochs} epochs, {settings.batch} images a step, highest rate {settings.lr:g}, {settings.seeds} "
        f"seeds; mean ± standard deviation over the seeds."
    )
    if (teacher := found.results.get("teacher")) is not None:
        size = teacher["parameters"] / 1e6
        lines.append(f"The teacher, {settings.teacher} ({size:.1f} M parameters), has {teacher['accuracy']:.2f}%.")
    lines.append("")
    for comparison in COMPARISONS:
        lines += comparison_table(found, comparison)
        if comparison.name == "parts":
            lines += verdict(found)
    lines += large_table(found)
    low = [name for name in ARMS for run in found.arm(name).values() if run["accuracy"] < EXPECTED]
    if picture:
        lines += [f"![Test accuracy by epoch, and where the large model ends at each rate]({picture})", ""]
    if low:
        lines += [f"Below {EXPECTED:.0f}%: {', '.join(dict.fromkeys(low))}.", ""]
    if missing := found.missing():
        lines += [f"Missing, of all runs: {', '.join(missing)}.", ""]
    return "\n".join(lines).rstrip()


def _machines(runs: Sequence[dict[str, Any]]) -> list[str]:
    devices = sorted({run["device"] for run in runs})
    versions = {f"{name} {version}" for run in runs for name, version in run["versions"].items()}
    dates = sorted({run["date"][:10] for run in runs})
    return [*devices, *sorted(versions), " to ".join(dict.fromkeys((dates[0], dates[-1])))]


def draw(found: Found, file: Path) -> None:
    """Writes the curves as a PNG: test accuracy by epoch of the paper's steps, and where the large model ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for name, colour in zip(PAPER, COLOURS, strict=True):
        runs = list(found.arm(name).values())
        if not runs:
            continue
        epochs = range(1, 1 + min(len(run["history"]) for run in runs))
        points = [[run["history"][epoch - 1]["accuracy"] for run in runs] for epoch in epochs]
        left.plot(epochs, [statistics.fmean(values) for values in points], color=colour, label=ARMS[name].title)
        left.fill_between(epochs, [*map(min, points)], [*map(max, points)], color=colour, alpha=0.2, lw=0)
    left.set(xlabel="epoch", ylabel="test accuracy, %", title=f"{found.settings.model}: mean and range of the seeds")
    left.xaxis.get_major_locator().set_params(integer=True)
    for arm, colour, marker in zip(LARGE, (COLOURS[1], COLOURS[3]), "ox", strict=True):
        ends = [
            (rate, run["accuracy"]) for rate in found.settings.rates for run in found.large(rate, arm.name).values()
        ]
        if ends:
            right.scatter(*zip(*ends, strict=True), color=colour, marker=marker, label=arm.title, alpha=0.8)
    right.axhline(FAILED_BELOW, color="#8d99ae", ls="--", lw=1)
    right.set(xscale="log", xlabel="highest learning rate", ylabel="test accuracy at the end, %", ylim=(0, 100))
    right.set_title(f"{found.settings.large}, variant paper: below the line is failure")
    for axes in (left, right):
        finish(axes)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="folders of run.py, or files of --json")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the markers of this page")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="draw the curves as a PNG (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs into one file")
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
    results = read_all(args.runs)
    found = Found(results)

    text = block(found, address(args.curves, args.page), address(args.json, args.page))
    if args.json is not None:
        write_runs(results.values(), args.json)
    if args.curves is not None:
        draw(found, args.curves)
    if args.page is not None:
        args.page.write_text(replace_block(args.page.read_text(), text, BEGIN, END))
    if args.page is None and args.json is None:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
