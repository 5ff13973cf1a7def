# SPDX-License-Identifier: Apache-2.0
"""The command ``groupmamba demo``: what its user gave and has installed, the order of its work, what it prints."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import groupmamba_ext as ext
from groupmamba.demo.features import STRIDE, embed
from groupmamba.demo.inspection import inspect
from groupmamba.demo.measure import Timing, check, measure, random_layer
from groupmamba.model_info import whole_number
from groupmamba_ext._command import CommandError, check_out, gpu_usable, one_line, require_gpu
from groupmamba_ext._load import load_error

if TYPE_CHECKING:
    from groupmamba.demo.photo import Photo

CROP = (12, 16)
TOLERANCE = 1e-4  # float32 against the float64 reference, relative
LARGEST_SIZE = 2048  # 512 x 512 tokens: a demo of 2 GB; an image in the picture has 352 pixels
BAR = "{desc}{bar:24} {n_fmt}/{total_fmt} {elapsed}"
MODULES = ("matplotlib", "PIL", "sklearn", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``groupmamba demo``."""
    parser.add_argument(
        "image", nargs="?", type=Path, metavar="IMAGE", help="a photograph (default: scikit-learn's china.jpg)"
    )
    parser.add_argument("--out", type=Path, default=Path("groupmamba_demo.png"), help="the PNG (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, and the GPU where one can be used")
    parser.add_argument(
        "--size",
        type=whole_number(STRIDE * max(CROP), LARGEST_SIZE, " (which takes 2 GB)"),
        default=512,
        help=f"longer side of the image in pixels, up to {LARGEST_SIZE} (default: %(default)s)",
    )


def require_extras() -> None:
    """CommandError that names the cure where a package of the demo is missing or cannot be imported."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise CommandError(
                f"it needs {error.name}, which is not installed: pip install 'groupmamba[demo]'"
            ) from error
        except ImportError as error:
            raise CommandError(f"{name} cannot be imported: {one_line(error)}") from error


def devices(name: str | None) -> list[torch.device]:
    """The devices to run on; without a name the CPU, and the GPU if there is one that the build can use.

    Raises:
        CommandError: a GPU was asked for and cannot be used.
    """
    if name == "cuda":
        require_gpu()
    if name is not None:
        return [torch.device(name)]
    return [torch.device("cpu"), *([torch.device("cuda")] if gpu_usable() else [])]


def print_table(rows: list[Timing]) -> None:
    """The timings, one row each."""
    print(f"{'what':<28}{'device':<8}{'channels x H x W':<18}{'time':>12}")
    for row in rows:
        print(f"{row.what:<28}{row.device:<8}{row.size:<18}{row.milliseconds:>9.2f} ms")


def run(photo: Photo, places: list[torch.device], out: Path) -> int:
    """Runs the demo; 0 if the compiled ops agree with the reference, else 1."""
    from tqdm import tqdm

    from groupmamba.demo.picture import draw

    for note in photo.notes:
        print(note)
    timings, checks, worst = [], [], 0.0
    with ext.backend("native"), tqdm(total=5 * len(places) + 2, bar_format=BAR, disable=None) as bar:

        def step(text: str) -> None:
            bar.set_description_str(f"{text:<34}")
            bar.update()

        features = embed(photo.pixels)
        for device in places:
            layer, x = random_layer().to(device), features.to(device)
            crop = x[:, :, : CROP[0], : CROP[1]].contiguous(memory_format=torch.channels_last)
            rows = measure(layer, x, crop, step)
            step(f"{device.type}: check against the reference")
            name, error = check(layer, crop)
            timings += rows
            worst = max(worst, error)
            checks.append(f"{device.type}: relative error {error:.0e}, {name}")
        step("look inside the layer")
        notes = [f"{row.device}: {row.what} {row.milliseconds:.1f} ms" for row in timings if row.whole_image]
        picture = inspect(layer, x, photo.pixels, photo.notes + notes + checks)
        step("draw")
        draw(picture, out)
    print_table(timings)
    print(f"against the reference in float64, on the crop (tolerance {TOLERANCE:.0e}):", *checks, sep="\n")
    print(f"picture: {out}")
    if worst >= TOLERANCE:
        print("FAILED: the compiled ops differ from the reference by more than the tolerance; groupmamba selftest says")
        print("which; please report it with the output of groupmamba info")
        return 1
    return 0


def main(args: argparse.Namespace) -> int:
    """Checks all that can be wrong with what the user gave or installed, then runs the demo.

    Raises:
        UsageError: an argument has a wrong value.
        CommandError: an extra or the compiled ops are missing, the GPU cannot be used, the image cannot be read, or
            the picture could not be written.
    """
    check_out(args.out)
    require_extras()
    problem = load_error()
    if problem is not None:
        raise CommandError(problem)
    places = devices(args.device)
    from groupmamba.demo.photo import load_photo

    return run(load_photo(args.image, args.size, STRIDE), places, args.out)
