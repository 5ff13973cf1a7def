# SPDX-License-Identifier: Apache-2.0
"""What is compared: the arms, the runs that they take, and what all runs have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

RELEASED_ORDER = ("lr", "tb", "rl", "bt")
EIGHT_DIMS = (64, 128, 352, 448)  # GroupMamba-T's 348 channels are no multiple of 8
EIGHTFOLD = RELEASED_ORDER * 2
TEACHER_BUDGET = 3  # times an arm's epochs: in as many as an arm has, RegNetY stays below what it is to teach


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained.

    Args:
        name: of its files.
        title: of its rows.
        options: of ``timm.create_model``.
        distilled: with hard distillation, weight 0.5, from the teacher.
        amp: under bfloat16 autocast, else in float32 without TF32.
    """

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = False
    amp: bool = True


def _groups(count: int) -> Arm:
    title = f"{count} group{'s' if count > 1 else ''}"
    return Arm(f"groups{count}", title, {"dims": EIGHT_DIMS, "directions": EIGHTFOLD[:count]})


ARMS = {
    arm.name: arm
    for arm in (
        Arm("paper", "variant `paper`", {"variant": "paper"}),
        Arm("float32", "float32", amp=False),
        Arm("four-d", "4-D scanning", {"scan": "cross", "affinity": False}),
        Arm("grouped", "grouped scanning", {"affinity": False}),
        Arm("affinity", "grouped + CAM"),  # what create_model gives: a part of every comparison
        Arm("distilled", "grouped + CAM + hard distillation", distilled=True),
        Arm("gate-output", "gate by the scan's output", {"gate_source": "output"}),
        Arm("fused", "variant `fused`", {"variant": "fused"}),
        *(_groups(count) for count in (1, 2, 4, 8)),
    )
}


@dataclass(frozen=True)
class Comparison:
    """Rows of one table. Each arm's difference is to ``reference``, or to the row above where there is none."""

    name: str
    title: str
    rows: Mapping[str, str]  # arms' names to titles
    reference: str | None = None


def _rows(*names: str, **titles: str) -> dict[str, str]:
    return {name: titles.get(name.replace("-", "_"), ARMS[name].title) for name in names}


COMPARISONS = (
    Comparison("parts", "The paper's steps", _rows("four-d", "grouped", "affinity", "distilled")),
    Comparison(
        "groups",
        "Groups, at 64, 128, 352, 448 channels",
        _rows("groups1", "groups2", "groups4", "groups8"),
        "groups4",
    ),
    Comparison(
        "gate",
        "What the gate is computed from",
        _rows("grouped", "gate-output", "affinity", grouped="no gate", affinity="gate by the layer's input (CAM)"),
        "affinity",
    ),
    Comparison(
        "variants",
        "Variants of the layer",
        _rows("affinity", "fused", "paper", affinity="variant `released`"),
        "affinity",
    ),
    Comparison("precision", "Precision", _rows("affinity", "float32", affinity="bfloat16 autocast"), "affinity"),
)
PAPER = {"four-d": 82.30, "grouped": 82.20, "affinity": 82.50, "distilled": 83.30}  # top-1 on ImageNet-1K, GroupMamba-T


@dataclass(frozen=True)
class Settings:
    """What all runs in a folder have in common.

    Args:
        epochs: of each run of an arm; the teacher has `TEACHER_BUDGET` times as many.
        batch: images a step.
        lr: the highest learning rate of the arms.
        seeds: how many; the first is 0.
        side: pixels of a side.
        model, large, teacher: names of timm: of the arms, of the runs at rising rates, of the teacher.
        model_options: more options of the first two, for models in little.
        rates: highest learning rates of the large model, each tried when not all seeds failed at the one before.
        large_steps: of each of its runs.
    """

    epochs: int = 10
    batch: int = 256
    lr: float = 1e-3
    seeds: int = 3
    side: int = 64
    model: str = "groupmamba_tiny"
    large: str = "groupmamba_base"
    teacher: str = "regnety_016"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    large_steps: int = 300

    def as_json(self) -> dict[str, Any]:
        """For a run's file: what json gives back of it is equal to it."""
        values = asdict(self)
        values["rates"] = list(self.rates)
        values["model_options"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.model_options.items()}
        return values


QUICK = Settings(
    epochs=2,
    batch=16,
    seeds=2,
    side=32,
    model_options={"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "stem_dim": 8, "mlp_ratios": (2, 2, 2, 2)},
    teacher="test_resnet",
    rates=(1e-3, 1e-1),
    large_steps=4,
)


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: of its files.
        kind: ``"teacher"``, ``"arm"`` or ``"large"``.
        arm: what is trained; its name is ``"teacher"`` or ``"large"`` for these.
        seed: of everything random.
        lr: highest learning rate.
        steps: None: whole epochs.
    """

    name: str
    kind: str
    arm: Arm
    seed: int
    lr: float
    steps: int | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.arm.distilled


LARGE = tuple(
    Arm(f"large-{'distilled' if distilled else 'plain'}", title, {"variant": "paper"}, distilled=distilled)
    for distilled, title in ((False, "labels alone"), (True, "with hard distillation"))
)


LEARNT = {arm.name for arm in (*ARMS.values(), *LARGE) if arm.distilled}  # from a teacher


def teacher_run(settings: Settings) -> Run:
    """The run that makes the teacher of all others."""
    return Run("teacher", "teacher", Arm("teacher", f"teacher ({settings.teacher})"), 0, settings.lr)


def arm_runs(settings: Settings, names: tuple[str, ...] = tuple(ARMS)) -> Iterator[Run]:
    """Runs of the arms: those that take longest first, the seeds of an arm together."""
    for name, seed in itertools.product(names, range(settings.seeds)):
        yield Run(f"{name}-{seed}", "arm", ARMS[name], seed, settings.lr)


def large_runs(settings: Settings, rate: float) -> Iterator[Run]:
    """Runs of the large model at one highest learning rate, without and with a teacher."""
    for arm, seed in itertools.product(LARGE, range(settings.seeds)):
        yield Run(f"{arm.name}-{rate:g}-{seed}", "large", arm, seed, rate, settings.large_steps)
