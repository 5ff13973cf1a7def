# SPDX-License-Identifier: Apache-2.0
"""The loss by which the paper trains its models: labels for one head, a teacher's opinion for the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("hard", "soft", "none")


class DistillationLoss(nn.Module):
    r"""Joint loss of labels and a teacher (GroupMamba, arXiv 2407.13772; DeiT, arXiv 2012.12877; the released code).

    .. code-block:: text

        loss = (1 - alpha) * base_criterion(head, labels) + alpha * distance(dist_head, teacher(images))
        "hard"   distance = cross_entropy(dist_head, argmax of the teacher's logits)
        "soft"   distance = tau^2 * KL(softmax(teacher / tau) || softmax(dist_head / tau)), the mean over all numbers
        "none"   loss = base_criterion(head, labels), without a teacher

    The teacher sees the images that the model sees, mixed or not. It is put into evaluation mode, gets no gradient,
    moves along with ``to``, and is no submodule: not in ``parameters()``, ``train()`` or ``state_dict()``.

    Args:
        base_criterion: (batch, classes) logits and labels to a scalar, such as ``nn.CrossEntropyLoss()`` or timm's
            ``SoftTargetCrossEntropy`` for mixed labels.
        teacher: images to (batch, classes) logits; None for ``kind="none"``.
        kind: ``"hard"``, ``"soft"`` or ``"none"``.
        alpha: weight of the teacher, 0 to 1.
        tau: temperature of ``"soft"``, greater than 0.

    Raises:
        TypeError: ``base_criterion`` or ``teacher`` can't be called.
        ValueError: an unknown ``kind``, a weight or temperature out of range, a teacher that is missing.
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Tensor], Tensor],
        teacher: nn.Module | None,
        *,
        kind: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
    ):
        super().__init__()
        if not callable(base_criterion):
            raise TypeError(f"base_criterion must be callable, got {base_criterion!r}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if kind != "none" and teacher is None:
            raise ValueError(f"teacher must be a model for kind={kind!r}, got None")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
        for name, value, fits in (("alpha", alpha, 0 <= alpha <= 1), ("tau", tau, 0 < tau < float("inf"))):
            if isinstance(value, bool) or not fits:
                raise ValueError(f"{name} must be {'0 to 1' if name == 'alpha' else 'greater than 0'}, got {value!r}")
        self.base_criterion = base_criterion
        # No submodule: its parameters are nobody's to train, decay or save.
        self.__dict__["teacher"] = None if kind == "none" or teacher is None else teacher.eval()
        self.kind, self.alpha, self.tau = kind, float(alpha), float(tau)

    teacher: nn.Module | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationLoss:
        """The teacher moves along with ``to``, ``cuda`` and their like."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            images: what the model saw, for the teacher.
            outputs: both heads' logits, (batch, classes) each, as a model returns them in training after
                ``set_distilled_training(True)``; for ``kind="none"`` one head's do.
            labels: what ``base_criterion`` takes.

        Raises:
            ValueError: one output where two are needed, or a teacher of another number of classes.
        """
        head, dist_head = (outputs, None) if isinstance(outputs, Tensor) else outputs
        base = self.base_criterion(head, labels)
        if self.teacher is None:
            return base
        if dist_head is None:
            raise ValueError(
                f"outputs must be the pair (head, dist_head) for kind={self.kind!r}, got one tensor of shape "
                f"{tuple(head.shape)}: call model.set_distilled_training(True) and model.train()"
            )
        with torch.no_grad():
            opinion = self.teacher(images)
        if opinion.shape != dist_head.shape:
            raise ValueError(
                f"teacher must give {tuple(dist_head.shape)} logits like the distillation head, got "
                f"{tuple(opinion.shape)}"
            )
        return (1 - self.alpha) * base + self.alpha * self._distance(dist_head, opinion)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        ours, theirs = (F.log_softmax(logits.float() / self.tau, dim=1) for logits in (student, teacher))
        return F.kl_div(ours, theirs, reduction="sum", log_target=True) * self.tau**2 / student.numel()

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, alpha={self.alpha}, tau={self.tau}"
