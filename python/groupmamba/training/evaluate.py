# SPDX-License-Identifier: Apache-2.0
"""Accuracy of models on a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from groupmamba.training.data import BadImages
from groupmamba.training.distributed import Processes
from groupmamba.training.pixels import Normalize


class Accuracy(NamedTuple):
    """Mean loss, top-1 and top-5 accuracy in percent, and over how many images."""

    loss: float
    top1: float
    top5: float
    images: int


@torch.no_grad()
def accuracies(
    models: Sequence[nn.Module],
    batches: DataLoader,
    normalize: Normalize,
    device: torch.device,
    amp: torch.dtype | None,
    bad: BadImages,
    processes: Processes,
) -> list[Accuracy]:
    """Of each model in evaluation mode, over the images of all processes; those that can't be read don't count."""
    for model in models:
        model.eval()
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=device)
    for batch in batches:
        bad.add(batch.bad)
        images = normalize(batch.images.to(device))
        labels = batch.labels.to(device, non_blocking=True)
        counts = labels >= 0
        for i, model in enumerate(models):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(images)
            logits = logits.float()
            losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            order = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            right = (order[:, :1].any(1) & counts).sum(), (order.any(1) & counts).sum()
            sums[i] += torch.stack([losses.double(), *(n.double() for n in right), counts.sum().double()])
    values = processes.sum(sums).tolist()
    return [
        Accuracy(*(float("nan"),) * 3, 0) if n == 0 else Accuracy(loss / n, 100 * top1 / n, 100 * top5 / n, int(n))
        for loss, top1, top5, n in values
    ]
