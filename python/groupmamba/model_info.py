# SPDX-License-Identifier: Apache-2.0
"""What `groupmamba info MODEL` prints: parameters, multiply-adds, throughput and memory of a model."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SECONDS = 2.0  # of measuring for each figure


def multiply_adds(model: nn.Module, size: int) -> float:
    """Of one image, half of what torch's FLOP counter counts: products, convolutions, and the scan's recurrence."""
    device = next(model.parameters()).device
    model.cpu().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    model.to(device)
    return counter.get_total_flops() / 2


def _median_seconds(step, device: str) -> float:
    def timed() -> float:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()  # warms up
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        times.append(timed())
    return statistics.median(times)


def describe(name: str, batch: int, size: int, device: str) -> int:
    """Prints a table on the model ``name``; returns 1 with a message where it can't."""
    try:
        import timm

        import groupmamba.models  # noqa: F401  registers the models
    except ImportError as error:
        print(f"groupmamba info {name}: {error}")
        return 1
    if not timm.is_model(name):
        names = ", ".join(timm.list_models("groupmamba*"))
        print(f"groupmamba info: MODEL must be one of {names}, or any other model of timm, got {name!r}")
        return 1
    model = timm.create_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}, {size} x {size} pixels")
    print(f"  parameters      {parameters / 1e6:.2f} M")
    print(f"  multiply-adds   {multiply_adds(model, size) / 1e9:.2f} G an image")
    half = device == "cuda"
    model.to(device, memory_format=torch.channels_last)
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

    for title, mode, step in (("inference", False, infer), ("training", True, train)):
        model.train(mode)
        if half:
            torch.cuda.reset_peak_memory_stats()
        seconds = _median_seconds(step, device)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if half else ""
        print(f"  {title:<15} {batch / seconds:,.1f} images/s, {kind}, batch {batch}, {device}{memory}")
    print("  (training: forward and backward, no optimizer)")
    return 0
