# SPDX-License-Identifier: Apache-2.0
"""The console command ``groupmamba``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

import groupmamba_ext as ext
from groupmamba import demo
from groupmamba_ext._load import check_device_supported


def info() -> int:
    """Prints versions, what the ops were built for, and the devices present; 1 if something of that cannot be used."""
    print(f"groupmamba {ext.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    try:
        built = ext.build_info()
    except RuntimeError as error:
        print(error)
        return 1
    width = max(map(len, built)) + 2
    for key, value in built.items():
        text = " ".join(value) if isinstance(value, list) else value
        print(f"  {key:<{width}}{text}")
    print(f"cpu: {torch.get_num_threads()} threads")
    usable = True
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(
            f"cuda:{index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        try:
            check_device_supported(index)
        except RuntimeError as error:
            print(f"  {error}")
            usable = False
    return 0 if usable else 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="groupmamba", description="Grouped selective-scan vision layers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(commands.add_parser("demo", help="run the layer on a photograph and draw what it does"))
    about = commands.add_parser("info", help="what was built and the devices present; or facts on a model")
    about.add_argument("model", nargs="?", help="such as groupmamba_tiny: parameters, multiply-adds, speed, memory")
    about.add_argument("--batch", type=_positive, help="images at a time (default: 128 on a GPU, 8 on the CPU)")
    about.add_argument("--size", type=_positive, default=224, help="pixels of a side (default: %(default)s)")
    about.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    commands.add_parser("selftest", help="check every op against its reference on the devices present")
    args = parser.parse_args(argv)
    if args.command == "info":
        if args.model is None:
            return info()
        from groupmamba.model_info import describe

        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return describe(args.model, args.batch or (128 if device == "cuda" else 8), args.size, device)
    if args.command == "selftest":
        from groupmamba_ext import selftest

        return selftest.main()
    try:
        photo, places = demo.prepare(args)
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        print(f"groupmamba demo: {error}", file=sys.stderr)
        return 1
    return demo.run(photo, places, args.out)


if __name__ == "__main__":
    sys.exit(main())
