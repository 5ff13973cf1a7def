#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops, the layer and the models: right first, then fast. See bench/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import ablation, layer_cases, measure, op_cases, peers, plot, report  # noqa: E402
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
    "ablation": ablation.ablation_cases,
}


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process with status 2 and the argument's name where it is wrong."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    every = {"nargs": "+", "action": "extend", "metavar": "NAME"}
    parser.add_argument("--op", choices=CASES, help=f"of {', '.join(CASES)} (default: scan layer)", **every)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of {', '.join(DTYPES)} (bfloat16, cpu: float32)", **every)
    parser.add_argument("--batch", type=positive, nargs="+", metavar="N", help="of the stage shapes (128, cpu: 1)")
    parser.add_argument("--pass", dest="passes", choices=PASSES, help=f"of {', '.join(PASSES)} (default: all)", **every)
    parser.add_argument("--peers", choices=(*peers.NAMES, "none"), help=f"of {', '.join(peers.NAMES)}, none", **every)
    parser.add_argument("--released", type=Path, metavar="PATH", help="a checkout of the released GroupMamba, built")
    parser.add_argument("--vmamba", type=Path, metavar="PATH", help="a checkout of VMamba, built")
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
    args.cases = []
    try:
        dtypes = [DTYPES[name] for name in args.dtype]
        for op in args.op:
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
    return args


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
    with on_stream(device), Bar(len(args.cases)) as bar:
        compared = peers.Peers(args.peers, released=args.released, vmamba=args.vmamba)
        timer = Timer(device, quick=args.quick)
        runner = Runner(timer, args.passes, compared, bar.say)
        bar.say("copy bandwidth")
        run["copy"] = runner.copy.describe()
        bar.say("matrix product")
        run["gemm_tflops"] = measure.gemm_tflops(timer, [DTYPES[name] for name in args.dtype])
        for case in args.cases:
            rows += runner.rows(case)
            bar.advance(case.title)
    ablation.compare(rows)
    copy = run["copy"]
    print(f"{run['device']['name']}, torch {run['versions']['torch']}, {run['date']}")
    print(f"copy of {copy['bytes'] >> 20} MiB by {copy['call']}: {copy['gb_s']:,.0f} GB/s", end="")
    print(f" (Tensor.copy_: {copy['tensor_copy_gb_s']:,.0f} GB/s)")
    print(report.table(rows))
    run |= {"seconds": time.perf_counter() - started, "rows": rows, "geometric_means": report.means(rows)}
    if args.json is not None:
        report.write_json(args.json, run, append=args.append)
    if args.plot is not None:
        plot.draw(run, args.plot)
    print(f"\n{len(rows)} rows in {run['seconds']:.0f} s", "; RED: results are wrong" if runner.red else "", sep="")
    return 1 if runner.red else 0


if __name__ == "__main__":
    sys.exit(main())
