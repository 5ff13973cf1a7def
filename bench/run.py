#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops, the layer and the models: right first, then fast. See bench/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import ablation, layer_cases, measure, model_table, models, op_cases, peers, plot, report  # noqa: E402
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


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process with status 2 and the argument's name where it is wrong."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    every = {"nargs": "+", "action": "extend", "metavar": "NAME"}
    parser.add_argument("--op", choices=OPS, help=f"of {', '.join(OPS)} (default: scan layer)", **every)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of {', '.join(DTYPES)} (bfloat16, cpu: float32)", **every)
    parser.add_argument("--batch", type=positive, nargs="+", metavar="N", help="of the stage shapes (128, cpu: 1)")
    parser.add_argument("--pass", dest="passes", choices=PASSES, help=f"of {', '.join(PASSES)} (default: all)", **every)
    parser.add_argument("--peers", choices=(*peers.NAMES, "none"), help=f"of {', '.join(peers.NAMES)}, none", **every)
    parser.add_argument("--released", type=Path, metavar="PATH", help="a checkout of the released GroupMamba, built")
    parser.add_argument("--vmamba", type=Path, metavar="PATH", help="a checkout of VMamba, built")
    parser.add_argument("--models", metavar="NAME", nargs="+", help="with --op model: these only (default: all)")
    parser.add_argument(
        "--kinds", choices=models.KINDS, help=f"with --op model: of {', '.join(models.KINDS)} (default: all)", **every
    )
    parser.add_argument("--quick", action="store_true", help="the stage shapes alone, fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline as a PNG (needs matplotlib)")
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
    args.passes = args.passes or list(PASSES)
    args.kinds = [kind for kind in models.KINDS if kind in (args.kinds or models.KINDS)]
    args.cases = []
    try:
        dtypes = [DTYPES[name] for name in args.dtype]
        for op in args.op:
            if op == "model":
                models.require()
            else:
                args.cases += CASES[op](args.device, dtypes, args.quick, args.batch)
    except ValueError as error:
        parser.error(f"argument --op: {error}")
    if args.peers is None:
        args.peers = peers.default_names(args.released, args.vmamba)
    args.peers = [] if "none" in args.peers else list(dict.fromkeys(args.peers))
    try:
        peers.require(args.peers, args.released, args.vmamba)
    except ValueError as error:
        parser.error(str(error))
    args.entries = []
    if "model" in args.op:
        try:
            args.entries = chosen_models(args)
        except ValueError as error:
            parser.error(str(error))
    if args.append and args.json.exists():
        try:
            report.read_json(args.json)
        except ValueError as error:
            parser.error(f"argument --json: {error}")
    return args


def chosen_models(args: argparse.Namespace) -> list[models.Entry]:
    """The models asked for.

    Raises:
        ValueError: there is no model of a name in ``args.models``.
    """
    found = models.entries(args.peers, args.released, args.vmamba)
    if args.models is None:
        return found
    names = list(dict.fromkeys(entry.label.removesuffix(models.COMPILED) for entry in found))
    for name in args.models:
        if name not in names and name not in [entry.label for entry in found]:
            raise ValueError(f"argument --models: invalid choice: {name!r} (choose from {', '.join(names)})")
    chosen = (entry for entry in found if {entry.label, entry.label.removesuffix(models.COMPILED)} & set(args.models))
    return list(chosen)


def measured(args: argparse.Namespace, device: torch.device, run: dict) -> Iterator[tuple[list[dict], bool]]:
    """Fills ``run`` with the ceilings, then gives the rows of every case and model, and whether one of them is red."""
    timer = Timer(device, quick=args.quick)
    with on_stream(device), Bar(len(args.cases) + len(args.entries)) as bar:
        compared = peers.Peers(args.peers, released=args.released, vmamba=args.vmamba)
        runner = Runner(timer, args.passes, compared, bar.say)
        bar.say("copy bandwidth")
        run["copy"] = runner.copy.describe()
        bar.say("matrix product")
        run["gemm_tflops"] = measure.gemm_tflops(timer, [DTYPES[name] for name in args.dtype])
        for case in args.cases:
            yield list(runner.rows(case)), runner.red
            bar.advance(case.title)
        side = CPU_QUICK_SIDE if args.device == "cpu" and args.quick else SIDE
        runner = models.ModelRunner(timer, side, bar.say)
        batches = args.batch or [128 if args.device == "cuda" else 1]
        for entry in args.entries:
            for batch in batches:
                for dtype in args.dtype:
                    yield list(runner.rows(entry, batch, DTYPES[dtype], args.kinds)), runner.red
            bar.advance(entry.label)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0, or 1 if a result was wrong.
    """
    args = parse(argv)
    device = torch.device(args.device)
    started = time.perf_counter()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    run = report.environment(device)
    rows: list[dict] = []
    red = False
    earlier = report.read_json(args.json) if args.append and args.json.exists() else []
    for more, wrong in measured(args, device, run):
        rows += more
        red |= wrong
        ablation.compare(rows)
        models.compare_rows(rows)
        run |= {"seconds": time.perf_counter() - started, "rows": rows, "geometric_means": report.means(rows)}
        if args.json is not None:  # after every case: a run that is cut short leaves what it has
            report.write_json(args.json, [*earlier, run])
    print(report.head(run))
    print(report.table(rows))
    if args.entries:
        print(model_table.text(rows))
    if args.plot is not None:
        plot.draw(run, args.plot)
    print(f"\n{len(rows)} rows in {run['seconds']:.0f} s", "; RED: results are wrong" if red else "", sep="")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
