#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Tables of what bench/run.py wrote, so that the figures of README and documentation have one place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import markdown, plot  # noqa: E402
from suite.arguments import OneLineParser, writable  # noqa: E402
from suite.report import read_json, write_json  # noqa: E402

NEW_PAGE = f"# Benchmarks\n\n{markdown.BEGIN}\n{markdown.END}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints all tables, or writes the short one into a README and all of them into a page of the documentation.

    Returns:
        0, or 1 where a file has no markers or the results are not from one tree: then nothing is written.
    """
    parser = OneLineParser(prog="bench/table.py", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files that bench/run.py --json wrote, the latest last")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all runs into one file")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="these ops only, of the tables that are printed")
    parser.add_argument("--stages", action="store_true", help="the four stage shapes alone")
    parser.add_argument("--readme", type=writable, metavar="FILE", help="put the short table between its bench markers")
    parser.add_argument("--docs", type=writable, metavar="FILE", help="put all tables there; made if it is missing")
    parser.add_argument("--plot", type=writable, metavar="FILE", help="draw the roofline as a PNG (needs matplotlib)")
    args = parser.parse_args(argv)
    try:
        runs = [run for path in args.results for run in read_json(path)]
    except (OSError, ValueError) as error:
        parser.error(f"argument results: {error}")
    if args.readme is args.docs is args.plot is args.json is None:
        print(markdown.tables(runs, args.op, args.stages))
        return 0
    pages: list[tuple[Path, str]] = []
    try:
        markdown.require_one_tree(runs)
        if args.readme is not None:
            pages.append((args.readme, _page("readme", args.readme, lambda: markdown.short(runs))))
        if args.docs is not None:
            pages.append((args.docs, _page("docs", args.docs, lambda: markdown.tables(runs, args.op, args.stages))))
        if args.plot is not None:
            plot.draw(_merged(runs), args.plot)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"bench/table.py: {', '.join(map(str, args.results))}: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        write_json(args.json, runs)
    for path, text in pages:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


def _page(name: str, path: Path, make: Callable[[], str]) -> str:
    """The text of ``path`` with its block replaced.

    Raises:
        ValueError: it names the argument.
    """
    before = NEW_PAGE if name == "docs" and not path.exists() else path.read_text()
    block = make()
    try:
        return markdown.replace_block(before, block)
    except ValueError as error:
        raise ValueError(f"argument --{name}: {path} {error}") from None


def _merged(runs: Sequence[dict]) -> dict:
    """One run of the latest rows of all, for the picture."""
    roofs = {name: tflops for run in runs for name, tflops in run["gemm_tflops"].items()}
    return {**runs[-1], "rows": markdown.latest(runs), "gemm_tflops": roofs}


if __name__ == "__main__":
    sys.exit(main())
