# SPDX-License-Identifier: Apache-2.0
"""The options of ``groupmamba train-detector`` and its recipes.

The recipes are those by which the field compares backbones on COCO, as mmdetection trains Swin: configs/swin/
mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py, and mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py for ``--schedule 3x``.
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
    keyword,
    number,
    path_text,
)
from groupmamba.training.recipe import Value
from groupmamba.training.segmentation.command import LENGTH, RUN
from groupmamba_ext._command import UsageError

_CONFIG, _LONG = "mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
_DATA = "_base_/datasets/coco_instance.py"

RECIPE = (
    Value("model", "groupmamba_tiny", "the paper's table 2"),
    Value("drop_path", 0.2, f"{_CONFIG}, backbone.drop_path_rate"),
    Value("schedule", "1x", "the paper's table 2"),
    Value("epochs", 12, f"{_CONFIG}, train_cfg.max_epochs"),
    Value("min_size", (800,), f"{_DATA}, Resize.scale"),
    Value("max_size", 1333, f"{_DATA}, Resize.scale"),
    Value("crop", False, f"{_DATA} has none"),
    Value("hflip", 0.5, f"{_DATA}, RandomFlip"),
    Value("empty_images", False, f"{_DATA}, filter_cfg.filter_empty_gt"),
    Value("batch_size", 16, f"{_DATA}, batch_size = 2 on 8 GPUs: 16 in all"),
    Value("validation_batch_size", 1, f"{_DATA}, val_dataloader: a padded image is seen with its padding"),
    Value("opt", "adamw", f"{_CONFIG}, optim_wrapper"),
    Value("opt_eps", 1e-8, "torch.optim.AdamW"),
    Value("opt_betas", (0.9, 0.999), f"{_CONFIG}, optimizer.betas"),
    Value("weight_decay", 0.05, f"{_CONFIG}, optimizer; vectors and biases excluded (there: norms and positions)"),
    Value("clip_grad", 0.0, f"{_CONFIG} has none"),
    Value("clip_mode", "norm", "without effect at clip_grad 0"),
    Value("sched", "multistep", f"{_CONFIG}, param_scheduler"),
    Value("decay_rate", 0.1, f"{_CONFIG}, param_scheduler.gamma"),
    Value("decay_at", (8 / 12, 11 / 12), f"{_CONFIG}, param_scheduler.milestones = [8, 11] of 12 epochs"),
    Value("lr_base", 1e-4, f"{_CONFIG}, optimizer.lr, for 16 images a step"),
    Value("lr_base_size", 16, f"{_CONFIG}, auto_scale_lr.base_batch_size"),
    Value("lr_base_scale", "linear", "mmengine, auto_scale_lr"),
    Value("warmup_steps", 1000, f"{_CONFIG}, param_scheduler, LinearLR.end"),
    Value("warmup_lr", 1e-7, f"{_CONFIG}, LinearLR.start_factor = 0.001"),
    Value("min_lr", 0.0, "without effect on milestones"),
    Value("model_ema", False, f"{_CONFIG} has none"),
    Value("model_ema_decay", 0.9999, "as groupmamba train"),
)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "3x": {  # the second file: train_cfg, milestones [27, 33] of 36, RandomChoiceResize, and half the images cropped
        "epochs": 36,
        "decay_at": (27 / 36, 33 / 36),
        "min_size": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "crop": True,
    }
}
CROP_FROM, CROP_SIZE = (400, 500, 600), (384, 600)  # the second file: RandomChoiceResize.scales, RandomCrop.crop_size

_SIDE = number(1, 8192, whole=True)

GROUPS_OF_DETECTOR = {
    "data": (
        Option("train-annotations", path_text, "COCO file of DATA; default: annotations/instances_train*.json, ..."),
        Option("train-images", path_text, "folder of its images; default: train2017/, train/ or the like in DATA"),
        Option("val-annotations", path_text, "the same for validation"),
        Option("val-images", path_text, "the same for validation"),
        Option("empty-images", bool, "train on images without objects too"),
        *chosen(GROUPS["data"], "workers", "batch-size", "validation-batch-size", "max-bad-images", "pin-mem"),
    ),
    "model": (
        Option("model", str, "the backbone: a model of this project, or of timm with maps at strides 4 to 32"),
        Option("model-kwargs", keyword, "more arguments of the backbone, as name=value", None, "*"),
        Option("detector-kwargs", keyword, "more arguments of torchvision's MaskRCNN, as name=value", None, "*"),
        Option("no-masks", bool, "boxes alone, by Faster R-CNN; so too where the annotations have no masks", False),
        Option("weights", path_text, "start from a checkpoint: of a backbone, or of a detector, for fine-tuning"),
        *chosen(GROUPS["model"], "pretrained", "drop-path", "grad-checkpointing", "freeze-bn"),
    ),
    "device": GROUPS["device"],
    "optimizer": GROUPS["optimizer"],
    "learning rate": (
        Option("schedule", ("1x", "3x"), "12 epochs at one scale, or 36 at several with crops: defaults of the others"),
        Option("sched", ("multistep", "poly", "cosine", "tanh", "constant"), "how the rate falls, at each step"),
        Option("decay-at", SHARE, "parts of the run after which the rate falls", None, 2),
        Option("decay-rate", number(0, 1, above=True), "the factor by which it falls"),
        Option("sched-power", number(0, above=True), "of --sched poly", 1.0),
        *chosen(GROUPS["learning rate"], "lr", "lr-base", "lr-base-size", "lr-base-scale"),
        Option("warmup-lr", number(0), "first rate"),
        Option("min-lr", number(0), "last rate, of schedules that have one"),
        Option("epochs", POSITIVE, "passes over the training images"),
        Option("steps", POSITIVE, "steps in all, in place of --epochs; the last epoch may end early"),
        *chosen(LENGTH, "warmup-steps"),
    ),
    "augmentation": (
        Option("min-size", _SIDE, "pixels of the shorter side, one or several to choose from; the last in validation",
               None, "+"),
        Option("max-size", _SIDE, "pixels of the longer side at most"),
        Option("crop", bool, "half of the images are made smaller and cropped first"),
        *chosen(GROUPS["augmentation"], "hflip"),
    ),
    "exponential moving average": GROUPS["exponential moving average"],
    "run": RUN,
}  # fmt: skip

_SHORT_HELP = f"""\
usage: groupmamba train-detector DATA [options]    (--help-all: every option)

Train Mask R-CNN on images with annotations in COCO's format, by the recipe for
COCO: DATA/annotations/instances_train*.json and instances_val*.json, or a
_annotations.coco.json or like it in DATA/train and DATA/val.

  --model NAME          the backbone, of this project or timm [groupmamba_tiny]
  --weights FILE        start from a checkpoint of a backbone or a detector
  --schedule 1x|3x      12 epochs, or 36 at several scales with crops [1x]
  --epochs N            passes over the training images; or --steps N
  --min-size N...       pixels of the shorter side [800]; --max-size N [1333]
  --no-masks            boxes alone, by Faster R-CNN
  -b, --batch-size N    images a step of each GPU [16]
  --lr RATE             highest learning rate [0.0001 x images a step / 16]
  -j, --workers N       processes that load images [{WORKERS}]
  --output FOLDER       the run's own [output/detector_MODEL]
  --resume PATH         go on from another run; none: begin anew
  --config FILE         options of a run: its args.yaml
  --seed N              of everything random [42]

Many GPUs: torchrun --nproc-per-node N -m groupmamba train-detector DATA
"""


def _check(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    if given.get("steps") is not None:
        if given.get("epochs") is not None:
            raise UsageError(f"--epochs {args.epochs} and --steps {args.steps} exclude each other")
        args.epochs = None
    low, high = args.decay_at
    if low > high:
        raise UsageError(f"--decay-at must be two numbers in order, got {low:g} {high:g}")
    if max(args.min_size) > args.max_size:
        raise UsageError(f"--min-size {max(args.min_size)} must be at most --max-size {args.max_size}")


DETECTOR = Command(
    "train-detector",
    "detection",
    GROUPS_OF_DETECTOR,
    RECIPE,
    "the folder that holds annotations/instances_train*.json and the images, and the same for validation",
    _SHORT_HELP,
    _check,
    needed=("torchmetrics", "pycocotools"),
    prefix="detector_",
    presets=PRESETS,
)
