# SPDX-License-Identifier: Apache-2.0
"""``groupmamba validate``: how good a checkpoint is on validation images, by the measure of its task."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from groupmamba.model_info import whole_number
from groupmamba.training.command import check_packages
from groupmamba.training.option_table import WORKERS, keyword, path_text
from groupmamba_ext._command import CommandError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from groupmamba.training.card import Card
    from groupmamba.training.data import Folder

BATCH = {"detection": 1, "segmentation": 16}  # a detector pads images to one size, and sees the padding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``groupmamba validate``."""
    parser.add_argument(
        "data", type=path_text, metavar="DATA", help="as for the command that trained; of classes, or their folders"
    )
    parser.add_argument(
        "--weights", type=path_text, required=True, metavar="FILE", help="a checkpoint, or the folder of a run"
    )
    parser.add_argument("--model", metavar="NAME", help="for a checkpoint that does not say which model it is")
    parser.add_argument(
        "--model-kwargs", type=keyword, nargs="*", metavar="NAME=VALUE", help="more arguments of that model"
    )
    parser.add_argument(
        "-b", "--batch-size", type=whole_number(1, 1 << 16), help="default: 128, of segmenters 16, of detectors 1"
    )
    parser.add_argument("-j", "--workers", type=whole_number(0, 1024), default=WORKERS, help="default: %(default)s")
    parser.add_argument("--img-size", type=whole_number(32, 4096), help="of classifiers; default: the checkpoint's")
    parser.add_argument("--multi-scale", action="store_true", help="of segmenters: six scales and their mirror images")
    parser.add_argument("--window", choices=("slide", "whole"), help="of segmenters: crops, or the image as a whole")
    parser.add_argument("--val-annotations", type=path_text, metavar="FILE", help="of detectors: another file of DATA")
    parser.add_argument("--val-images", type=path_text, metavar="FOLDER", help="of detectors: another folder of DATA")
    parser.add_argument("--max-bad-images", type=whole_number(0, 1 << 40), default=100, help="default: 100")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where one can be used")


def _files(path: str) -> list[tuple[str, Path]]:
    """What to validate: the weights, and beside those of a checkpoint's folder their moving average."""
    from groupmamba.training.card import RUN_FILES, find_weights
    from groupmamba.training.checkpoint import EMA, MODEL, Checkpoints

    folder = Path(path)
    if (folder / MODEL).is_file() and (folder / EMA).is_file():
        return [("model", folder / MODEL), ("moving average", folder / EMA)]
    if (folder / RUN_FILES[0]).is_file() or (folder / RUN_FILES[1]).is_file():
        files = [("best", folder / RUN_FILES[0])] if (folder / RUN_FILES[0]).is_file() else []
        for checkpoint in Checkpoints(folder, 1).found()[:1]:
            files += [("last", checkpoint / MODEL)]
            files += [("last, moving average", checkpoint / EMA)] if (checkpoint / EMA).is_file() else []
        return files or [("last", folder / RUN_FILES[1])]
    return [("model", find_weights(path))]


def main(args: argparse.Namespace) -> int:
    """Prints accuracy, mean IoU or mAP of the checkpoint, and of the moving average beside it.

    Raises:
        UsageError, CommandError: what was asked for can't be done.
    """
    check_packages()
    import torch

    from groupmamba.training.card import check_classifier, model_of
    from groupmamba.training.data import (
        VALIDATION_NAMES,
        BadImages,
        Folder,
        Images,
        ValidationOrder,
        loader,
        validation_transform,
    )
    from groupmamba.training.distributed import Processes
    from groupmamba.training.evaluate import accuracies
    from groupmamba.training.pixels import Normalize
    from groupmamba.training.setup import amp_dtype, choose_device

    kwargs = dict(args.model_kwargs or ())
    found = [(title, *model_of(file, args.model, model_kwargs=kwargs)) for title, file in _files(args.weights)]
    card = found[0][2]
    _check_options(args, card.task)
    if card.task != "classification":
        return _dense(args, found)
    data = Path(args.data)
    root = next((data / name for name in VALIDATION_NAMES if (data / name).is_dir()), data)
    if not root.is_dir():
        raise CommandError(f"{root} is no folder")
    folder = Folder(root)
    if card.classes is not None:
        _same_labels(folder, card.classes)
    elif len(folder.classes) != card.num_classes:
        raise CommandError(
            f"{root} holds {len(folder.classes):,} classes, and the checkpoint is for {card.num_classes:,}"
        )
    kind = choose_device(args.device, card.model)
    device = Processes().device(kind)
    size = args.img_size or card.img_size
    check_classifier(found[0][1], card.model, size, card.num_classes)
    images = Images(folder, validation_transform(size, card), 0, 0, size)
    batches = loader(images, ValidationOrder(len(images), args.batch_size or 128), args.workers, pin=kind == "cuda")
    bad = BadImages(folder, args.max_bad_images, lambda text: print(text, flush=True))
    amp = amp_dtype(device, None, None)
    models = [model.to(device).to(memory_format=torch.channels_last) for _, model, _ in found]
    print(f"{card.model}, {len(images):,} images of {root}, {len(folder.classes):,} classes, {size} x {size} pixels")
    normalize = Normalize(card.mean, card.std, device)
    results = accuracies(models, batches, normalize, device, amp, bad, Processes())
    bad.check_some_left()
    for (title, _, _), result in zip(found, results, strict=True):
        print(f"  {title:<22} top-1 {result.top1:.3f}%   top-5 {result.top5:.3f}%   loss {result.loss:.4f}")
    if bad.found:
        print(f"  {len(bad.found)} images could not be read and do not count")
    return 0


_OF_TASK = {
    "img_size": "classification",
    "multi_scale": "segmentation",
    "window": "segmentation",
    "val_annotations": "detection",
    "val_images": "detection",
}


def _check_options(args: argparse.Namespace, task: str) -> None:
    for name, its in _OF_TASK.items():
        if getattr(args, name) and its != task:
            raise UsageError(f"--{name.replace('_', '-')} is for {its}, and --weights {args.weights} is for {task}")


def _dense(args: argparse.Namespace, found: Sequence[tuple[str, nn.Module, Card]]) -> int:
    """Detectors and segmenters."""
    import torch

    from groupmamba.training.data import BadImages, ValidationOrder
    from groupmamba.training.dense import task_arguments
    from groupmamba.training.distributed import Processes
    from groupmamba.training.output import Screen
    from groupmamba.training.setup import amp_dtype, choose_device
    from groupmamba.training.task import task_of

    card = found[0][2]
    kind = task_of(card.task)
    check_packages(kind.command.needed)
    names = ("data", "workers", "multi_scale", "window", "val_annotations", "val_images", "batch_size")
    options = task_arguments(kind, card, {name: getattr(args, name) for name in names if getattr(args, name)})
    options.workers = args.workers
    device = Processes().device(choose_device(args.device, card.model))
    screen = Screen(True)
    screen.release()
    task = kind(options, Processes(), device, screen)
    source = task.read_validation(card)
    order = ValidationOrder(len(source), args.batch_size or BATCH[card.task])
    batches = task.validation_loader(source, card, order, device.type == "cuda")
    bad = BadImages(source, args.max_bad_images, lambda text: print(text, flush=True))
    models = [model.to(device).to(memory_format=torch.channels_last) for _, model, _ in found]
    print(f"{card.model}, {len(source):,} images of {source.root}, {card.num_classes:,} classes")
    task.detailed = True
    results = task.evaluate(models, batches, amp_dtype(device, None, None), bad)
    bad.check_some_left()
    for (title, _, _), values, lines in zip(found, results, task.details, strict=True):
        print(f"  {title:<22} " + "   ".join(f"{name} {value:.2f}%" for name, value in values.items()))
        for line in lines:
            print(f"    {line}")
    if bad.found:
        print(f"  {len(bad.found)} images could not be read and do not count")
    return 0


def _same_labels(folder: Folder, classes: Sequence[str]) -> None:
    """Labels of the folder become those of the checkpoint, by the names of the classes."""
    position = {name: i for i, name in enumerate(classes)}
    foreign = [name for name in folder.classes if name not in position]
    if foreign:
        raise CommandError(f"{folder.root} has a class that the checkpoint does not know: {foreign[0]}")
    folder.samples = [(path, position[folder.classes[label]]) for path, label in folder.samples]
