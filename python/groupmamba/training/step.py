# SPDX-License-Identifier: Apache-2.0
"""One step of training: forward, loss, backward, clipping, optimizer, moving average.

What a step draws follows from (seed, step, rank), and its learning rate from the step, so nothing random needs to be
kept in a checkpoint, and a CUDA graph draws what the step launched kernel by kernel draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
)
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from groupmamba.layers import no_weight_decay
from groupmamba.training.recipe import Rates
from groupmamba.training.replicas import Replicas
from groupmamba.training.seeds import seed_device
from groupmamba_ext._command import UsageError, one_line

GRAPHED = ("adam", "adamw")  # optimizers whose state begins with zeros, whose rate may be a tensor
_POSITIONS = ("relative_position_bias_table", "absolute_pos_embed")  # of Swin; inside a detector nobody else names them
_DECAYED_BY_RELEASED = ("A_log", "dt_bias")

Pieces = Sequence[tuple[Tensor, Tensor]]  # images and labels, one pair for each batch of a step


def make_optimizer(model: nn.Module, args: argparse.Namespace, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer with timm's groups of parameters; on a GPU the rate of Adam is a tensor there.

    Raises:
        UsageError: timm has no such optimizer, or it can't be made so.
    """
    kept = set(getattr(model, "no_weight_decay", lambda: no_weight_decay(model))())
    kept |= {name for name, _ in model.named_parameters() if name.endswith(_POSITIONS)}
    if args.decay_all:
        kept = {name for name in kept if name.rpartition(".")[2] not in _DECAYED_BY_RELEASED}
    if args.layer_decay is not None:
        groups = param_groups_layer_decay(
            model, weight_decay=args.weight_decay, layer_decay=args.layer_decay, no_weight_decay_list=kept
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=args.weight_decay, no_weight_decay_list=kept)
    device = next(model.parameters()).device
    options: dict[str, Any] = {"eps": args.opt_eps, "betas": tuple(args.opt_betas), "momentum": args.momentum}
    on_device = device.type == "cuda" and args.opt.lower() in GRAPHED
    if on_device:
        options.update(fused=True, capturable=True)
    try:
        optimizer = create_optimizer_v2(groups, args.opt, lr=lr, weight_decay=0.0, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--opt {args.opt} can't be made: {one_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"--opt {args.opt} needs second derivatives, which a step here does not keep")
    if on_device:
        optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # steps without a graph too
        put_rates_on(optimizer, device)
    return optimizer


def put_rates_on(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Each group's learning rate becomes a tensor on the device, to be filled in place."""
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), device=device)


class Graph(Protocol):
    """A captured step."""

    def __call__(self, images: Any, labels: Any) -> Tensor: ...

    def close(self) -> None: ...


class Plan(NamedTuple):
    """The steps of a run.

    Args:
        total: how many there are.
        warmup: those of the warm-up, which are the first.
        span: those over which the schedule goes.
        after_warmup: the schedule begins where the warm-up ends, not at the first step.
        options: more arguments of timm's scheduler.
    """

    total: int
    warmup: int
    span: int
    after_warmup: bool
    options: Mapping[str, Any] = {}


class Schedule:
    """timm's schedule, stepped once an update. It sees groups of its own, since it replaces the rates in them."""

    def __init__(self, kind: str, optimizer: torch.optim.Optimizer, rates: Rates, plan: Plan):
        self.optimizer = optimizer
        scales = [{"lr_scale": group["lr_scale"]} if "lr_scale" in group else {} for group in optimizer.param_groups]
        self.groups = [{"lr": rates.lr, **scale} for scale in scales]
        shadow: Any = SimpleNamespace(param_groups=self.groups)
        common: dict[str, Any] = {
            "warmup_t": plan.warmup,
            "warmup_lr_init": rates.warmup_lr,
            "warmup_prefix": plan.after_warmup,
            "t_in_epochs": False,
            **plan.options,
        }
        self.scheduler: Scheduler
        if kind == "constant":
            self.scheduler = StepLRScheduler(shadow, decay_t=1, decay_rate=1.0, **common)
        elif kind == "multistep":
            self.scheduler = MultiStepLRScheduler(shadow, **common)
        else:
            kinds: dict[str, Any] = {"cosine": CosineLRScheduler, "tanh": TanhLRScheduler, "poly": PolyLRScheduler}
            self.scheduler = kinds[kind](shadow, t_initial=max(plan.span, 2), lr_min=rates.min_lr, **common)

    def set(self, step: int) -> float:
        """Puts the rate of ``step`` into the optimizer, and returns that of the last group, before its scale."""
        self.scheduler.step_update(step)
        for group, ours in zip(self.optimizer.param_groups, self.groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(ours["lr"])
            else:
                group["lr"] = ours["lr"]
        return self.groups[-1]["lr"] / self.groups[-1].get("lr_scale", 1.0)


class Step:
    """Forward, loss, backward, clipping, optimizer and moving average of one step.

    Args:
        model: in training mode.
        criterion: (images, output, labels) to a scalar, such as a DistillationLoss.
        optimizer: of its parameters.
        ema: moving average of the model, or None.
        clip, mode: as for ``timm.utils.dispatch_clip_grad``; 0 for none.
        amp: the dtype of autocast, or None.
        ema_by_step: the average's decay depends on the step.
        seed, rank: what the steps draw from.
        replicas: of the model, where there are several processes.
        stream: on which they were made, for a graph to be captured on.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ema: ModelEmaV3 | None = None,
        clip: float = 0.0,
        mode: str = "norm",
        amp: torch.dtype | None = None,
        ema_by_step: bool = False,
        seed: int = 0,
        rank: int = 0,
        replicas: Replicas | None = None,
        stream: torch.cuda.Stream | None = None,
    ):
        self.model, self.criterion, self.optimizer, self.ema = model, criterion, optimizer, ema
        self.clip, self.mode, self.amp, self.ema_by_step = clip, mode, amp, ema_by_step
        self.seed, self.rank, self.replicas, self.stream = seed, rank, replicas, stream
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type) if amp == torch.float16 else None
        self.graph: Graph | None = None  # replays `body`

    def __call__(self, step: int, pieces: Pieces) -> Tensor:
        """Takes step number ``step``; its loss, a scalar on the device that the next step may overwrite."""
        seed_device(self.device, self.seed, "step", step, self.rank)
        loss = self.graph(*pieces[0]) if self.graph is not None and len(pieces) == 1 else self.body(pieces)
        if self.ema is not None and self.ema_by_step:
            self.ema.update(self.model, step=step + 1)
        return loss

    def body(self, pieces: Pieces) -> Tensor:
        """All that a graph captures: no value is read back to the host."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.replicas is not None:
            self.replicas.begin()
        total: Tensor | None = None
        for i, (images, labels) in enumerate(pieces):
            with self._gradients_stay_local(i + 1 < len(pieces)):
                loss = self._loss(images, labels) / len(pieces)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        if self.replicas is not None:
            self.replicas.finish()
        self._update()
        if self.ema is not None and not self.ema_by_step:
            self.ema.update(self.model)
        return total

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        # Without the cache a graph and single launches compute the same; a captured cast must not outlive its graph.
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None, cache_enabled=False):
            return self.criterion(images, self.model(images), labels)

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager:
        return self.replicas.local() if local and self.replicas is not None else nullcontext()

    def _update(self) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip > 0:
            dispatch_clip_grad(list(self.model.parameters()), self.clip, mode=self.mode)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def close(self) -> None:
        """Releases the graph. NCCL's communicators can't be destroyed while a graph holds them."""
        if self.graph is not None:
            self.graph.close()
            self.graph = None

    def train(self, freeze_norms: bool) -> None:
        """Training mode; BatchNorm in evaluation mode where it is frozen."""
        self.model.train()
        self.criterion.train()
        if freeze_norms:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
