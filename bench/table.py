#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The README's table of results, made from a file that bench/run.py wrote, so that the figures have one place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import markdown  # noqa: E402
from suite.report import read_json  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or writes it into a file between its two markers.

    Returns:
        0, or 1 where the file has no markers.
    """
    parser = argparse.ArgumentParser(prog="bench/table.py", description=__doc__)
    parser.add_argument("results", type=Path, help="a file that bench/run.py --json wrote")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="these ops only")
    parser.add_argument("--stages", action="store_true", help="the four stage shapes alone")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="replace what is between its bench markers")
    args = parser.parse_args(argv)
    try:
        runs = read_json(args.results)
    except (OSError, ValueError) as error:
        parser.error(f"argument results: {error}")
    text = markdown.tables(runs, args.op, args.stages)
    if args.readme is None:
        print(text)
        return 0
    try:
        args.readme.write_text(markdown.replace_block(args.readme.read_text(), text))
    except (OSError, ValueError) as error:
        print(f"bench/table.py: argument --readme: {args.readme}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
