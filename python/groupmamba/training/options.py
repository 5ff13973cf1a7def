# SPDX-License-Identifier: Apache-2.0
"""The options of ``groupmamba train``: names and meanings of timm's train script, and some of this project's own.

argparse keeps what was given and nothing else, so that a default, a configuration file and a run that goes on can each
fill in the rest, in this order of weight: the command line, ``--config``, the run's own args.yaml, the recipe.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from groupmamba.training.recipe import DEFAULTS, TEACHER
from groupmamba_ext._command import UsageError, one_line

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


def keyword(text: str) -> tuple[str, Any]:
    """A type for argparse: ``name=value``, the value a Python literal or else text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be name=value, got {text[:40]!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


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

    @property
    def value(self) -> Any:
        """The default: the recipe's where it has one."""
        return DEFAULTS.get(self.dest, self.default)


_COUNT, _POSITIVE, _AT_LEAST_0 = number(0, whole=True), number(1, whole=True), number(0)
_SHARE, _RATE = number(0, 1), number(0, above=True)

GROUPS: dict[str, tuple[Option, ...]] = {
    "data": (
        Option("img-size", number(32, 4096, whole=True), "pixels of a side"),
        Option("workers", number(0, 1024, whole=True), "processes that load images, for each GPU", 4, short="j"),
        Option("batch-size", _POSITIVE, "images a step of each GPU", short="b"),
        Option("validation-batch-size", _POSITIVE, "the same in validation; default: --batch-size"),
        Option("max-bad-images", _COUNT, "images that can't be read before the run stops", 100),
        Option("pin-mem", bool, "page-locked memory for batches; default: with a GPU"),
    ),
    "model": (
        Option("model", str, "a model of this project or of timm"),
        Option("model-kwargs", keyword, "more arguments of the model, as name=value", None, "*"),
        Option("num-classes", number(2, 1 << 24, whole=True), "default: the number of folders in DATA/train"),
        Option("weights", str, "start from a checkpoint, for fine-tuning"),
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
        Option("opt-eps", _RATE, "its epsilon"),
        Option("opt-betas", number(0, 0.9999999), "its betas", None, 2),
        Option("momentum", _SHARE, "its momentum, where it has one", 0.9),
        Option("weight-decay", _AT_LEAST_0, "of matrices and convolutions"),
        Option("decay-all", bool, "decay A_log and step biases too, as the released code does", False),
        Option("layer-decay", number(0, 1, above=True), "factor of the learning rate from block to block, backwards"),
        Option("clip-grad", _AT_LEAST_0, "highest gradient norm; 0 for none"),
        Option("clip-mode", ("norm", "value", "agc"), "what --clip-grad bounds"),
        Option("grad-accum-steps", _POSITIVE, "batches a step", 1),
    ),
    "learning rate": (
        Option("sched", ("cosine", "tanh", "poly", "constant"), "schedule, stepped once an update"),
        Option("lr", _RATE, "the highest rate, as it is; default: --lr-base scaled by the total batch"),
        Option("lr-base", _RATE, "the highest rate at a total batch of --lr-base-size"),
        Option("lr-base-size", _POSITIVE, "total batch that --lr-base is for"),
        Option("lr-base-scale", ("linear", "sqrt"), "how it is scaled"),
        Option("warmup-lr", _AT_LEAST_0, "first rate; default: 5e-7, scaled like --lr-base"),
        Option("min-lr", _AT_LEAST_0, "last rate; default: 5e-6, scaled like --lr-base"),
        Option("epochs", _POSITIVE, "passes over the training images, the warm-up's included"),
        Option("warmup-epochs", _COUNT, "epochs of linear warm-up; the schedule spans the rest"),
        Option("warmup-prefix", bool, "the warm-up comes before --epochs, not out of them", False),
    ),
    "augmentation": (
        Option("no-aug", bool, "only resize and crop the centre", False),
        Option("scale", number(0, 1, above=True), "area of the random crop", None, 2),
        Option("ratio", _RATE, "aspect ratio of the random crop", None, 2),
        Option("hflip", _SHARE, "probability of a horizontal flip"),
        Option("vflip", _SHARE, "probability of a vertical flip", 0.0),
        Option("color-jitter", _AT_LEAST_0, "strength; without effect beside --aa"),
        Option("aa", str, "AutoAugment or RandAugment policy of timm; '' for none"),
        Option("reprob", _SHARE, "probability of random erasing"),
        Option("remode", ("const", "rand", "pixel"), "what is put there"),
        Option("recount", _POSITIVE, "erased rectangles an image"),
        Option("mixup", _AT_LEAST_0, "alpha of mixup; 0 for none"),
        Option("cutmix", _AT_LEAST_0, "alpha of CutMix; 0 for none"),
        Option("mixup-prob", _SHARE, "probability that a batch is mixed"),
        Option("mixup-switch-prob", _SHARE, "probability of CutMix where both are on"),
        Option("mixup-mode", ("batch", "pair", "elem"), "what shares a mixing ratio"),
        Option("mixup-off-epoch", _COUNT, "no mixing from this epoch on; 0 for always", 0),
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
        Option("kd-model-path", str, "checkpoint of the teacher, which keeps its own number of classes"),
        Option("kd-token-distill-type", ("hard", "soft"), "the teacher's argmax, or its distribution"),
        Option("kd-temperature", _RATE, "of the soft form"),
        Option("task-loss-weight", _SHARE, "weight of the labels; the teacher has the rest"),
    ),
    "run": (
        Option("output", str, "the run's own folder; default: output/MODEL"),
        Option("resume", str, "a run's folder or checkpoint to go on from; auto: what --output holds; none", "auto"),
        Option("config", str, "read options from a YAML file, such as a run's args.yaml"),
        Option("seed", number(0, (1 << 63) - 1, whole=True), "of everything random", 42),
        Option("log-interval", _POSITIVE, "steps from report to report", 50),
        Option("val-interval", _POSITIVE, "epochs from validation to validation", 1),
        Option("checkpoint-steps", _COUNT, "checkpoints inside an epoch, so many steps apart; 0 for none", 0),
        Option("checkpoint-hist", _POSITIVE, "epochs' checkpoints to keep, the best", 10),
    ),
}
OPTIONS = {option.dest: option for group in GROUPS.values() for option in group}

# What may differ from one part of a run to the next: nothing of it changes a loss.
# fmt: off
FREE = frozenset((
    "workers", "validation_batch_size", "max_bad_images", "pin_mem", "device", "no_cuda_graph", "batch_size",
    "grad_accum_steps", "output", "resume", "config", "log_interval", "val_interval", "checkpoint_steps",
    "checkpoint_hist", "data", "weights", "pretrained",
))
# fmt: on

SHORT_HELP = f"""\
usage: groupmamba train DATA [options]          (--help-all lists every option)

Train a model on DATA/train/CLASS/IMAGE, checked on DATA/validation (or val), by
the recipe of the paper's released code.

  --model NAME          one of this project or timm [{DEFAULTS["model"]}]
  --weights FILE        start from a checkpoint, for fine-tuning
  --img-size N          pixels of a side [{DEFAULTS["img_size"]}]
  --epochs N            passes over the training images [{DEFAULTS["epochs"]}]
  -b, --batch-size N    images a step of each GPU [{DEFAULTS["batch_size"]}]
  --lr RATE             highest learning rate [{DEFAULTS["lr_base"]:g} x images a step / {DEFAULTS["lr_base_size"]}]
  -j, --workers N       processes that load images [4]
  --no-kd               no teacher ({TEACHER} for 1,000 classes)
  --kd-model-name NAME  another teacher; --kd-model-path FILE: its checkpoint
  --output FOLDER       the run's own; a run found there goes on [output/MODEL]
  --resume PATH         go on from another run; none: begin anew
  --config FILE         options of a run: its args.yaml
  --seed N              of everything random [42]

Many GPUs: torchrun --nproc-per-node N -m groupmamba train DATA [options]
"""


class _Show(argparse.Action):
    """Prints a text, or all options, and leaves."""

    def __init__(self, option_strings: list[str], dest: str, text: str | None = None, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, 0, help=options["help"])
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        print((self.text or parser.format_help()).rstrip())
        parser.exit()


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:.4g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``groupmamba train``; the parser must have been made with ``add_help=False``."""
    parser.usage = "groupmamba train DATA [options]"
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("-h", "--help", action=_Show, text=SHORT_HELP, help="the options that people use")
    parser.add_argument("--help-all", action=_Show, help="every option")
    parser.add_argument("data", nargs="?", metavar="DATA", default=argparse.SUPPRESS, help="holds train/ and val/")
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            names = [f"--{option.name}", *([f"-{option.short}"] if option.short else [])]
            known = option.value is not None and option.kind is not bool and option.value != ""
            text = f"{option.help} [{_shown(option.value)}]" if known else option.help
            text = text.replace("%", "%%")
            if option.kind is bool:
                plain = option.name.startswith("no-")
                action: Any = "store_true" if plain else argparse.BooleanOptionalAction
                group.add_argument(*names, action=action, default=argparse.SUPPRESS, help=text)
            elif isinstance(option.kind, tuple):
                group.add_argument(*names, choices=option.kind, help=text)
            else:
                metavar = "NAME=VALUE" if option.kind is keyword else "X" if option.kind is not str else "TEXT"
                group.add_argument(*names, type=option.kind, nargs=option.nargs, metavar=metavar, help=text)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, and beside it what ``--config`` says.

    Raises:
        UsageError: the file can't be read, or names an option or a value that isn't one.
    """
    values = {name: value for name, value in vars(args).items() if name in OPTIONS or name == "data"}
    if "model_kwargs" in values:
        values["model_kwargs"] = dict(values["model_kwargs"])
    file = values.pop("config", None)
    return values if file is None else {**read_yaml(file), **values}


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Options of a YAML file, checked as if they stood on the command line.

    Raises:
        UsageError: the file can't be read, or names an option or a value that isn't one.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config: {str(file)!r} must map options to values, got {type(values).__name__}")
    return {name: _checked(str(file), name, value) for name, value in values.items() if value is not None}


def _checked(file: str, name: object, value: Any) -> Any:
    option = OPTIONS.get(str(name).replace("-", "_"))
    if name == "data" and isinstance(value, str):
        return value
    if option is None:
        raise UsageError(f"--config: {file!r} has an unknown option {name!r}")
    fits: bool
    if option.kind is bool:
        fits = isinstance(value, bool)
    elif isinstance(option.kind, tuple):
        fits = value in option.kind
    elif option.kind is keyword:
        fits = isinstance(value, dict)
        value = _tuples(value)
    elif isinstance(option.nargs, int):
        fits = isinstance(value, (list, tuple)) and len(value) == option.nargs
        if fits:
            value = tuple(_checked_one(file, option, v) for v in value)
    else:
        fits, value = True, _checked_one(file, option, value)
    if not fits:
        raise UsageError(f"--config: {file!r} has a wrong value for {option.dest}: {value!r}")
    return value


def _checked_one(file: str, option: Option, value: object) -> Any:
    assert not isinstance(option.kind, tuple)
    if isinstance(value, (bool, list, dict)) or (option.kind is str and not isinstance(value, str)):
        raise UsageError(f"--config: {file!r} has a wrong value for {option.dest}: {value!r}")
    try:
        return option.kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--config: {file!r}, {option.dest} {error}") from error


def _tuples(value: Any) -> Any:
    """YAML has lists where Python literals have tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The other way round, for files."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def complete(values: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """All options: those given, those of the run that goes on, and defaults.

    Raises:
        UsageError: options that exclude each other, or one that the run that goes on has another value for.
    """
    earlier = {} if earlier is None else dict(earlier)
    for name, value in values.items():
        if name in FREE or name not in earlier:
            continue
        if _tuples(earlier[name]) != _tuples(value if not isinstance(value, tuple) else list(value)):
            raise UsageError(
                f"--{name.replace('_', '-')} {_shown(value)} differs from the {_shown(earlier[name])} of the run that "
                f"goes on: leave it out, or choose another --output, or --resume none to begin anew"
            )
    defaults = {option.dest: option.value for option in OPTIONS.values()}
    args = argparse.Namespace(**{"data": None, **defaults, **earlier, **values})
    if args.data is None:
        raise UsageError("DATA is missing: the folder that holds train/ and validation/ (or val/)")
    if args.weights is not None and args.pretrained:
        raise UsageError("--weights and --pretrained exclude each other")
    teacher = next((o for o in ("kd_model_name", "kd_model_path") if getattr(args, o) is not None), None)
    if args.no_kd and teacher is not None:
        raise UsageError(f"--no-kd and --{teacher.replace('_', '-')} {getattr(args, teacher)} exclude each other")
    if not args.warmup_prefix and args.warmup_epochs >= args.epochs > 0:
        if "warmup_epochs" in values:
            raise UsageError(
                f"--warmup-epochs {args.warmup_epochs} must be fewer than --epochs {args.epochs}, or come before them "
                f"with --warmup-prefix"
            )
        args.warmup_epochs = args.epochs * DEFAULTS["warmup_epochs"] // DEFAULTS["epochs"]  # type: ignore[operator]
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if low > high:
            raise UsageError(f"--{name} must be two numbers in order, got {low:g} {high:g}")
    if args.output is None:
        args.output = str(Path("output") / args.model)
    return args
