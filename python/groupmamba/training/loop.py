# SPDX-License-Identifier: Apache-2.0
"""``groupmamba train``: epochs of steps, validation, checkpoints, and going on where a run stopped."""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor

from groupmamba.training import options, setup, teacher
from groupmamba.training.card import RUN_FILES
from groupmamba.training.checkpoint import EMA, MODEL, Checkpoints, read_weights, to_resume
from groupmamba.training.data import Batch
from groupmamba.training.distillation import DistillationLoss
from groupmamba.training.distributed import Processes
from groupmamba.training.evaluate import accuracies
from groupmamba.training.graph import capture, why_not
from groupmamba.training.output import (
    STEP_COLUMNS,
    STEPS,
    SUMMARY,
    SUMMARY_COLUMNS,
    Board,
    Screen,
    Table,
    draw_curves,
    write_args,
)
from groupmamba.training.seeds import seeded
from groupmamba.training.step import Pieces, Schedule, Step, make_optimizer, put_rates_on
from groupmamba_ext._command import CommandError

SHOWN_INDICES = 8
STEPS_AHEAD = 3  # that the host may be ahead of the GPU


class NotFinite(CommandError):
    """A loss that is not finite; every process sees it at the same step."""


class Training:
    """A run: everything made and checked by the constructor, and :meth:`fit`.

    Args:
        given: options that the user gave.
        processes: this one among those of the run.
        screen: where lines go.

    Raises:
        UsageError, CommandError: whatever can be known to fail before the first step.
    """

    def __init__(self, given: dict[str, Any], processes: Processes, screen: Screen):
        self.processes, self.screen = processes, screen
        known = options.complete({"data": "", **given})
        self.resumed: Path | None = None
        self.run = Path(known.output)
        saved, state = self._earlier(given, known)
        args = self.args = options.complete(given, saved)
        args.output = known.output
        kind = setup.choose_device(args.device, args.model)
        self.device = device = processes.device(kind)
        setup.check_arguments(args, processes, device)
        if not processes.agree(0 if state is None else int(state["step"])):
            raise CommandError(f"the processes find different checkpoints: {self.run} must be one folder for all hosts")
        folders = setup.read_folders(args)
        setup.check_same_images(folders[0], state)
        if "warmup_epochs" not in given and args.warmup_epochs != options.OPTIONS["warmup_epochs"].value:
            screen.say(f"warm-up epochs: {args.warmup_epochs}, which is to {args.epochs} as the recipe's 20 to 300")
        total = None if state is None else int(state["total_batch"])
        setup.settle_batch(args, len(folders[0]), processes, "batch_size" in given, total, screen)
        model, self.card = setup.make_model(args, folders[0].classes, state is None, screen)
        self.data = setup.make_data(args, folders, self.card, processes, device, screen)
        self.total_batch, self.steps = self.data.order.total, self.data.order.steps
        self.mixup = setup.make_mixup(args, self.card.num_classes)
        model.to(device).to(memory_format=torch.channels_last)
        criterion = self._criterion(model)
        rates = setup.run_rates(args, self.total_batch)
        optimizer = make_optimizer(model, args, rates.lr)
        ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        self.checkpoints = Checkpoints(self.run, args.checkpoint_hist)
        self._prepare_folder(model, ema)
        self.position = {"step": 0, "epoch": 0, "batch": 0}
        self.loss_sum = 0.0
        self.ranking: dict[int, tuple[float, str]] = {}  # metric and better weights of each epoch's last step
        amp = setup.amp_dtype(device, args.amp, args.amp_dtype)
        self.no_graph = why_not(args, device, amp)
        stream = torch.cuda.Stream(device) if self.no_graph is None and processes.world > 1 else None
        self.step = Step(
            setup.distribute(model, args, processes, stream),
            criterion,
            optimizer,
            ema=ema,
            clip=args.clip_grad,
            mode=args.clip_mode,
            amp=amp,
            ema_by_step=args.model_ema_warmup,
            seed=args.seed,
            rank=processes.rank,
            stream=stream,
        )
        if self.resumed is not None and state is not None:
            self._restore(self.resumed, state)
        self.schedule = Schedule(args, optimizer, rates, self.steps)
        self.epochs = args.epochs + (args.warmup_epochs if args.warmup_prefix else 0)
        self.tables = Table(self.run / SUMMARY, SUMMARY_COLUMNS), Table(self.run / STEPS, STEP_COLUMNS)
        self.pending: list[tuple[int, Tensor, float]] = []
        self.interval = args.log_interval

    def _earlier(self, given: dict[str, Any], known: argparse.Namespace) -> tuple[dict | None, dict | None]:
        """Options and state of the run that goes on."""
        found = to_resume(known.resume, self.run, known.checkpoint_hist, self.screen.say)
        self.resumed = None if found is None else found[0]
        if found is None:
            return None, None
        saved = found[1]["options"]
        return {name: value for name, value in saved.items() if name in options.OPTIONS or name == "data"}, found[1]

    def _criterion(self, model: Any) -> DistillationLoss:
        args, card = self.args, self.card
        labels = setup.make_criterion(args, self.mixup is not None)
        assert card.classes is not None
        name = teacher.wanted(args, card.num_classes, model, self.screen.say)
        if name is None:
            args.no_kd, args.kd_model_name, args.kd_model_path = True, None, None
            return DistillationLoss(labels, None, kind="none")
        model.set_distilled_training(True)
        knows = teacher.build(name, args.kd_model_path, card.num_classes, card.classes, card.mean, card.std)
        knows.to(self.device).to(memory_format=torch.channels_last)
        return DistillationLoss(
            labels, knows, kind=args.kd_token_distill_type, alpha=1 - args.task_loss_weight, tau=args.kd_temperature
        )

    def _prepare_folder(self, model: Any, ema: object) -> None:
        if self.processes.first:
            self.run.mkdir(parents=True, exist_ok=True)
            self.checkpoints.tidy()
            if self.resumed is None and self.checkpoints.found():
                self.screen.say(f"--resume none: the run in {self.run} is replaced")
                self.checkpoints.tidy(after=-1)
                for name in RUN_FILES:
                    (self.run / name).unlink(missing_ok=True)
            size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
            self.checkpoints.check_space(size, ema is not None)
            write_args(self.run, self.args, self.total_batch)

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        step = self.step
        step.raw.load_state_dict(read_weights(checkpoint / MODEL))
        if step.ema is not None:
            step.ema.module.load_state_dict(read_weights(checkpoint / EMA))
        step.optimizer.load_state_dict(state["optimizer"])
        if self.device.type == "cuda" and any(group.get("capturable") for group in step.optimizer.param_groups):
            put_rates_on(step.optimizer, self.device)
        if step.scaler is not None and state["scaler"] is not None:
            step.scaler.load_state_dict(state["scaler"])
        self.position = {name: int(state[name]) for name in self.position}
        self.loss_sum = float(state["loss_sum"])
        self.ranking = {step: tuple(value) for step, value in state["ranking"].items()}  # type: ignore[misc]
        at = f"epoch {self.position['epoch'] + 1}, step {self.position['batch']}"
        self.screen.say(f"going on from {checkpoint}: {at}")

    def fit(self) -> int:
        """Trains to the end; 0."""
        self.screen.release()
        if self.no_graph is None:
            self.screen.say("each step is one CUDA graph")
        elif self.device.type == "cuda":
            self.screen.say(f"without a CUDA graph: {self.no_graph}")
        if self.processes.first:
            self.checkpoints.link_best(self.ranking)  # a process may have been killed before it did
        if self.position["epoch"] >= self.epochs:
            self.screen.say(f"the run in {self.run} is complete: {self.epochs} epochs")
            return 0
        if self.processes.first:
            self.checkpoints.tidy(after=self.position["step"])
            self.tables[0].begin(self.position["epoch"])
            self.tables[1].begin(self.position["step"])
        board = Board(self.run, self.processes.first)
        for epoch in range(self.position["epoch"], self.epochs):
            self.train_epoch(epoch)
            row = self._end_epoch(epoch)
            board.add(row)
        self.screen.say(f"done: {self.run}, best weights in {self.run / 'best.safetensors'}")
        return 0

    def train_epoch(self, epoch: int) -> None:
        args, data = self.args, self.data
        done = self.position["batch"]
        if self.mixup is not None and args.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < args.mixup_off_epoch
        data.order.begin(epoch, done)
        self.step.train(args.freeze_bn)
        self.screen.begin_epoch(epoch, self.epochs, self.steps, done)
        batches = self.on_device(iter(data.batches))
        for batch in range(done, self.steps):
            step = self.position["step"]
            pieces = [self.mixed(next(batches), step, piece) for piece in range(args.grad_accum_steps)]
            lr = self.schedule.set(step)
            if self.no_graph is None and self.step.graph is None:
                self._capture(pieces)
            loss = self.step(step, pieces)
            self.pending.append((step, loss.clone() if self.step.graph is not None else loss, lr))
            self.position.update(step=step + 1, batch=batch + 1)
            inside = batch + 1 < self.steps
            due = bool(inside and args.checkpoint_steps and (step + 1) % args.checkpoint_steps == 0)
            if due or not inside or len(self.pending) == self.interval:
                self._flush(epoch)
            if due:
                self._save()
        for _ in batches:  # ends the loader's iteration, which has nothing left
            pass
        self.screen.end_epoch()

    def on_device(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels on the device; on a GPU the next ones are copied while a step runs."""
        cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if cuda else None
        queued: deque[torch.cuda.Event] = deque()  # of steps that the host has launched
        ahead: tuple[Tensor, Tensor] | None = None
        for batch in batches:
            self.data.bad.add(batch.bad)
            if (batch.labels < 0).any():
                raise CommandError(f"no image of {self.data.training.root} can be read")
            if stream is None:
                yield self.data.normalize(batch.images), batch.labels
                continue
            with torch.cuda.stream(stream):
                images = self.data.normalize(batch.images.to(self.device))
                labels = batch.labels.to(self.device, non_blocking=True)
            if ahead is not None:
                yield ahead
                queued.append(torch.cuda.current_stream(self.device).record_event())
                if len(queued) > STEPS_AHEAD:  # what they need stays allocated until they ran
                    queued.popleft().synchronize()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            for tensor in (images, labels):
                tensor.record_stream(torch.cuda.current_stream(self.device))
            ahead = images, labels
        if ahead is not None:
            yield ahead

    def mixed(self, batch: tuple[Tensor, Tensor], step: int, piece: int) -> tuple[Tensor, Tensor]:
        if self.mixup is None:
            return batch
        with seeded(self.args.seed, "mixup", step, piece, self.processes.rank):
            return self.mixup(*batch)

    def _capture(self, pieces: Pieces) -> None:
        self.no_graph = capture(self.step, *pieces[0])
        if self.no_graph is not None:
            self.screen.say(f"without a CUDA graph: {self.no_graph}")

    def _flush(self, epoch: int) -> None:
        """Reads the losses of the last steps, of all processes, in one go; stops where one is not finite."""
        if not self.pending:
            return
        losses = self.processes.mean(torch.stack([loss.float() for _, loss, _ in self.pending])).tolist()
        rows = []
        for (step, _, lr), loss in zip(self.pending, losses, strict=True):
            if not math.isfinite(loss):
                self._stop(step, epoch, loss)
            self.loss_sum += loss
            rows.append({"step": step, "epoch": epoch, "loss": repr(loss), "lr": repr(lr)})
        if self.processes.first:
            self.tables[1].add(rows)
        new, images = len(rows), len(rows) * self.total_batch
        self.screen.report(
            self.position["batch"], self.steps, new, images, losses[-1], self.pending[-1][2], self.device
        )
        self.pending.clear()

    def _stop(self, step: int, epoch: int, loss: float) -> None:
        order, found = self.data.order, self.checkpoints.found()
        batch = self.position["batch"] - (self.position["step"] - step)
        indices = order.images_of(epoch, batch)
        listing = self.run / "not_finite.txt"
        if self.processes.first:
            samples = self.data.training.samples
            text = "".join(f"{index}\t{samples[index][0]}\n" for index in indices)
            listing.write_text(text, errors="surrogateescape")
        shown = ", ".join(map(str, indices[:SHOWN_INDICES])) + (", ..." if len(indices) > SHOWN_INDICES else "")
        good = f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        raise NotFinite(
            f"the loss is {loss} at step {step} (epoch {epoch + 1}), of images {shown} (paths: {listing}); {good}"
        )

    def _save(self) -> None:
        """Writes a checkpoint of where the run is."""
        step = self.step
        if self.processes.world > 1:
            distribute_bn(step.raw, self.processes.world, reduce=True)
        if self.processes.first:
            state = {
                **self.position,
                "loss_sum": self.loss_sum,
                "ranking": self.ranking,
                "total_batch": self.total_batch,
                "classes": self.data.classes,
                "images": len(self.data.training),
                "options": {n: options.plain(v) for n, v in vars(self.args).items() if v is not None},
                "optimizer": step.optimizer.state_dict(),
                "scaler": None if step.scaler is None else step.scaler.state_dict(),
            }
            average = None if step.ema is None else step.ema.module.state_dict()
            self.checkpoints.write(self.position["step"], step.raw.state_dict(), average, self.card, state)
            self.checkpoints.prune(self.ranking)
        self.processes.barrier()

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        step, args = self.step, self.args
        if self.processes.world > 1:
            distribute_bn(step.raw, self.processes.world, reduce=True)
        self.data.bad.found = self.processes.union(self.data.bad.found)
        row: dict[str, Any] = dict.fromkeys(SUMMARY_COLUMNS, "")
        row.update(epoch=epoch, step=self.position["step"], train_loss=self.loss_sum / self.steps)
        row.update(lr=self.schedule.groups[-1]["lr"], images_per_s=self.screen.speed)
        row.update(seconds=self.screen.seconds, bad_images=len(self.data.bad.found))
        metric = -math.inf
        better = MODEL
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == self.epochs:
            models = [step.raw] if step.ema is None else [step.raw, step.ema.module]
            bad, batches = self.data.bad_in_validation, self.data.validation
            found = accuracies(models, batches, self.data.normalize, self.device, step.amp, bad, self.processes)
            for title, result in zip(("eval", "ema"), found, strict=False):
                row.update({f"{title}_loss": result.loss, f"{title}_top1": result.top1, f"{title}_top5": result.top5})
                if result.top1 > metric:
                    metric, better = result.top1, MODEL if title == "eval" else EMA
        if metric > -math.inf:
            self.ranking[self.position["step"]] = metric, better
        self.position.update(epoch=epoch + 1, batch=0)
        self.loss_sum = 0.0
        if self.processes.first:
            self.tables[0].add([row])
        self._save()
        if self.processes.first:
            self.checkpoints.link_best(self.ranking)
            draw_curves(self.run, self.tables[0].rows())
        parts = [f"loss {row['train_loss']:.4f}"]
        parts += [f"{t} top-1 {row[c]:.2f}%" for t, c in (("", "eval_top1"), ("EMA", "ema_top1")) if row[c] != ""]
        self.screen.say(f"epoch {epoch + 1}/{self.epochs}: {', '.join(part.strip() for part in parts)}")
        return row
