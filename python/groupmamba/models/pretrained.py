# SPDX-License-Identifier: Apache-2.0
"""Where the models' weights come from, and how timm builds and fills them."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable

import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from groupmamba.checkpoints import convert_released_state_dict, is_released_state_dict, unwrap_checkpoint

# Training checkpoints of the authors' code hold their configuration; this lets torch read it, without the package that
# defines it, as the dictionary that it is. Nothing of the file is executed.
SAFE_TYPES = [(OrderedDict, "yacs.config.CfgNode")]


def _cfg(size: str) -> dict:
    return {
        "hf_hub_id": f"Abdelrahman-shaker/GroupMamba-{size.capitalize()}",
        "hf_hub_filename": f"groupmamba_{size}_ema.pth",  # a dictionary of tensors, read with weights_only=True
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv.0",
        "classifier": ("head", "dist_head"),
        "license": "mit",
        "paper_ids": "arXiv:2407.13772",
        "paper_name": "GroupMamba: Efficient Group-Based Visual State Space Model",
        "origin_url": "https://github.com/Amshaker/GroupMamba",
    }


default_cfgs = generate_default_cfgs({f"groupmamba_{size}.in1k": _cfg(size) for size in ("tiny", "small", "base")})


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """What timm loads: this project's names, from a checkpoint of this project or of the authors' code."""
    state_dict = unwrap_checkpoint(state_dict)
    if is_released_state_dict(state_dict):
        state_dict = convert_released_state_dict(state_dict)
    if not model.distillation:
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("dist_head.")}
    return state_dict


def build(
    model_class: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    *,
    weights: str | os.PathLike | None = None,
    pretrained_cfg_overlay: dict | None = None,
    **kwargs,
) -> nn.Module:
    """timm's builder with errors that say which file is missing or wrong.

    Args:
        model_class, name, pretrained, pretrained_cfg_overlay, kwargs: as for :func:`timm.models.build_model_with_cfg`.
        weights: path of a checkpoint to load.

    Raises:
        FileNotFoundError: ``weights`` is no file.
        RuntimeError: the weights can't be had, can't be read safely, or do not fit.
    """
    if weights is not None:
        weights = os.fspath(weights)
        if not os.path.isfile(weights):
            raise FileNotFoundError(f"weights must be the path of a checkpoint, got {weights!r}")
        pretrained, pretrained_cfg_overlay = True, {**(pretrained_cfg_overlay or {}), "file": weights}
    arguments = {
        "pretrained_cfg_overlay": pretrained_cfg_overlay,
        "pretrained_filter_fn": checkpoint_filter_fn,
        "feature_cfg": {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    }
    if not pretrained:
        return build_model_with_cfg(model_class, name, False, **arguments)
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            return build_model_with_cfg(model_class, name, True, **arguments)
    except (OSError, HfHubHTTPError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if weights is not None:
            raise RuntimeError(f"{name}: weights={weights!r} could not be loaded: {error}") from error
        if isinstance(error, RuntimeError) and not isinstance(error, HfHubHTTPError):
            raise
        cfg = default_cfgs[name].default
        raise RuntimeError(
            f"{name}: the weights could not be loaded ({type(error).__name__}). With pretrained=True they are the file "
            f"{cfg.hf_hub_filename} of huggingface.co/{cfg.hf_hub_id}; without a network give that file, or another "
            f"checkpoint of the authors' code or of this project: {name}(weights='path/to/{cfg.hf_hub_filename}')"
        ) from error
