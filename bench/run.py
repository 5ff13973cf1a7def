#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops, the layer and the models: right first, then fast. See bench/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import torch

    import groupmamba  # noqa: F401
except ImportError as problem:
    sys.exit(f"bench/run.py: needs this project installed: pip install '.[bench]' ({problem})")

from suite import (  # noqa: E402
    ablation,
    layer_cases,
    measure,
    model_entries,
    model_table,
    models,
    op_cases,
    peers,
    plot,
    report,
    verdict,
)
from suite.arguments import OneLineParser, positive, writable  # noqa: E402
from suite.problem import PASSES  # noqa: E402
from suite.progress import Bar  # noqa: E402
from suite.runner import Runner, on_stream  # noqa: E402
from suite.timing import Timer  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CASES = {
    "scan": op_cases.scan_cases,
    "cross": op_cases.cross_cases,
    "conv": op_cases.conv_cases,
    "norm": op_cases.norm_cases,
    "layer": layer_cases.layer_cases,
    "ffn": layer_cases.feed_forward_cases,
    "ablation": ablation.ablation_cases,
}
OPS = (*CASES, "model")
SIDE, CPU_QUICK_SIDE = 224, 64  # of the images of whole models
INTERRUPTED = 130  # the exit status that shells give a process after Ctrl-C


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process with status 2 and one line that names the argument where it is wrong."""
    parser = OneLineParser(prog="bench/run.py", description=__doc__)
    every = {"nargs": "+", "action": "extend", "metavar": "NAME"}
    parser.add_argument("--op", choices=OPS, help=f"of {', '.join(OPS)} (default: scan layer)", **every)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of {', '.join(DTYPES)} (bfloat16, cpu: float32)", **every)
    parser.add_argument("--batch", type=positive, nargs="+", metavar="N", help="of the stage shapes (128, cpu: 1)")
    parser.add_argument("--pass", dest="passes", choices=PASSES, help=f"of {', '.join(PASSES)} (default: all)", **every)
    parser.add_argument("--peers", choices=(*peers.NAMES, "none"), help=f"of {', '.join(peers.NAMES)}, none", **every)
    parser.add_argument("--released", type=Path, metavar="PATH", help="a checkout of the released GroupMamba, built")
    parser.add_argument("--vmamba", type=Path, metavar="PATH", help="a checkout of VMamba, built")
    parser.add_argument(
        "--models", metavar="NAME", nargs="+", action="extend", help="with --op model: these only, or any model of timm"
    )
    parser.add_argument(
        "--kinds", choices=models.KINDS, help=f"with --op model: of {', '.join(models.KINDS)} (default: all)", **every
    )
    parser.add_argument("--quick", action="store_true", help="the stage shapes alone, fewer repetitions")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=writable, metavar="FILE", help="draw the roofline as a PNG (needs matplotlib)")
    parser.add_argument("--append", action="store_true", help="keep the runs that the file of --json already holds")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda' needs a CUDA device, and torch sees none")
    if args.plot is not None:
        try:
            plot.require_matplotlib()
        except ModuleNotFoundError as error:
            parser.error(f"argument --plot: {error}")
    if args.append and args.json is None:
        parser.error("argument --append: needs --json FILE to append to")
    args.op = list(dict.fromkeys(args.op or ("scan", "layer")))
    args.dtype = list(dict.fromkeys(args.dtype or (("bfloat16",) if args.device == "cuda" else ("float32",))))
    args.batch = args.batch and list(dict.fromkeys(args.batch))
    args.passes = args.passes or list(PASSES)
    if "model" not in args.op:
        for name in ("models", "kinds"):
            if getattr(args, name) is not None:
                parser.error(f"argument --{name}: needs --op model")
    args.kinds = [kind for kind in models.KINDS if kind in (args.kinds or models.KINDS)]
    if args.peers is None:
        args.peers = peers.default_names(args.released, args.vmamba)
    args.peers = [] if "none" in args.peers else list(dict.fromkeys(args.peers))
    args.cases, args.entries = [], []
    try:
        peers.require(args.peers, args.released, args.vmamba)
        args.cases = chosen_cases(args)
        if "model" in args.op:
            args.entries = chosen_models(args)
    except ValueError as error:
        parser.error(str(error))
    if args.append and args.json.exists():
        try:
            report.read_json(args.json)
        except ValueError as error:
            parser.error(f"argument --json: {error}")
    return args


def chosen_cases(args: argparse.Namespace) -> list:
    """The cases of the ops asked for.

    Raises:
        ValueError: an op cannot run here, or has none of the passes asked for.
    """
    found = []
    dtypes = [DTYPES[name] for name in args.dtype]
    for op in args.op:
        if op == "model":
            continue
        try:
            cases = list(CASES[op](args.device, dtypes, args.quick, args.batch))
        except ValueError as error:
            raise ValueError(f"argument --op: {error}") from None
        for case in cases:
            if not set(case.passes) & set(args.passes):
                raise ValueError(f"argument --pass: {op!r} has none of {args.passes}, only {list(case.passes)}")
        found += cases
    return found


def chosen_models(args: argparse.Namespace) -> list[model_entries.Entry]:
    """The models asked for.

    Raises:
        ValueError: there is no model of a name in ``args.models``, or models cannot run here.
    """
    try:
        model_entries.require()
    except ValueError as error:
        raise ValueError(f"argument --op: {error}") from None
    found = model_entries.entries(args.peers, args.released, args.vmamba)
    if args.models is None:
        return found
    try:
        return model_entries.chosen(args.models, found, args.peers)
    except ValueError as error:
        raise ValueError(f"argument --models: {error}") from None


def model_batches(args: argparse.Namespace) -> dict[int, list[str]]:
    """The batches of whole models, and what is measured at each: the latency of one image only once."""
    batches = dict.fromkeys(args.batch or [128 if args.device == "cuda" else 1])
    others = [kind for kind in args.kinds if kind != "latency"]
    return {batch: others if place else args.kinds for place, batch in enumerate(batches)}


def planned(args: argparse.Namespace) -> int:
    """How many rows the whole run has."""
    kinds = sum(map(len, model_batches(args).values())) * len(args.dtype)
    return sum(len(set(case.passes) & set(args.passes)) for case in args.cases) + len(args.entries) * kinds


def measured(args: argparse.Namespace, device: torch.device, run: dict) -> Iterator[dict]:
    """Fills ``run`` with the ceilings, then gives the rows of every case and model; peers join a row after it is given.

    Raises:
        DeviceLost: a peer left the device unusable.
    """
    timer = Timer(device, quick=args.quick)
    with on_stream(device), Bar(len(args.cases) + len(args.entries)) as bar:
        compared = peers.Peers(args.peers, released=args.released, vmamba=args.vmamba)
        runner = Runner(timer, args.passes, compared, bar.say)
        bar.say("copy bandwidth")
        run["copy"] = runner.copy.describe()
        bar.say("matrix product")
        run["gemm_tflops"] = measure.gemm_tflops(timer, [DTYPES[name] for name in args.dtype])
        for case in args.cases:
            yield from runner.rows(case)
            bar.advance(case.title)
        side = CPU_QUICK_SIDE if args.device == "cpu" and args.quick else SIDE
        runner = models.ModelRunner(timer, side, bar.say)
        for entry in args.entries:
            for batch, kinds in model_batches(args).items():
                for dtype in args.dtype:
                    yield from runner.rows(entry, batch, DTYPES[dtype], kinds)
            bar.advance(entry.label)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0; 1 if a result of this project was wrong or is missing, or could not be written; 130 after Ctrl-C. What a peer
        does changes nothing, unless it leaves the device unusable, so that this project's rows cannot be measured.
    """
    args = parse(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    started = time.perf_counter()
    run = report.environment(device) | {"quick": args.quick}
    earlier = report.read_json(args.json) if args.append and args.json.exists() else []
    rows: list[dict] = []

    def keep() -> None:
        ablation.compare(rows)
        layer_cases.compare_states(rows)
        models.compare_rows(rows)
        run.update(seconds=time.perf_counter() - started, rows=rows, geometric_means=report.means(rows))
        if args.json is not None and "gemm_tflops" in run:
            try:
                report.write_json(args.json, [*earlier, run])
            except OSError as error:  # the disk is full: the tables are still to be had
                unwritten.append(f"argument --json: '{args.json}' could not be written: {error.strerror}")

    cut, unwritten = None, []
    try:
        for row in measured(args, device, run):
            rows.append(row)
            keep()  # after every row: a run that is cut short leaves what it has
    except KeyboardInterrupt:
        cut, status = "interrupted", INTERRUPTED
    except verdict.DeviceLost as error:
        cut, status = f"cut short, {error}", 1
    keep()
    wrong = verdict.failures(rows)
    show(run, rows, wrong, args)
    for line in dict.fromkeys(unwritten):
        print(f"bench/run.py: error: {line}", file=sys.stderr)
    count = f"{len(rows)} rows in {run['seconds']:.0f} s"
    if cut is not None:
        print(f"{cut}: {len(rows)} of {planned(args)} rows measured, which are above", file=sys.stderr)
        return status
    missing = planned(args) - len(rows)
    if wrong or missing:
        lost = f"; {missing} rows are missing" if missing else ""
        print(f"{count}; RED: {verdict.failed_rows(rows)} of this project's rows failed{lost}")
        return 1
    print(f"{count}; this project's results are right")
    return 1 if unwritten else 0


def show(run: dict, rows: Sequence[dict], wrong: Sequence[str], args: argparse.Namespace) -> None:
    """Prints the tables and, below them, what failed; draws the picture if it was asked for."""
    print(report.head(run))
    for text in (report.table(rows), model_table.text(rows)):
        if text:
            print(text)
    print()
    for line in (*wrong, *verdict.peer_failures(rows)):
        print(line)
    if args.plot is not None and any(row["us"] is not None for row in rows):
        plot.draw(run, args.plot)


if __name__ == "__main__":
    sys.exit(main())
