# SPDX-License-Identifier: Apache-2.0
"""The engine of all tasks: epochs of steps, validation, checkpoints, and going on where a run stopped."""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor

from groupmamba.training import options, setup
from groupmamba.training.card import RUN_FILES
from groupmamba.training.checkpoint import EMA, MODEL, Checkpoints, read_weights, to_resume
from groupmamba.training.data import Batch
from groupmamba.training.distributed import Processes
from groupmamba.training.graph import capture, graph_passes, settle, why_not
from groupmamba.training.output import (
    STEP_COLUMNS,
    STEPS,
    SUMMARY,
    Board,
    Screen,
    Table,
    draw_curves,
    summary_columns,
    write_args,
)
from groupmamba.training.step import Pieces, Schedule, make_optimizer, put_rates_on
from groupmamba.training.task import Task, tensors_of
from groupmamba_ext._command import CommandError, check_folder

SHOWN_INDICES = 8
VALIDATIONS = 10  # in a run of a task without an interval of its own
STEPS_AHEAD = 3  # that the host may be ahead of the GPU


class NotFinite(CommandError):
    """A loss that is not finite; every process sees it at the same step."""


class Training:
    """A run: everything made and checked by the constructor, and :meth:`fit`.

    Args:
        task: what is trained.
        given: options that the user gave.
        processes: this one among those of the run.
        screen: where lines go.

    Raises:
        UsageError, CommandError: whatever can be known to fail before the first step.
    """

    def __init__(self, task: type[Task], given: dict[str, Any], processes: Processes, screen: Screen):
        self.processes, self.screen = processes, screen
        command = task.command
        known = options.complete({"data": "", **given}, command=command)
        self.resumed: Path | None = None
        self.run = Path(known.output)
        check_folder("--output", self.run)
        saved, state = self._earlier(task, known)
        args = self.args = options.complete(given, saved, command)
        args.output = known.output
        kind = setup.choose_device(args.device, args.model)
        self.device = device = processes.device(kind)
        setup.check_arguments(args, processes, device)
        self.task = task(args, processes, device, screen)
        self.task.check()
        if not processes.agree(0 if state is None else int(state["step"])):
            raise CommandError(f"the processes find different checkpoints: {self.run} must be one folder for all hosts")
        sources = self.task.read()
        setup.check_same_images(sources.training, state)
        if "warmup_epochs" not in given and "warmup_epochs" in command.options:
            usual = command.options["warmup_epochs"].default, command.options["epochs"].default
            if args.warmup_epochs != usual[0]:
                screen.say(
                    f"warm-up: {args.warmup_epochs} of {args.epochs} epochs, in proportion to the recipe's {usual[0]} "
                    f"of {usual[1]}"
                )
        total = None if state is None else int(state["total_batch"])
        even = self.task.even_batches
        setup.settle_batch(args, len(sources.training), even, processes, "batch_size" in given, total, screen)
        model, self.card = self.task.make_model(sources, state is None)
        self.data = setup.make_data(self.task, sources, self.card)
        self.total_batch, self.steps = self.data.order.total, self.data.order.steps
        plan = self.task.plan(self.steps)
        model.to(device).to(memory_format=torch.channels_last)
        criterion = self.task.make_criterion(model, self.card)
        rates = setup.run_rates(args, self.total_batch)
        optimizer = make_optimizer(model, args, rates.lr)
        ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        self.checkpoints = Checkpoints(self.run, args.checkpoint_hist)
        self._prepare_folder(model, ema)
        self.position = {"step": 0, "epoch": 0, "batch": 0}
        self.loss_sum = 0.0
        self.ranking: dict[int, tuple[float, str]] = {}  # metric and better weights of each epoch's last step
        amp = setup.amp_dtype(device, args.amp, args.amp_dtype)
        self.no_graph = self.task.no_graph or why_not(args, device, amp)
        stream = torch.cuda.Stream(device) if self.no_graph is None and processes.world > 1 else None
        self.step = self.task.step(
            model,
            criterion,
            optimizer,
            ema=ema,
            clip=args.clip_grad,
            mode=args.clip_mode,
            amp=amp,
            ema_by_step=args.model_ema_warmup,
            seed=args.seed,
            rank=processes.rank,
            replicas=setup.distribute(model, args, processes, stream),
            stream=stream,
        )
        self.total, self.epochs = plan.total, -(-plan.total // self.steps)
        if self.resumed is not None and state is not None:
            self._restore(self.resumed, state)
        self.schedule = Schedule(args.sched, optimizer, rates, plan)
        self.columns = summary_columns(self.task.columns)
        self.tables = Table(self.run / SUMMARY, self.columns), Table(self.run / STEPS, STEP_COLUMNS)
        self.pending: list[tuple[int, Tensor, float]] = []
        self.interval = args.log_interval
        self.settled = False

    def _earlier(self, task: type[Task], known: argparse.Namespace) -> tuple[dict | None, dict | None]:
        """Options and state of the run that goes on."""
        found = to_resume(known.resume, self.run, known.checkpoint_hist, self.screen.say)
        self.resumed = None if found is None else found[0]
        if found is None:
            return None, None
        checkpoint, state = found
        if state.get("task", "classification") != task.name:
            raise CommandError(f"{checkpoint} is of a run of {state['task']}, not of {task.name}")
        saved = state["options"]
        return {name: value for name, value in saved.items() if name in task.command.options or name == "data"}, state

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
            write_args(self.run, self.args, self.task.command, self.total_batch)

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        step = self.step
        step.model.load_state_dict(read_weights(checkpoint / MODEL))
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
        if self.position["epoch"] < self.epochs:
            at = f"epoch {self.position['epoch'] + 1}, step {self.position['batch']}"
            self.screen.say(f"going on from {checkpoint}: {at}")

    def fit(self) -> int:
        """Trains to the end; 0."""
        self.screen.release()
        if self.no_graph is None:
            self.screen.say("each step is one CUDA graph")
        elif self.device.type == "cuda":
            passes = graph_passes(self.step.model, self.task.graphed, self.args, self.processes.world)
            why = "--no-cuda-graph" if self.args.no_cuda_graph else self.no_graph
            self.screen.say(f"without a CUDA graph: {why}" if passes is None else f"{passes}, not whole steps: {why}")
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
        try:
            for epoch in range(self.position["epoch"], self.epochs):
                self.train_epoch(epoch)
                board.add(self._end_epoch(epoch))
        finally:
            self.step.close()
        better = RUN_FILES[0] if self.ranking else RUN_FILES[1]  # without an object in validation no epoch is the best
        self.screen.say(f"done: {self.run}, {better.partition('.')[0]} weights in {self.run / better}")
        return 0

    def train_epoch(self, epoch: int) -> None:
        args, data = self.args, self.data
        done, steps = self.position["batch"], self._steps_in(epoch)
        self.task.begin_epoch(epoch)
        data.order.begin(epoch, done, steps)
        self.step.train(args.freeze_bn)
        self.screen.begin_epoch(epoch, self.epochs, steps, done)
        batches = self.on_device(iter(data.batches))
        if done == steps:  # a run that ended in the validation
            self.schedule.set(self.position["step"] - 1)
        for batch in range(done, steps):
            step = self.position["step"]
            pieces = [self.task.mixed(next(batches), step, piece) for piece in range(args.grad_accum_steps)]
            lr = self.schedule.set(step)
            if not self.settled:
                settle(self.step, pieces)
                self.settled = True
            if self.no_graph is None and self.step.graph is None:
                self._capture(pieces)
            loss = self.step(step, pieces)
            self.pending.append((step, loss.clone() if self.step.graph is not None else loss, lr))
            self.position.update(step=step + 1, batch=batch + 1)
            inside = batch + 1 < steps
            due = bool(inside and args.checkpoint_steps and (step + 1) % args.checkpoint_steps == 0)
            if due or not inside or len(self.pending) == self.interval:
                self._flush(epoch)
            if due:
                self._save()
        for _ in batches:  # ends the loader's iteration, which has nothing left
            pass
        self.screen.end_epoch()

    def _steps_in(self, epoch: int) -> int:
        """Those of an epoch: the last one may end early."""
        return min(self.steps, self.total - epoch * self.steps)

    def on_device(self, batches: Iterator[Batch]) -> Iterator[tuple[Any, Any]]:
        """Images and labels on the device; on a GPU the next ones are copied while a step runs."""
        cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if cuda else None
        queued: deque[torch.cuda.Event] = deque()  # of steps that the host has launched
        ahead: tuple[Any, Any] | None = None
        for batch in batches:
            self.data.bad.add(batch.bad)
            if batch.incomplete:
                raise CommandError(f"no image of {self.data.sources.training.root} can be read")
            if stream is None:
                yield self.task.to_device(batch)
                continue
            with torch.cuda.stream(stream):
                images, labels = self.task.to_device(batch)
            if ahead is not None:
                yield ahead
                queued.append(torch.cuda.current_stream(self.device).record_event())
                if len(queued) > STEPS_AHEAD:  # what they need stays allocated until they ran
                    queued.popleft().synchronize()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            for tensor in tensors_of([images, labels]):
                tensor.record_stream(torch.cuda.current_stream(self.device))
            ahead = images, labels
        if ahead is not None:
            yield ahead

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
        steps, lr = self._steps_in(epoch), self.pending[-1][2]
        self.screen.report(self.position["batch"], steps, new, images, losses[-1], lr, self.device)
        self.pending.clear()

    def _stop(self, step: int, epoch: int, loss: float) -> None:
        order, found = self.data.order, self.checkpoints.found()
        batch = self.position["batch"] - (self.position["step"] - step)
        indices = order.images_of(epoch, batch)
        listing = self.run / "not_finite.txt"
        if self.processes.first:
            path_of = self.data.sources.training.path_of
            text = "".join(f"{index}\t{path_of(index)}\n" for index in indices)
            listing.write_text(text, errors="surrogateescape")
        shown = ", ".join(map(str, indices[:SHOWN_INDICES])) + (", ..." if len(indices) > SHOWN_INDICES else "")
        good = f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        raise NotFinite(
            f"the loss is {loss} at step {step} (epoch {epoch + 1}), of images {shown} (paths: {listing}); {good}"
        )

    def _save(self) -> None:
        """Writes a checkpoint of where the run is; of all processes."""
        if self.processes.world > 1:
            distribute_bn(self.step.model, self.processes.world, reduce=True)
        if self.processes.first:
            self._write()
        self.processes.barrier()

    def _write(self) -> None:
        """The same, of one process alone."""
        step = self.step
        state = {
            **self.position,
            "loss_sum": self.loss_sum,
            "ranking": self.ranking,
            "total_batch": self.total_batch,
            "task": self.task.name,
            "classes": self.data.sources.training.classes,
            "images": len(self.data.sources.training),
            "options": {n: options.plain(v) for n, v in vars(self.args).items() if v is not None},
            "optimizer": step.optimizer.state_dict(),
            "scaler": None if step.scaler is None else step.scaler.state_dict(),
        }
        average = None if step.ema is None else step.ema.module.state_dict()
        self.checkpoints.write(self.position["step"], step.model.state_dict(), average, self.card, state)
        self.checkpoints.prune(self.ranking)

    def _validate(self) -> list[dict[str, float]]:
        """Metrics of the model, and of its moving average. Where they can't be had, for an annotation that is wrong
        say, what was trained since the last checkpoint is kept: the run goes on with the validation."""
        step, bad = self.step, self.data.bad_in_validation
        models = [step.model] if step.ema is None else [step.model, step.ema.module]
        try:
            found = self.task.evaluate(models, self.data.validation, step.amp, bad)
            bad.found = self.processes.union(bad.found)
            bad.check_some_left()
            return found
        except BaseException:
            if self.processes.first:
                with suppress(Exception):  # what has to be said is what ended the validation
                    self._write()
                    self.screen.say(f"what was trained is kept: started again, {self.run} goes on with this validation")
            raise

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        step, args = self.step, self.args
        if self.processes.world > 1:
            distribute_bn(step.model, self.processes.world, reduce=True)
        self.data.bad.found = self.processes.union(self.data.bad.found)
        row: dict[str, Any] = dict.fromkeys(self.columns, "")
        row.update(epoch=epoch, step=self.position["step"], train_loss=self.loss_sum / self._steps_in(epoch))
        row.update(lr=self.schedule.groups[-1]["lr"], images_per_s=self.screen.speed)
        row.update(seconds=self.screen.seconds, bad_images=len(self.data.bad.found))
        metric = -math.inf
        better = MODEL
        parts = [f"loss {row['train_loss']:.4f}"]
        interval = args.val_interval or max(self.epochs // VALIDATIONS, 1)
        if (epoch + 1) % interval == 0 or epoch + 1 == self.epochs:
            found = self._validate()
            for whose, title, weights, values in zip(("eval", "ema"), ("", "EMA "), (MODEL, EMA), found, strict=False):
                row.update({f"{whose}_{name}": value for name, value in values.items()})
                parts.append(f"{title}{self.task.words(values)}")
                if values[self.task.best] > metric:
                    metric, better = values[self.task.best], weights
        if metric > -math.inf:
            self.ranking[self.position["step"]] = metric, better
        self.position.update(epoch=epoch + 1, batch=0)
        self.loss_sum = 0.0
        if self.processes.first:
            self.tables[0].add([row])
        self._save()
        if self.processes.first:
            self.checkpoints.link_best(self.ranking)
            draw_curves(self.run, self.tables[0].rows(), self.task.panels)
        self.screen.say(f"epoch {epoch + 1}/{self.epochs}: {', '.join(parts)}")
        return row
