# SPDX-License-Identifier: Apache-2.0
"""The recipe by which the authors' released code trains GroupMamba, as the defaults of ``groupmamba train``.

Each value stands with where it comes from: a file of github.com/Amshaker/GroupMamba (folder ``classification``), or the
paper (arXiv 2407.13772). What the released files set without using is named too, and is not followed.
"""

from __future__ import annotations

from typing import NamedTuple

TEACHER = "regnety_160.deit_in1k"
TEACHER_CLASSES = 1000


class Value(NamedTuple):
    """The default of an option, under the name of timm's train script, and its source."""

    option: str
    default: object
    source: str


RECIPE = (
    Value("model", "groupmamba_tiny", "scripts/run_training_sbatch.sh, MODEL"),
    Value("img_size", 224, "config.py, DATA.IMG_SIZE"),
    Value("batch_size", 128, "config.py, DATA.BATCH_SIZE, for each of 8 GPUs: 1,024 in all"),
    Value("epochs", 300, "config.py, TRAIN.EPOCHS"),
    Value("opt", "adamw", "config.py, TRAIN.OPTIMIZER.NAME"),
    Value("opt_eps", 1e-8, "config.py, TRAIN.OPTIMIZER.EPS"),
    Value("opt_betas", (0.9, 0.999), "config.py, TRAIN.OPTIMIZER.BETAS"),
    Value("weight_decay", 0.05, "config.py, TRAIN.WEIGHT_DECAY; vectors and biases excluded by utils/optimizer.py"),
    Value("clip_grad", 5.0, "config.py, TRAIN.CLIP_GRAD"),
    Value("clip_mode", "norm", "utils/utils.py, NativeScalerWithGradNormCount"),
    Value("sched", "cosine", "config.py, TRAIN.LR_SCHEDULER.NAME, stepped once an update"),
    Value("lr_base", 5e-4, "config.py, TRAIN.BASE_LR, for a total batch of lr_base_size"),
    Value("lr_base_size", 512, "train.py, linear_scaled_lr"),
    Value("lr_base_scale", "linear", "train.py, linear_scaled_lr"),
    Value("warmup_epochs", 20, "config.py, TRAIN.WARMUP_EPOCHS: of the epochs, the cosine spans the rest"),
    Value("warmup_lr", None, "config.py, TRAIN.WARMUP_LR = 5e-7, scaled like lr_base: WARMUP_LR below"),
    Value("min_lr", None, "config.py, TRAIN.MIN_LR = 5e-6, scaled like lr_base: MIN_LR below"),
    Value("scale", (0.08, 1.0), "timm's create_transform, which data/build.py calls without it"),
    Value("ratio", (3 / 4, 4 / 3), "timm's create_transform, which data/build.py calls without it"),
    Value("hflip", 0.5, "timm's create_transform, which data/build.py calls without it"),
    Value("train_interpolation", "bicubic", "config.py, DATA.INTERPOLATION"),
    Value("interpolation", "bicubic", "config.py, DATA.INTERPOLATION"),
    Value("crop_pct", 0.875, "data/build.py: the centre 224 of 256"),
    Value("color_jitter", 0.4, "config.py, AUG.COLOR_JITTER; timm leaves it out where aa is set, there and here"),
    Value("aa", "rand-m9-mstd0.5-inc1", "config.py, AUG.AUTO_AUGMENT"),
    Value("reprob", 0.25, "config.py, AUG.REPROB"),
    Value("remode", "pixel", "config.py, AUG.REMODE"),
    Value("recount", 1, "config.py, AUG.RECOUNT"),
    Value("mixup", 0.8, "config.py, AUG.MIXUP"),
    Value("cutmix", 1.0, "config.py, AUG.CUTMIX"),
    Value("mixup_prob", 1.0, "config.py, AUG.MIXUP_PROB"),
    Value("mixup_switch_prob", 0.5, "config.py, AUG.MIXUP_SWITCH_PROB"),
    Value("mixup_mode", "batch", "config.py, AUG.MIXUP_MODE"),
    Value("smoothing", 0.1, "config.py, MODEL.LABEL_SMOOTHING"),
    Value("drop", 0.0, "train.py passes 0.1, which models/groupmamba.py takes and never uses"),
    Value("drop_path", 0.05, "train.py, for all sizes; config.py's MODEL.DROP_PATH_RATE = 0.1 is never read"),
    Value("model_ema", True, "train.py, --model_ema"),
    Value("model_ema_decay", 0.9999, "train.py, --model_ema_decay"),
    Value("kd_token_distill_type", "hard", "train.py, --distillation_type"),
    Value("task_loss_weight", 0.5, "train.py, 1 - --distillation_alpha"),
    Value("kd_temperature", 1.0, "train.py, --distillation_tau, for the soft form"),
)
WARMUP_LR, MIN_LR = 5e-7, 5e-6

DEFAULTS = {value.option: value.default for value in RECIPE}


class Rates(NamedTuple):
    """Learning rates at a total batch: the highest, the first of the warm-up, and the last."""

    lr: float
    warmup_lr: float
    min_lr: float


def rates(
    total_batch: int,
    *,
    lr: float | None = None,
    lr_base: float = 5e-4,
    lr_base_size: int = 512,
    lr_base_scale: str = "linear",
    warmup_lr: float | None = None,
    min_lr: float | None = None,
) -> Rates:
    """Rates that are given count as they are; the others are scaled by ``total_batch / lr_base_size``, or its root.

    Args:
        total_batch: images a step, of all GPUs.
        lr, lr_base, lr_base_size, lr_base_scale, warmup_lr, min_lr: as for ``groupmamba train``.
    """
    factor = total_batch / lr_base_size
    if lr_base_scale == "sqrt":
        factor **= 0.5
    return Rates(
        lr_base * factor if lr is None else lr,
        WARMUP_LR * factor if warmup_lr is None else warmup_lr,
        MIN_LR * factor if min_lr is None else min_lr,
    )
