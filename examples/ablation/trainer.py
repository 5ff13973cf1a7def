# SPDX-License-Identifier: Apache-2.0
"""One training, by the parts that ``groupmamba train`` is made of: a loop of one's own for images on the GPU."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import groupmamba.models  # noqa: F401  registers them with timm
import groupmamba_ext as ext
from ablation.arms import TEACHER_BUDGET, Run, Settings
from ablation.fashion import CLASSES, Batches, Split, shown
from groupmamba import DistillationLoss
from groupmamba.training import options
from groupmamba.training.classification import label_loss
from groupmamba.training.graph import capture, why_not
from groupmamba.training.recipe import DEFAULTS, rates
from groupmamba.training.seeds import seed_of
from groupmamba.training.step import Plan, Schedule, Step, make_optimizer, put_rates_on

TEST_BATCH = 2000
REPORTS = 10  # of a run that is not counted in epochs


class Data(NamedTuple):
    """Fashion-MNIST on the device."""

    train: Split
    test: Split


class Progress(NamedTuple):
    """Where a run is: steps done, of how many, the mean loss of the last of them (None: not finite), test accuracy."""

    step: int
    steps: int
    loss: float | None
    accuracy: float


class Training:
    """A run: all that it needs, made by the constructor, and :meth:`fit`.

    Args:
        run: which one.
        settings: of all runs.
        data: on the device.
        teacher: for a run with distillation: images to (batch, classes) logits.
        checkpoint: a file to go on from, where it is there, and to write where the run is stopped.
        sharing: how many processes the device serves.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        data: Data,
        teacher: nn.Module | None,
        checkpoint: Path,
        sharing: int = 1,
    ):
        self.run, self.settings, self.data, self.checkpoint, self.sharing = run, settings, data, checkpoint, sharing
        self.device = data.train.images.device
        self.batches = Batches(data.train, settings.batch, settings.side, run.seed)
        epochs = settings.epochs * (TEACHER_BUDGET if run.kind == "teacher" else 1)
        self.steps = epochs * len(self.batches) if run.steps is None else run.steps
        self.interval = len(self.batches) if run.steps is None else max(self.steps // REPORTS, 1)
        self.args = options.complete({"data": ""})
        self.model = make_model(run, settings).to(self.device).to(memory_format=torch.channels_last)
        criterion = label_loss(self.args, mixed=False)
        if teacher is None:
            loss = DistillationLoss(criterion, None, kind="none")
        else:
            self.model.set_distilled_training(True)  # type: ignore[operator]
            loss = DistillationLoss(criterion, teacher, kind="hard", alpha=0.5)
        optimizer = make_optimizer(self.model, self.args, run.lr)
        self.amp = torch.bfloat16 if run.arm.amp else None
        self.step = Step(self.model, loss, optimizer, clip=self.args.clip_grad, amp=self.amp, seed=run.seed)
        self.schedule = Schedule(self.args.sched, optimizer, rates(settings.batch, lr=run.lr), self._plan())
        self.no_graph = why_not(self.args, self.device, self.amp)
        self.done = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.not_finite_at: int | None = None
        if checkpoint.is_file():
            self._restore()

    def _plan(self) -> Plan:
        """The recipe's warm-up and cosine over the run's own length."""
        warmup = max(self.steps * DEFAULTS["warmup_epochs"] // DEFAULTS["epochs"], 1)  # type: ignore[operator]
        return Plan(self.steps, warmup, self.steps - warmup, after_warmup=True)

    def fit(self, deadline: float, say: Callable[[Progress], None]) -> dict[str, Any] | None:
        """Trains to the end.

        Args:
            deadline: by ``time.time()``; a run that is not at its end then is stopped.
            say: told after every report.

        Returns:
            What goes into the run's file, or None where the run was stopped and left a checkpoint.
        """
        began = time.monotonic() - self.seconds
        stream = self._stream(self.done)
        while self.done < self.steps and self.not_finite_at is None:
            self._train(stream, min(self.interval, self.steps - self.done))
            say(Progress(self.done, self.steps, self.history[-1]["loss"], self.history[-1]["accuracy"]))
            self.seconds = time.monotonic() - began
            if self.done < self.steps and time.time() > deadline:
                self._save()
                return None
        return self._result()

    def _stream(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from step ``start`` on."""
        epoch, skipped = divmod(start, len(self.batches))
        yield from itertools.islice(self.batches.epoch(epoch), skipped, None)
        for later in itertools.count(epoch + 1):
            yield from self.batches.epoch(later)

    def _train(self, stream: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
        """Takes some steps, reads their losses in one go, and tests the model."""
        self.step.train(freeze_norms=False)
        losses: list[Tensor] = []
        began = 0.0
        for _ in range(steps):
            images, labels = next(stream)
            self.schedule.set(self.done)
            if self.no_graph is None and self.step.graph is None:
                self.no_graph = capture(self.step, images, labels)
            if not losses:
                began = time.monotonic()
            losses.append(self.step(self.done, [(images, labels)]).clone())
            self.done += 1
        values = torch.stack(losses).float().tolist()  # waits for the device
        seconds = time.monotonic() - began
        for i, value in enumerate(values):
            if not math.isfinite(value):
                self.not_finite_at = self.done - steps + i
                break
        mean = sum(values) / steps
        report = {
            "step": self.done,
            "loss": mean if math.isfinite(mean) else None,  # JSON has no nan
            "accuracy": accuracy(self.model, self.data.test, self.settings.side, self.amp),
            "images_per_s": steps * self.settings.batch / seconds,
        }
        self.history.append(report)

    def _result(self) -> dict[str, Any]:
        run = self.run
        speeds = sorted(report["images_per_s"] for report in self.history[1:] or self.history)
        return {
            "run": run.name,
            "kind": run.kind,
            "arm": run.arm.name,
            "seed": run.seed,
            "lr": run.lr,
            "steps": self.steps,
            "accuracy": self.history[-1]["accuracy"],
            "not_finite_at": self.not_finite_at,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "images_per_s": speeds[len(speeds) // 2],
            "processes_on_device": self.sharing,
            "graph": self.no_graph is None,
            "no_graph": self.no_graph,
            "seconds": self.seconds,
            "history": self.history,
            "settings": self.settings.as_json(),
            "device": device_name(self.device),
            "versions": {"groupmamba": ext.__version__, "torch": torch.__version__, "timm": timm.__version__},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "history": self.history,
            "settings": self.settings.as_json(),
        }
        beside = self.checkpoint.with_name(f".{self.checkpoint.name}")
        torch.save(state, beside)
        os.replace(beside, self.checkpoint)

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings.as_json():
            return  # of other settings: the run begins again
        self.model.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        if self.device.type == "cuda":
            put_rates_on(self.step.optimizer, self.device)
        self.done, self.seconds, self.history = state["done"], state["seconds"], state["history"]


def make_model(run: Run, settings: Settings) -> nn.Module:
    """The model of a run, by its seed."""
    torch.manual_seed(seed_of(run.seed, "model"))
    if run.kind == "teacher":
        return timm.create_model(settings.teacher, num_classes=CLASSES)
    name = settings.large if run.kind == "large" else settings.model
    given = {**run.arm.options, **settings.model_options}
    return timm.create_model(name, num_classes=CLASSES, drop_path_rate=DEFAULTS["drop_path"], **given)


@torch.no_grad()
def accuracy(model: nn.Module, test: Split, side: int, amp: torch.dtype | None) -> float:
    """Top-1 in percent, in evaluation mode: of this project's models the mean of both heads."""
    model.eval()
    device = test.images.device
    right = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in zip(test.images.split(TEST_BATCH), test.labels.split(TEST_BATCH), strict=True):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(shown(images, side))
        right += (logits.argmax(1) == labels).sum()
    return 100 * right.item() / len(test)


def save_teacher(model: nn.Module, file: Path) -> None:
    """Writes the teacher's weights, in one step."""
    beside = file.with_name(f".{file.name}")
    safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, beside)
    os.replace(beside, file)


def load_teacher(settings: Settings, file: Path, device: torch.device) -> nn.Module:
    """The teacher in evaluation mode."""
    model = timm.create_model(settings.teacher, num_classes=CLASSES)
    model.load_state_dict(safetensors.torch.load_file(file))
    model.eval().requires_grad_(False)
    return model.to(device).to(memory_format=torch.channels_last)


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``"CPU"``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
