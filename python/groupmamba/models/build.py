# SPDX-License-Identifier: Apache-2.0
"""How timm builds the models, and how their weights come into them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from timm.models._features import FeatureDictNet, feature_take_indices
from torch import nn

from groupmamba.models.pretrained import find_checkpoint, weights_file
from groupmamba.models.weights import load_strictly

FROM_CFG = (
    "in_chans",
    "num_classes",
    "global_pool",
)  # options that timm sets from pretrained_cfg where they aren't given


def fill(model: nn.Module, name: str, cfg: PretrainedCfg, cache_dir: str | os.PathLike | None = None) -> None:
    """Loads the weights that ``cfg`` names into a model; errors say of which model and from where.

    Raises:
        RuntimeError: the weights can't be had, can't be read safely, or do not fit.
    """
    try:
        checkpoint, where = find_checkpoint(cfg, cache_dir)
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error
    try:
        load_strictly(model, checkpoint)
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {where} could not be loaded: {error}") from error


def build(
    model_class: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    *,
    weights: str | os.PathLike | None = None,
    pretrained_cfg: dict | str | None = None,
    pretrained_cfg_overlay: dict | None = None,
    pretrained_model_args: dict | None = None,
    cache_dir: str | os.PathLike | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    feature_cls: str | type | None = None,
    feature_cfg: dict | None = None,
    output_stride: int = 32,
    img_size: int | Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """timm's builder for this project's models. The options of the model never meet the names of timm's own, and
    weights are loaded strictly, see :func:`groupmamba.models.weights.load_strictly`.

    Args:
        model_class, name, pretrained: what to build, under which name, and whether with weights.
        weights: path of a checkpoint to load, or of a folder with one.
        pretrained_cfg, pretrained_cfg_overlay, pretrained_model_args, cache_dir: as for
            :func:`timm.models.build_model_with_cfg`.
        features_only, out_indices, feature_cls, feature_cfg: a model of feature maps, by one of timm's classes.
        output_stride: 32.
        img_size: not taken, since any size will do.
        options: of ``model_class``.

    Raises:
        FileNotFoundError: ``weights`` is no file and no folder with a checkpoint.
        RuntimeError: the weights can't be had, can't be read safely, or do not fit.
        TypeError, ValueError: an option has a wrong type or value.
    """
    if output_stride != 32:
        raise ValueError(f"output_stride must be 32, the stride of the last stage, got {output_stride!r}")
    if img_size is not None:
        raise ValueError(f"img_size is not taken: images may have any size of at least 32 x 32, got {img_size!r}")
    if weights is not None:
        pretrained_cfg_overlay = {**(pretrained_cfg_overlay or {}), "file": weights_file(weights)}
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter", **(feature_cfg or {})}
    features.update({k: v for k, v in (("out_indices", out_indices), ("feature_cls", feature_cls)) if v is not None})
    if features_only:
        _check_feature_cls(features["feature_cls"], features.get("output_fmt", "NCHW"))
        features["out_indices"] = chosen_stages("out_indices", features["out_indices"], len(options["dims"]))

    def make(**from_cfg: Any) -> nn.Module:
        if features_only:
            from_cfg["num_classes"] = 0
            if from_cfg.get("global_pool", "avg") == "avg":
                from_cfg["global_pool"] = ""
        model = model_class(**options, **from_cfg)
        if features_only and features.get("prune", True):
            model.prune_intermediate_layers(features["out_indices"])
        if pretrained or weights is not None:
            fill(model, name, cfg, cache_dir)
        return model

    for_timm = {option: options.pop(option) for option in FROM_CFG if option in options}
    if pretrained_model_args is not None:
        for_timm["pretrained_model_args"] = pretrained_model_args
    if features_only:
        for_timm["features_only"] = True
    return build_model_with_cfg(make, name, False, pretrained_cfg=cfg, feature_cfg=features, **for_timm)


def _check_feature_cls(feature_cls: str | type, output_fmt: str) -> None:
    if isinstance(feature_cls, str):
        known = feature_cls.lower() in ("getter", "hook", "fx")
    else:
        known = isinstance(feature_cls, type) and not issubclass(feature_cls, FeatureDictNet)
    if not known:
        raise ValueError(
            f"feature_cls must be 'getter', 'hook' or 'fx', got {feature_cls!r}: 'list' and 'dict' call a model's "
            f"children one after the other, which is not what these models do"
        )
    if feature_cls != "getter" and output_fmt != "NCHW":
        raise ValueError(f"output_fmt must be 'NCHW' with feature_cls={feature_cls!r}, got {output_fmt!r}")


def chosen_stages(name: str, indices: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The stages that ``indices`` choose, as timm counts: all, the last n, or these, from the end where negative."""
    try:
        return tuple(feature_take_indices(count, indices)[0])
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must choose some of {count} stages, got {indices!r}") from error
