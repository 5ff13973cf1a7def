# SPDX-License-Identifier: Apache-2.0
"""Everything a run needs, made and checked before its first step."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from groupmamba.training.card import Card
from groupmamba.training.data import BadImages, TrainingOrder, ValidationOrder
from groupmamba.training.distributed import Processes
from groupmamba.training.output import Screen
from groupmamba.training.recipe import rates
from groupmamba.training.replicas import Replicas
from groupmamba.training.task import Source, Sources, Task
from groupmamba_ext._command import CommandError, UsageError, gpu_usable, require_gpu


@dataclass
class Data:
    """Images of a run, in the order in which it takes them."""

    sources: Sources
    order: TrainingOrder
    batches: DataLoader
    validation: DataLoader
    bad: BadImages
    bad_in_validation: BadImages


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
    for name in ("data", "weights"):  # for args.yaml, which may be used elsewhere
        if getattr(args, name) is not None:
            setattr(args, name, os.path.abspath(getattr(args, name)))


def check_same_images(training: Source, state: Mapping[str, Any] | None) -> None:
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
    args: argparse.Namespace,
    images: int,
    even: bool,
    processes: Processes,
    given: bool,
    total: int | None,
    screen: Screen,
) -> None:
    """Sets ``args.batch_size`` for this number of processes.

    Args:
        args: of the run.
        images: of an epoch.
        even: whether the batch must be even.
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
        if given or images < (2 if even else 1) * pieces:
            raise UsageError(
                f"--batch-size {args.batch_size} makes {args.batch_size * pieces} images a step, and there are "
                f"{images} training images"
            )
        smaller = images // pieces
        args.batch_size = smaller - smaller % 2 if even else smaller
        screen.say(f"--batch-size {args.batch_size} in place of the default: there are {images} training images")
    if even and args.batch_size % 2:
        raise UsageError(f"--batch-size {args.batch_size} must be even for mixup and CutMix")


def make_data(task: Task, sources: Sources, card: Card) -> Data:
    """The images' loaders."""
    args, processes = task.args, task.processes
    rank, world = processes.rank, processes.world
    order = TrainingOrder(len(sources.training), args.batch_size, args.grad_accum_steps, rank, world, args.seed)
    held_out = ValidationOrder(len(sources.validation), args.validation_batch_size or args.batch_size, rank, world)
    pin = task.device.type == "cuda" if args.pin_mem is None else args.pin_mem
    batches, validation = task.make_loaders(sources, card, (order, held_out), pin)
    bad = [BadImages(source, args.max_bad_images, task.screen.tell) for source in sources]
    return Data(sources, order, batches, validation, bad[0], bad[1])


def distribute(
    model: nn.Module, args: argparse.Namespace, processes: Processes, stream: torch.cuda.Stream | None
) -> Replicas | None:
    """The model becomes one of all processes; buffers are averaged at checkpoints and epochs, not sent in each step.

    ``stream`` is for a CUDA graph, which takes what is made here along.
    """
    if processes.world == 1:
        return None
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if stream is None:
        return Replicas(model, processes.world)
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        replicas = Replicas(model, processes.world)
    torch.cuda.current_stream(stream.device).wait_stream(stream)
    return replicas


def run_rates(args: argparse.Namespace, total_batch: int) -> Any:
    """The learning rates of the run, see :func:`groupmamba.training.recipe.rates`."""
    names = ("lr", "lr_base", "lr_base_size", "lr_base_scale", "warmup_lr", "min_lr")
    return rates(total_batch, **{name: getattr(args, name) for name in names})
