# SPDX-License-Identifier: Apache-2.0
"""Everything a run needs, made and checked before its first step."""

from __future__ import annotations

import argparse
import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from groupmamba.training.card import Card, create_model, find_weights, load
from groupmamba.training.data import (
    BadImages,
    Folder,
    Images,
    TrainingOrder,
    ValidationOrder,
    loader,
    training_transform,
    validation_folder,
    validation_transform,
)
from groupmamba.training.distributed import Processes
from groupmamba.training.options import OPTIONS
from groupmamba.training.output import Screen
from groupmamba.training.pixels import Normalize
from groupmamba.training.recipe import rates
from groupmamba_ext._command import CommandError, UsageError, gpu_usable, require_gpu


@dataclass
class Data:
    """Images of a run, in the order in which it takes them."""

    classes: list[str]
    training: Folder
    order: TrainingOrder
    batches: DataLoader
    validation: DataLoader
    bad: BadImages
    bad_in_validation: BadImages
    normalize: Normalize


def choose_device(asked: str | None, model: str) -> str:
    """``"cpu"`` or ``"cuda"``: what was asked for, or a GPU where it can be used.

    Raises:
        CommandError: a GPU was asked for and can't be used.
    """
    ops = model.startswith("groupmamba")
    if asked == "cuda":
        require_gpu(ops=ops)
    return asked or ("cuda" if gpu_usable(ops=ops) else "cpu")


def amp_dtype(device: torch.device, amp: bool | None, dtype: str | None) -> torch.dtype | None:
    """The dtype of autocast: bfloat16 where the GPU has it, else float16, and none on a CPU."""
    on_gpu = device.type == "cuda"
    if not (on_gpu if amp is None else amp):
        return None
    if dtype is not None:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    return torch.bfloat16 if not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def check_arguments(args: argparse.Namespace, processes: Processes, device: torch.device) -> None:
    """UsageError or CommandError for options that can't work on this machine."""
    if device.type == "cpu" and args.sync_bn:
        raise UsageError("--sync-bn needs GPUs: torch has it for them alone")
    if device.type == "cpu" and args.amp and args.amp_dtype == "float16":
        raise UsageError("--amp-dtype float16 needs a GPU")
    if device.type == "cuda" and torch.cuda.device_count() <= processes.local_rank:
        raise CommandError(
            f"process {processes.local_rank} of this host has no GPU: torch sees {torch.cuda.device_count()}"
        )
    if args.kd_model_path is not None and not Path(args.kd_model_path).is_file():
        raise CommandError(f"--kd-model-path {args.kd_model_path} is no file")
    for name in ("data", "weights", "kd_model_path"):  # for args.yaml, which may be used elsewhere
        if getattr(args, name) is not None:
            setattr(args, name, os.path.abspath(getattr(args, name)))


def make_model(args: argparse.Namespace, classes: list[str], fresh: bool, screen: Screen) -> tuple[nn.Module, Card]:
    """The model, by the seed, if ``fresh`` with ``--weights`` or ``--pretrained`` in it, and its card.

    Raises:
        UsageError, CommandError: as for :func:`groupmamba.training.card.create_model` and ``load``.
    """
    torch.manual_seed(args.seed)
    options: dict[str, Any] = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    if args.drop:
        options["drop_rate"] = args.drop
    options.update(args.model_kwargs or {})
    model = create_model(args.model, pretrained=args.pretrained and fresh, num_classes=len(classes), **options)
    if args.weights is not None and fresh:
        for line in load(model, find_weights(args.weights)):
            screen.say(line)
    if args.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"--grad-checkpointing: {args.model} does not have it")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    card = Card(
        args.model,
        len(classes),
        dict(args.model_kwargs or {}),
        classes,
        img_size=args.img_size,
        crop_pct=args.crop_pct,
        interpolation=args.interpolation,
    )
    card.mean, card.std = tuple(cfg.get("mean", card.mean)), tuple(cfg.get("std", card.std))
    return model, card


def read_folders(args: argparse.Namespace) -> tuple[Folder, Folder]:
    """Training and validation images, with the same classes.

    Raises:
        CommandError: a folder or a class is missing, or the number of classes is another than ``--num-classes``.
    """
    data = Path(args.data)
    validation = validation_folder(data)
    training = Folder(data / "train")
    if args.num_classes not in (None, len(training.classes)):
        raise CommandError(f"--num-classes {args.num_classes}: {training.root} holds {len(training.classes)} classes")
    if len(training.classes) < 2:
        raise CommandError(f"{training.root} holds one class, {training.classes[0]}; there must be two at least")
    return training, Folder(validation, training.classes)


def check_same_images(training: Folder, state: Mapping[str, Any] | None) -> None:
    """CommandError where the run that goes on, whose ``state`` it is, had other classes or another number of images."""
    if state is None:
        return
    if state["classes"] != training.classes:
        raise CommandError(f"{training.root} holds other classes than the run that goes on had")
    if state["images"] != len(training):
        raise CommandError(
            f"{training.root} holds {len(training):,} images, and the run that goes on had {state['images']:,}; "
            f"--weights starts a new run from its weights"
        )


def settle_batch(
    args: argparse.Namespace, images: int, processes: Processes, given: bool, total: int | None, screen: Screen
) -> None:
    """Sets ``args.batch_size`` for this number of processes.

    Args:
        args: of the run.
        images: of an epoch.
        processes: of the run.
        given: whether the batch is the user's own.
        total: images a step of the run that goes on, or None.
        screen: for the line that says of a smaller batch.

    Raises:
        UsageError: the batch does not fit the images, or differs from that of the run that goes on.
    """
    pieces = processes.world * args.grad_accum_steps
    if total is not None:
        if total % pieces:
            raise UsageError(f"the run that goes on takes {total} images a step, which {pieces} can't share")
        if given and args.batch_size * pieces != total:
            raise UsageError(
                f"--batch-size {args.batch_size} makes {args.batch_size * pieces} images a step, and the run that goes "
                f"on takes {total}"
            )
        args.batch_size = total // pieces
    elif args.batch_size * pieces > images:
        if given or images < 2 * pieces:
            raise UsageError(
                f"--batch-size {args.batch_size} makes {args.batch_size * pieces} images a step, and there are {images}"
            )
        smaller = images // pieces
        args.batch_size = smaller - smaller % 2  # for mixup
        screen.say(f"--batch-size {args.batch_size} in place of the default: there are {images} training images")
    if (args.mixup or args.cutmix) and args.batch_size % 2:  # timm pairs image i with image n - 1 - i
        raise UsageError(f"--batch-size {args.batch_size} must be even for mixup and CutMix")


def make_data(
    args: argparse.Namespace,
    folders: tuple[Folder, Folder],
    card: Card,
    processes: Processes,
    device: torch.device,
    screen: Screen,
) -> Data:
    """The images' loaders."""
    training, validation = folders
    rank, world = processes.rank, processes.world
    order = TrainingOrder(len(training), args.batch_size, args.grad_accum_steps, rank, world, args.seed)
    transform = training_transform(args, card.mean, card.std)
    images = Images(training, transform, args.seed, args.max_bad_images, args.img_size)
    check = validation_transform(args.img_size, card)
    held_out = Images(validation, check, args.seed, 0, args.img_size)
    batch = args.validation_batch_size or args.batch_size
    pin = device.type == "cuda" if args.pin_mem is None else args.pin_mem
    return Data(
        training.classes,
        training,
        order,
        loader(images, order, args.workers, pin=pin, keep=True),
        loader(held_out, ValidationOrder(len(held_out), batch, rank, world), args.workers, pin=pin),
        BadImages(training, args.max_bad_images, screen.tell),
        BadImages(validation, args.max_bad_images, screen.tell),
        Normalize(card.mean, card.std, device),
    )


def make_mixup(args: argparse.Namespace, num_classes: int) -> Any:
    """timm's Mixup, or None."""
    if not (args.mixup > 0 or args.cutmix > 0):
        return None
    from timm.data import Mixup

    return Mixup(
        args.mixup,
        args.cutmix,
        None,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def make_criterion(args: argparse.Namespace, mixed: bool) -> nn.Module:
    """The loss by labels, as timm chooses it."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()


def distribute(
    model: nn.Module, args: argparse.Namespace, processes: Processes, stream: torch.cuda.Stream | None
) -> nn.Module:
    """The model for all processes; buffers are averaged at checkpoints and epochs, not sent in each step.

    ``stream`` is for a CUDA graph, which takes what is made here along: DistributedDataParallel makes the nodes that
    sum up gradients once, and they stay on the stream where they were made.
    """
    if processes.world == 1:
        return model
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name from 2.14 on
    options: dict[str, Any] = {name: False}
    # Of depthwise weights, whose strides say channels-last and not at once: their gradients are copied, nothing more.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    device = next(model.parameters()).device
    if device.type == "cuda":
        options["device_ids"] = [device.index]
    if stream is None:
        return DistributedDataParallel(model, **options)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        wrapped = DistributedDataParallel(model, **options)
    torch.cuda.current_stream(device).wait_stream(stream)
    return wrapped


def run_rates(args: argparse.Namespace, total_batch: int) -> Any:
    """The learning rates of the run, see :func:`groupmamba.training.recipe.rates`."""
    names = ("lr", "lr_base", "lr_base_size", "lr_base_scale", "warmup_lr", "min_lr")
    assert all(name in OPTIONS for name in names)
    return rates(total_batch, **{name: getattr(args, name) for name in names})
