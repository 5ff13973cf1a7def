# SPDX-License-Identifier: Apache-2.0
"""The options of ``groupmamba train-segmenter`` and its recipe.

The recipe is the one by which the field compares backbones on ADE20K: UPerNet as github.com/SwinTransformer trains it
(Swin-Transformer-Semantic-Segmentation, configs/swin/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k.py and what
it builds on), which VMamba's and GroupMamba's tables follow. Two things differ: segmentation-models-pytorch's UPerNet
has no auxiliary head, and brightness is jittered by a factor, not by an amount.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from groupmamba.training.option_table import (
    GROUPS,
    POSITIVE,
    SHARE,
    WORKERS,
    Command,
    Option,
    chosen,
    number,
    path_text,
)
from groupmamba.training.recipe import Value
from groupmamba_ext._command import UsageError

_CONFIG = "upernet_swin_tiny_patch4_window7_512x512_160k_ade20k.py"
_DATA, _SCHEDULE = "_base_/datasets/ade20k.py", "_base_/schedules/schedule_160k.py"

RECIPE = (
    Value("model", "groupmamba_tiny", "the paper's table 3"),
    Value("decoder_channels", 512, "_base_/models/upernet_swin.py, decode_head.channels"),
    Value("drop_path", 0.2, "VMamba's upernet_vssm_4xb4-160k_ade20k-512x512_tiny.py (Swin-T's: 0.3)"),
    Value("img_size", 512, f"{_DATA}, crop_size"),
    Value("short_side", 512, f"{_DATA}, img_scale = (2048, 512)"),
    Value("scale", (0.5, 2.0), f"{_DATA}, ratio_range"),
    Value("max_class_share", 0.75, f"{_DATA}, cat_max_ratio"),
    Value("hflip", 0.5, f"{_DATA}, RandomFlip"),
    Value("batch_size", 16, f"{_CONFIG}, samples_per_gpu = 2 on 8 GPUs: 16 in all"),
    Value("steps", 160_000, f"{_SCHEDULE}, runner"),
    Value("opt", "adamw", f"{_CONFIG}, optimizer"),
    Value("opt_eps", 1e-8, "torch.optim.AdamW"),
    Value("opt_betas", (0.9, 0.999), f"{_CONFIG}, optimizer.betas"),
    Value("weight_decay", 0.01, f"{_CONFIG}, optimizer; vectors and biases excluded (there: norms and positions)"),
    Value("clip_grad", 0.0, f"{_SCHEDULE}, optimizer_config"),
    Value("clip_mode", "norm", "without effect at clip_grad 0"),
    Value("sched", "poly", f"{_CONFIG}, lr_config.policy"),
    Value("sched_power", 1.0, f"{_CONFIG}, lr_config.power"),
    Value("lr_base", 6e-5, f"{_CONFIG}, optimizer.lr, for 16 images a step"),
    Value("lr_base_size", 16, f"{_CONFIG}, 8 GPUs of 2 images"),
    Value("lr_base_scale", "linear", "as mmengine's auto_scale_lr"),
    Value("warmup_steps", 1500, f"{_CONFIG}, lr_config.warmup_iters"),
    Value("warmup_lr", 6e-11, f"{_CONFIG}, lr_config.warmup_ratio = 1e-6"),
    Value("min_lr", 0.0, f"{_CONFIG}, lr_config.min_lr"),
    Value("model_ema", False, f"{_CONFIG} has none"),
    Value("model_ema_decay", 0.9999, "as groupmamba train"),
    Value("window", "slide", "ConvNeXt's upernet_convnext_tiny_512_160k_ade20k_ss.py, test_cfg.mode (Swin's: whole)"),
    Value("stride", 341, "ConvNeXt's upernet_convnext_tiny_512_160k_ade20k_ss.py, test_cfg.stride"),
)

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the multi-scale test: _base_/datasets/ade20k.py, img_ratios

RUN = (
    Option("val-interval", POSITIVE, "epochs from validation to validation; default: ten in a run, or every epoch"),
    *(option for option in GROUPS["run"] if option.name != "val-interval"),
)
LENGTH = (
    Option("steps", POSITIVE, "steps in all, the last epoch may end early"),
    Option("epochs", POSITIVE, "passes over the training images, in place of --steps"),
    Option("warmup-steps", number(0, whole=True), "steps of linear warm-up, at most a tenth of a run by default"),
)
TESTING = (
    Option("window", ("slide", "whole"), "in validation: crops side by side, or the image as a whole"),
    Option("stride", POSITIVE, "pixels from crop to crop; default: two thirds of --img-size, 341 of 512"),
    Option("multi-scale", bool, f"in validation: mean over {len(SCALES)} scales and their mirror images", False),
)

GROUPS_OF_SEGMENTER = {
    "data": (
        Option("img-size", number(32, 4096, whole=True), "pixels of a side of the crop; a multiple of 32"),
        Option(
            "short-side",
            number(32, 4096, whole=True),
            "pixels of the image's shorter side before it is rescaled; default: --img-size",
        ),
        Option("num-classes", number(1, 65535, whole=True), "default: those named in DATA, or the highest label's"),
        Option("reduce-zero-label", bool, "0 in label images is no class but unlabelled, as in ADE20K", True),
        *chosen(GROUPS["data"], "workers", "batch-size", "validation-batch-size", "max-bad-images", "pin-mem"),
    ),
    "model": (
        Option("model", str, "the backbone: a model of this project, or of timm with maps at strides 4 to 32"),
        Option("model-kwargs", GROUPS["model"][1].kind, "more arguments of the backbone, as name=value", None, "*"),
        Option("decoder-channels", number(8, 8192, whole=True), "of the decoder"),
        Option("weights", path_text, "start from a checkpoint: of a backbone, or of a segmenter, for fine-tuning"),
        *chosen(GROUPS["model"], "pretrained", "drop-path", "grad-checkpointing", "freeze-bn"),
    ),
    "device": GROUPS["device"],
    "optimizer": GROUPS["optimizer"],
    "learning rate": (
        Option("sched", ("poly", "cosine", "tanh", "constant"), "schedule, stepped once an update"),
        Option("sched-power", number(0, above=True), "of --sched poly"),
        *chosen(GROUPS["learning rate"], "lr", "lr-base", "lr-base-size", "lr-base-scale"),
        Option("warmup-lr", number(0), "first rate"),
        Option("min-lr", number(0), "last rate"),
        *LENGTH,
    ),
    "augmentation": (
        Option("no-aug", bool, "only resize and crop the centre", False),
        Option("scale", number(0, 16, above=True), "from which the factor of --short-side is drawn", None, 2),
        Option("max-class-share", SHARE, "of a crop that one class may have; other crops are tried ten times"),
        *chosen(GROUPS["augmentation"], "hflip"),
        Option("color-jitter", SHARE, "probability of a change of brightness, contrast, saturation and hue each", 0.5),
    ),
    "validation": TESTING,
    "exponential moving average": GROUPS["exponential moving average"],
    "run": RUN,
}

_SHORT_HELP = f"""\
usage: groupmamba train-segmenter DATA [options]    (--help-all: every option)

Train UPerNet on DATA/images/training with label images of the same names in
DATA/annotations/training, checked on validation, by the recipe for ADE20K.

  --model NAME          the backbone, of this project or timm [groupmamba_tiny]
  --weights FILE        start from a checkpoint of a backbone or a segmenter
  --img-size N          pixels of the crop's sides and of an image's shorter one
                        (--short-side: of this alone) [512]
  --no-reduce-zero-label  0 is a class, not unlabelled as it is in ADE20K
  --steps N             steps in all [160000]; --epochs N in place of it
  -b, --batch-size N    images a step of each GPU [16]
  --lr RATE             highest learning rate [6e-05 x images a step / 16]
  -j, --workers N       processes that load images [{WORKERS}]
  --multi-scale         validate by six scales and their mirror images
  --output FOLDER       the run's own [output/segmenter_MODEL]
  --resume PATH         go on from another run; none: begin anew
  --config FILE         options of a run: its args.yaml
  --seed N              of everything random [42]

Many GPUs: torchrun --nproc-per-node N -m groupmamba train-segmenter DATA
"""


def check_length(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """``--epochs`` takes the place of ``--steps``.

    Raises:
        UsageError: both were given.
    """
    if given.get("epochs") is not None:
        if given.get("steps") is not None:
            raise UsageError(f"--epochs {args.epochs} and --steps {args.steps} exclude each other")
        args.steps = None


def _check(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    check_length(args, given)
    if args.img_size % 32:
        raise UsageError(f"--img-size {args.img_size} must be a multiple of 32, the stride of the last map")
    if args.scale[0] > args.scale[1]:
        raise UsageError(f"--scale must be two numbers in order, got {args.scale[0]:g} {args.scale[1]:g}")
    if "short_side" not in given and "img_size" in given:
        args.short_side = args.img_size  # as the recipe's, which are both 512
    if "stride" not in given:
        args.stride = -(-2 * args.img_size // 3) if args.img_size != 512 else 341
    if args.stride > args.img_size:
        raise UsageError(f"--stride {args.stride} must be at most --img-size {args.img_size}: pixels would be left out")
    if args.batch_size < 2 and not args.freeze_bn:
        raise UsageError(
            f"--batch-size {args.batch_size} must be 2 at least: UPerNet has a BatchNorm over 1 x 1 pixels"
        )


SEGMENTER = Command(
    "train-segmenter",
    "segmentation",
    GROUPS_OF_SEGMENTER,
    RECIPE,
    "the folder that holds images/training and annotations/training, and the same for validation",
    _SHORT_HELP,
    _check,
    needed=("segmentation_models_pytorch", "torchmetrics"),
    prefix="segmenter_",
)
