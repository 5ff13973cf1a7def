# SPDX-License-Identifier: Apache-2.0
"""The console command ``groupmamba``, also ``python -m groupmamba``.

Exit status: 0, or 1 where something cannot be done or a check failed, or 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from groupmamba import environment, model_info
from groupmamba.demo import command as demo
from groupmamba.training import command as train
from groupmamba.training import options as train_options
from groupmamba.training import predict, validation
from groupmamba.training.detection.command import DETECTOR
from groupmamba.training.option_table import TRAIN
from groupmamba.training.segmentation.command import SEGMENTER
from groupmamba_ext import selftest
from groupmamba_ext._command import run_command
from groupmamba_ext._version import __version__

COMMANDS = ("demo", "info", "selftest", "train", "train-detector", "train-segmenter", "validate", "predict")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="groupmamba", description="Grouped selective-scan vision layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"groupmamba {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))

    def add(
        name: str, help: str, run: Callable[[argparse.Namespace], int], *, own_help: bool = False
    ) -> argparse.ArgumentParser:
        description = f"{help[0].upper()}{help[1:]}."
        command = commands.add_parser(name, help=help, description=description, add_help=not own_help)
        command.set_defaults(run=run, parser=command)
        return command

    demo.add_arguments(add("demo", "run the layer on a photograph and draw what it does", demo.main))
    about = add("info", "versions, the build and the devices, for a bug report; with MODEL, facts on a model", _info)
    model_info.add_arguments(about)
    add("selftest", "check every op against its reference on the devices present", lambda args: selftest.main())
    for table, help in (
        (TRAIN, "train a model on folders of images"),
        (DETECTOR, "train a detector on images with boxes and masks in COCO's format"),
        (SEGMENTER, "train a segmenter on images with label images in ADE20K's layout"),
    ):
        train_options.add_arguments(add(table.name, help, partial(train.main, command=table), own_help=True), table)
    validation.add_arguments(add("validate", "accuracy of a checkpoint on folders of images", validation.main))
    predict.add_arguments(add("predict", "the most likely classes of images, and what speaks for them", predict.main))
    return parser


def _unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """The message on arguments that a command does not have, with the option that the first may be meant for."""
    text = f"unrecognized arguments: {' '.join(arguments)}"
    names = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    close = difflib.get_close_matches(arguments[0].partition("=")[0], names, 1)
    return f"{text}; is {close[0]} meant?" if close else text


def _info(args: argparse.Namespace) -> int:
    return environment.main() if args.model is None else model_info.main(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Raises:
        SystemExit: with status 2 for wrong arguments, 0 after ``--help`` and ``--version``, as argparse does.
    """
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(_unknown(args.parser, unknown))
    if args.command == "info":
        model_info.check_arguments(args)
    return run_command(f"groupmamba {args.command}", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
