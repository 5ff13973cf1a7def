# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that train, in groups: names and meanings of timm's train script, and our own."""

from __future__ import annotations

import argparse
import ast
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from groupmamba.training.recipe import DEFAULTS, RECIPE, TEACHER, Value
from groupmamba_ext._command import UsageError

Convert = Callable[[str], Any]


def number(low: float, high: float = math.inf, *, whole: bool = False, above: bool = False) -> Convert:
    """A type for argparse: finite numbers from ``low``, or ``above`` it, to ``high``."""
    kind = "a whole number" if whole else "a number"
    what = f"{kind} {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        what += f" and at most {high:g}"

    def convert(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be {what}, got {str(text)[:40]!r}")
        return value

    return convert


def path_text(text: str) -> str:
    """A type for argparse: a file or folder; an empty text, of an unset shell variable say, would be the folder that
    the command was started in."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return text


def keyword(text: str) -> tuple[str, Any]:
    """A type for argparse: ``name=value``, the value a Python literal or else text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be name=value, got {text[:40]!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


# Arguments of a model that no --model-kwargs may give, and what settles them.
SETTLED = {
    "model_name": "--model names it",
    "pretrained": "--pretrained asks for it",
    "weights": "--weights names them",
    "checkpoint_path": "--weights names it",
    "num_classes": "it follows from the data or the weights",
    "in_chans": "images are read with 3 channels",
    "features_only": "the command decides on it",
    "out_indices": "the command decides on it",
}


def check_model_kwargs(values: Mapping[str, Any] | None) -> None:
    """UsageError for an argument of the model that the commands settle themselves."""
    for name, value in (values or {}).items():
        if name in SETTLED:
            raise UsageError(f"--model-kwargs {name}={value!r} can't be given: {SETTLED[name]}")


class Option(NamedTuple):
    """One option: its name, what it takes (``bool`` for a switch), and help in words."""

    name: str
    kind: Convert | type[bool] | tuple[str, ...]
    help: str
    default: Any = None
    nargs: int | str | None = None
    short: str | None = None

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")


Groups = Mapping[str, tuple[Option, ...]]


@dataclass(frozen=True)
class Command:
    """A command that trains: its options, with the recipe's defaults, and its short help.

    Args:
        name: as it is called.
        task: what it trains.
        groups: options by the title under which help lists them.
        recipe: defaults, each with its source; of options that are in no recipe the table has the default.
        data: what the argument DATA must be, in words.
        short_help: text of ``--help``.
        check: raises UsageError for options that exclude each other, and settles those that follow from others; gets
            all options, and those that were given, now or when the run began.
        needed: packages beside those of all commands that train.
        prefix: of the default ``--output``, before the model's name.
        presets: other defaults by the value of ``--schedule``.
    """

    name: str
    task: str
    groups: Groups
    recipe: tuple[Value, ...]
    data: str
    short_help: str
    check: Callable[[argparse.Namespace, Mapping[str, Any]], None]
    needed: tuple[str, ...] = ()
    prefix: str = ""
    presets: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    options: dict[str, Option] = field(init=False)

    def __post_init__(self) -> None:
        known = {value.option: value.default for value in self.recipe}
        groups = {
            title: tuple(option._replace(default=known.get(option.dest, option.default)) for option in options)
            for title, options in self.groups.items()
        }
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "options", {option.dest: option for group in groups.values() for option in group})


def chosen(options: Iterable[Option], *names: str) -> tuple[Option, ...]:
    """Those of ``options`` that have these names, in this order."""
    known = {option.name: option for option in options}
    return tuple(known[name] for name in names)


WORKERS = min(4, len(os.sched_getaffinity(0)))  # torch warns of more than there are processors
COUNT, POSITIVE, AT_LEAST_0 = number(0, whole=True), number(1, whole=True), number(0)
SHARE, RATE = number(0, 1), number(0, above=True)

GROUPS: dict[str, tuple[Option, ...]] = {
    "data": (
        Option("img-size", number(32, 4096, whole=True), "pixels of a side"),
        Option("workers", number(0, 1024, whole=True), "processes that load images, for each GPU", WORKERS, short="j"),
        Option("batch-size", POSITIVE, "images a step of each GPU", short="b"),
        Option("validation-batch-size", POSITIVE, "the same in validation; default: --batch-size"),
        Option("max-bad-images", COUNT, "images that can't be read before the run stops", 100),
        Option("pin-mem", bool, "page-locked memory for batches; default: with a GPU"),
    ),
    "model": (
        Option("model", str, "a model of this project or of timm"),
        Option("model-kwargs", keyword, "more arguments of the model, as name=value", None, "*"),
        Option("num-classes", number(2, 1 << 24, whole=True), "default: the number of folders in DATA/train"),
        Option("weights", path_text, "start from a checkpoint, for fine-tuning"),
        Option("pretrained", bool, "start from the model's published weights", False),
        Option("drop", number(0, 0.999), "dropout before the heads"),
        Option("drop-path", number(0, 0.999), "stochastic depth, rising linearly over the blocks to this"),
        Option("grad-checkpointing", bool, "recompute blocks in the backward pass to save memory", False),
        Option("freeze-bn", bool, "BatchNorm in evaluation mode: statistics stay as they are", False),
    ),
    "device": (
        Option("device", ("cpu", "cuda"), "default: a GPU where one can be used"),
        Option("amp", bool, "mixed precision; default: on a GPU"),
        Option("amp-dtype", ("bfloat16", "float16"), "default: bfloat16 where the GPU has it"),
        Option("no-cuda-graph", bool, "launch each kernel of a step on its own", False),
        Option("sync-bn", bool, "BatchNorm statistics over all GPUs", False),
    ),
    "optimizer": (
        Option("opt", str, "an optimizer of timm"),
        Option("opt-eps", RATE, "its epsilon"),
        Option("opt-betas", number(0, 0.9999999), "its betas", None, 2),
        Option("momentum", SHARE, "its momentum, where it has one", 0.9),
        Option("weight-decay", AT_LEAST_0, "of matrices and convolutions"),
        Option("decay-all", bool, "decay A_log and step biases too, as the released code does", False),
        Option("layer-decay", number(0, 1, above=True), "factor of the learning rate from block to block, backwards"),
        Option("clip-grad", AT_LEAST_0, "highest gradient norm; 0 for none"),
        Option("clip-mode", ("norm", "value", "agc"), "what --clip-grad bounds"),
        Option("grad-accum-steps", POSITIVE, "batches a step", 1),
    ),
    "learning rate": (
        Option("sched", ("cosine", "tanh", "poly", "constant"), "schedule, stepped once an update"),
        Option("lr", RATE, "the highest rate, as it is; default: --lr-base scaled by the total batch"),
        Option("lr-base", RATE, "the highest rate at a total batch of --lr-base-size"),
        Option("lr-base-size", POSITIVE, "total batch that --lr-base is for"),
        Option("lr-base-scale", ("linear", "sqrt"), "how it is scaled"),
        Option("warmup-lr", AT_LEAST_0, "first rate; default: 5e-7, scaled like --lr-base"),
        Option("min-lr", AT_LEAST_0, "last rate; default: 5e-6, scaled like --lr-base"),
        Option("epochs", POSITIVE, "passes over the training images, the warm-up's included"),
        Option("warmup-epochs", COUNT, "epochs of linear warm-up; the schedule spans the rest"),
        Option("warmup-prefix", bool, "the warm-up comes before --epochs, not out of them", False),
    ),
    "augmentation": (
        Option("no-aug", bool, "only resize and crop the centre", False),
        Option("scale", number(0, 1, above=True), "area of the random crop", None, 2),
        Option("ratio", RATE, "aspect ratio of the random crop", None, 2),
        Option("hflip", SHARE, "probability of a horizontal flip"),
        Option("vflip", SHARE, "probability of a vertical flip", 0.0),
        Option("color-jitter", AT_LEAST_0, "strength; without effect beside --aa"),
        Option("aa", str, "AutoAugment or RandAugment policy of timm; '' for none"),
        Option("reprob", SHARE, "probability of random erasing"),
        Option("remode", ("const", "rand", "pixel"), "what is put there"),
        Option("recount", POSITIVE, "erased rectangles an image"),
        Option("mixup", AT_LEAST_0, "alpha of mixup; 0 for none"),
        Option("cutmix", AT_LEAST_0, "alpha of CutMix; 0 for none"),
        Option("mixup-prob", SHARE, "probability that a batch is mixed"),
        Option("mixup-switch-prob", SHARE, "probability of CutMix where both are on"),
        Option("mixup-mode", ("batch", "pair", "elem"), "what shares a mixing ratio"),
        Option("mixup-off-epoch", COUNT, "no mixing from this epoch on; 0 for always", 0),
        Option("smoothing", number(0, 0.999), "label smoothing"),
        Option("train-interpolation", ("bicubic", "bilinear", "random"), "in training"),
        Option("interpolation", ("bicubic", "bilinear"), "in validation"),
        Option("crop-pct", number(0, 1, above=True), "part of the image's side seen in validation"),
    ),
    "exponential moving average": (
        Option("model-ema", bool, "keep it"),
        Option("model-ema-decay", number(0, 0.9999999), "its decay"),
        Option("model-ema-warmup", bool, "a smaller decay at the beginning", False),
    ),
    "distillation": (
        Option("no-kd", bool, "without a teacher", False),
        Option("kd-model-name", str, f"teacher, pretrained, of timm; default: {TEACHER} for 1,000 classes, else none"),
        Option("kd-model-path", path_text, "checkpoint of the teacher, which keeps its own number of classes"),
        Option("kd-token-distill-type", ("hard", "soft"), "the teacher's argmax, or its distribution"),
        Option("kd-temperature", RATE, "of the soft form"),
        Option("task-loss-weight", SHARE, "weight of the labels; the teacher has the rest"),
    ),
    "run": (
        Option("output", path_text, "the run's own folder; default: output/MODEL"),
        Option(
            "resume", path_text, "a run's folder or checkpoint to go on from; auto: what --output holds; none", "auto"
        ),
        Option("config", path_text, "read options from a YAML file, such as a run's args.yaml"),
        Option("seed", number(0, (1 << 63) - 1, whole=True), "of everything random", 42),
        Option("log-interval", POSITIVE, "steps from report to report", 50),
        Option("val-interval", POSITIVE, "epochs from validation to validation", 1),
        Option("checkpoint-steps", COUNT, "checkpoints inside an epoch, so many steps apart; 0 for none", 0),
        Option("checkpoint-hist", POSITIVE, "epochs' checkpoints to keep, the best", 10),
    ),
}
# What may differ from one part of a run to the next: nothing of it changes a loss.
# fmt: off
FREE = frozenset((
    "workers", "validation_batch_size", "max_bad_images", "pin_mem", "device", "no_cuda_graph", "batch_size",
    "grad_accum_steps", "output", "resume", "config", "log_interval", "val_interval", "checkpoint_steps",
    "checkpoint_hist", "data", "weights", "pretrained", "multi_scale", "window", "stride",
))
# fmt: on

_SHORT_HELP = f"""\
usage: groupmamba train DATA [options]          (--help-all lists every option)

Train a model on DATA/train/CLASS/IMAGE, checked on DATA/validation (or val), by
the recipe of the paper's released code.

  --model NAME          one of this project or timm [{DEFAULTS["model"]}]
  --weights FILE        start from a checkpoint, for fine-tuning
  --img-size N          pixels of a side [{DEFAULTS["img_size"]}]
  --epochs N            passes over the training images [{DEFAULTS["epochs"]}]
  -b, --batch-size N    images a step of each GPU [{DEFAULTS["batch_size"]}]
  --lr RATE             highest learning rate [{DEFAULTS["lr_base"]:g} x images a step / {DEFAULTS["lr_base_size"]}]
  -j, --workers N       processes that load images [{WORKERS}]
  --no-kd               no teacher ({TEACHER} for 1,000 classes)
  --kd-model-name NAME  another teacher; --kd-model-path FILE: its checkpoint
  --output FOLDER       the run's own; a run found there goes on [output/MODEL]
  --resume PATH         go on from another run; none: begin anew
  --config FILE         options of a run: its args.yaml
  --seed N              of everything random [42]

Many GPUs: torchrun --nproc-per-node N -m groupmamba train DATA [options]
"""


def _check(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    teacher = next((o for o in ("kd_model_name", "kd_model_path") if getattr(args, o) is not None), None)
    if args.no_kd and teacher is not None:
        raise UsageError(f"--no-kd and --{teacher.replace('_', '-')} {getattr(args, teacher)} exclude each other")
    if not args.warmup_prefix and args.warmup_epochs >= args.epochs > 0:
        if "warmup_epochs" in given:
            raise UsageError(
                f"--warmup-epochs {args.warmup_epochs} must be fewer than --epochs {args.epochs}, or come before them "
                f"with --warmup-prefix"
            )
        args.warmup_epochs = args.epochs * DEFAULTS["warmup_epochs"] // DEFAULTS["epochs"]  # type: ignore[operator]
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if low > high:
            raise UsageError(f"--{name} must be two numbers in order, got {low:g} {high:g}")


TRAIN = Command(
    "train",
    "classification",
    GROUPS,
    RECIPE,
    "the folder that holds train/ and validation/ (or val/)",
    _SHORT_HELP,
    _check,
)
