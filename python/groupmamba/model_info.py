# SPDX-License-Identifier: Apache-2.0
"""``groupmamba info MODEL``: parameters, multiply-adds, throughput and memory of a model of timm on this machine."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from groupmamba.training.option_table import keyword
from groupmamba_ext._command import CommandError, UsageError, gpu_usable, is_out_of_memory, one_line, require_gpu
from groupmamba_ext.backend import current_backend

SECONDS = 2.0  # of measuring for each figure
SIZE, LARGEST_SIZE = 224, 2048  # one image of 2048 x 2048 keeps 14 GB in training, of groupmamba_tiny in float32
LARGEST_BATCH = 1 << 16
MODEL_OPTIONS = ("model-kwargs", "batch", "size", "device")


def whole_number(lowest: int, highest: int, why: str = "") -> Callable[[str], int]:
    """A type for argparse: whole numbers from ``lowest`` to ``highest``; ``why`` not more stands in the error."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not lowest <= int(text) <= highest:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest}{why}, got {shown!r}")
        return int(text)

    return convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``groupmamba info``."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="groupmamba_tiny, or any other model of timm")
    parser.add_argument(
        "--model-kwargs",
        type=keyword,
        nargs="+",
        metavar="NAME=VALUE",
        help="more arguments of the model, such as \"directions=('lr','rl')\"",
    )
    parser.add_argument(
        "--batch", type=whole_number(1, LARGEST_BATCH), help="images at a time (default: 128 on a GPU, 8 on the CPU)"
    )
    parser.add_argument(
        "--size",
        type=whole_number(1, LARGEST_SIZE, " (one such image can take 14 GB)"),
        help=f"pixels of a side, up to {LARGEST_SIZE} (default: {SIZE})",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where one can be used")


def check_arguments(args: argparse.Namespace) -> None:
    """Leaves by ``args.parser.error`` where an option for a MODEL comes without one."""
    given = [f"--{name}" for name in MODEL_OPTIONS if getattr(args, name.replace("-", "_")) is not None]
    if args.model is None and given:
        args.parser.error(f"{' and '.join(given)} must come with a MODEL, such as groupmamba_tiny")


def multiply_adds(model: nn.Module, size: int) -> float:
    """Of one image, half of what torch's FLOP counter counts: products, convolutions, and the scan's recurrence.

    On the meta device, where nothing is padded to what tensor cores take; models that do not run there count on their
    own.
    """
    model.eval()
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    try:
        return _multiply_adds(model, {name: t.to("meta") for name, t in tensors.items()}, size)
    except Exception:  # of other projects' models some ask for values
        return _multiply_adds(model, tensors, size)


def _multiply_adds(model: nn.Module, tensors: dict[str, Tensor], size: int) -> float:
    image = torch.zeros(1, 3, size, size, device=next(iter(tensors.values())).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, tensors, (image,))
    return counter.get_total_flops() / 2


def median_seconds(step: Callable[[], object], seconds: float) -> float:
    """Of one call of ``step``, by torch's timer, which warms up, waits for the GPU, and measures for ``seconds``."""
    # Importing it warns of a toolkit without a GPU, which concerns only those who compile.
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.msg)
    from torch.utils.benchmark import Timer

    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def training_bytes(model: nn.Module, size: int) -> int:
    """What one image's forward in float32 keeps for the backward, as autograd asks for it on the meta device."""
    meta = copy.deepcopy(model).to("meta").train()
    parameters = {p.untyped_storage()._cdata for p in meta.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding the tensors keeps their storages apart

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        meta(torch.empty(1, 3, size, size, device="meta"))
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in parameters)


def free_bytes() -> int | None:
    """Memory of the CPU that is free, within the limit of a container; None where the system does not say."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    if found is None:
        return None
    free = int(found[1]) * 1024
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            free = min(free, int(text))
    return free


def _check_memory(model: nn.Module, batch: int, size: int) -> None:
    """CommandError where a training step on the CPU cannot fit: Linux would kill the process without a word."""
    free = free_bytes()
    try:
        an_image = training_bytes(model, size)
    except Exception:  # of other projects' models some do not run on the meta device
        return
    fixed = 2 * sum(p.numel() * p.element_size() for p in model.parameters())  # with their gradients
    if free is not None and fixed + batch * an_image > free:
        fits = (free - fixed) // an_image
        advice = f"; at most --batch {fits} can fit" if fits > 0 else "; a smaller --size needs less"
        raise CommandError(
            f"--batch {batch} of {size} x {size} pixels needs at least {(fixed + batch * an_image) / 2**30:,.1f} GiB "
            f"to train in float32, and {free / 2**30:,.1f} GiB are free{advice}"
        )


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import groupmamba.models  # registers the models, and names the extra where timm is missing

        assert groupmamba.models
        import timm
    except ImportError as error:
        raise CommandError(one_line(error)) from error
    if not timm.is_model(name):
        names = ", ".join(timm.list_models("groupmamba*"))
        raise UsageError(f"MODEL must be one of {names}, or any other model of timm, got {name!r}")
    try:
        return timm.create_model(name, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"MODEL {name} can't be made so: {one_line(error)}") from error


def _device(name: str, asked: str | None) -> str:
    """``asked``, or the GPU where it can be used; CommandError where ``asked`` is a GPU that cannot be."""
    if asked == "cpu":
        return "cpu"
    ops = name.startswith("groupmamba")
    if asked == "cuda":
        require_gpu(ops=ops)
        return "cuda"
    return "cuda" if gpu_usable(ops=ops) else "cpu"


def main(args: argparse.Namespace) -> int:
    """Prints the table on ``args.model``.

    Raises:
        UsageError: timm has no such model, or it does not take an option.
        CommandError: an extra is missing, the device or the size cannot be had, or the memory does not suffice.
    """
    name, size = args.model, args.size or SIZE
    device = _device(name, args.device)
    half = device == "cuda"
    batch = args.batch or (128 if half else 8)
    options = dict(args.model_kwargs or ())
    model = _create(name, options)
    if not half:
        _check_memory(model, batch, size)
    model.to(device)
    model.to(memory_format=torch.channels_last)
    try:
        count = multiply_adds(model, size)
    except Exception as error:  # models of timm refuse a size with exceptions of any kind
        if is_out_of_memory(error):
            raise
        raise CommandError(f"{name} does not take images of {size} x {size} pixels: {one_line(error)}") from error
    say = functools.partial(print, flush=True)
    by = "" if current_backend() == "auto" else f", GROUPMAMBA_BACKEND={current_backend()}"
    say(", ".join([name, *(f"{key}={value!r}" for key, value in options.items()), f"{size} x {size} pixels{by}"]))
    say(f"  parameters      {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    say(f"  multiply-adds   {count / 1e9:.2f} G an image")
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    autocast = torch.autocast(device, torch.bfloat16, enabled=half)
    kind = "bfloat16 autocast" if half else "float32"

    def infer() -> None:
        with torch.no_grad(), autocast:
            model(x)

    def train() -> None:
        with autocast:
            loss = model(x).float().sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    steps: tuple[tuple[str, bool, Callable[[], None]], ...] = (("inference", False, infer), ("training", True, train))
    for title, mode, step in steps:
        model.train(mode)
        if half:
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = median_seconds(step, SECONDS)
        except Exception as error:  # such as BatchNorm's in training, of one image that became one token
            memory = is_out_of_memory(error)
            reason = "out of memory; a smaller --batch or --size needs less" if memory else one_line(error)
            raise CommandError(
                f"no {title} of {name} with --batch {batch} of {size} x {size} pixels on {device}: {reason}"
            ) from error
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if half else ""
        say(f"  {title:<15} {batch / seconds:,.1f} images/s, {kind}, batch {batch}, {device}{peak}")
    say("  (training: forward and backward, no optimizer)")
    return 0
