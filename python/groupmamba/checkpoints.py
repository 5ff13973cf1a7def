# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the authors' released code under this project's parameter names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

RELEASED_GROUPS = 4

# Entry of one released group -> stacked entry of GroupCore and the released dimension of size 1 that it drops.
_GROUP_ENTRIES = {
    "in_proj.weight": ("in_proj_weight", None),
    "conv2d.weight": ("conv_weight", 1),
    "conv2d.bias": ("conv_bias", None),
    "x_proj_weight": ("x_proj_weight", 0),
    "dt_projs_weight": ("dt_weight", 0),
    "dt_projs_bias": ("dt_bias", 0),
    "A_logs": ("A_log", None),
    "Ds": ("D", None),
    "out_norm.weight": ("out_norm_weight", None),
    "out_norm.bias": ("out_norm_bias", None),
    "out_proj.weight": ("out_proj_weight", None),
}
_LAYER_ENTRIES = {
    "skip_scale": "skip_scale",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "fc1.weight": "affinity.fc1.weight",
    "fc1.bias": "affinity.fc1.bias",
    "fc2.weight": "affinity.fc2.weight",
    "fc2.bias": "affinity.fc2.bias",
    "proj.weight": "proj.weight",
    "proj.bias": "proj.bias",
}
# Entries of a whole released model: pattern and replacement, the first that matches.
_MODEL_ENTRIES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"patch_embed1\.(.+)"), r"stem.\1"),
    (re.compile(r"patch_embed([234])\.(.+)"), lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}"),
    (re.compile(r"block([1234])\.([0-9]+)\.mlp\.dwconv\.dwconv\.(.+)"), lambda m: f"{_block(m)}.mlp.dwconv.{m[3]}"),
    (re.compile(r"block([1234])\.([0-9]+)\.(.+)"), lambda m: f"{_block(m)}.{m[3]}"),
    (re.compile(r"norm([123])\.(.+)"), lambda m: f"stage_norms.{int(m[1]) - 1}.{m[2]}"),
    (re.compile(r"norm4\.(.+)"), r"norm.\1"),
    (re.compile(r"post_network\.0\.(.+)"), r"class_block.\1"),
]
_GROUP_NAME = re.compile(r"(?P<layer>(?:.*\.)?)mamba_g(?P<group>\d+)\.(?P<entry>.+)")
_MODEL_LAYER = re.compile(r"(?:block[1234]\.[0-9]+|post_network\.0)\.attn\.")
_GROUP_NUMBERS = tuple(str(group) for group in range(1, RELEASED_GROUPS + 1))

# Where a training checkpoint keeps its weights: averages before the weights that they are of.
_WEIGHTS_KEYS = ("model_ema", "state_dict_ema", "model", "state_dict", "module")
# What wrappers put in front of a model's names: of parallel training, averages, compilation; of trainers; of detectors
# and segmenters around a backbone, timm's feature extractors among them.
_WRAPPERS = re.compile(
    r"(?:(?:module|_orig_mod|_forward_module|model|ema_model|student|backbone|encoder|body|graph_module)\.)*"
)
# Wrappers of single modules, anywhere in a name.
_INNER_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What stands beside a backbone in the models of groupmamba.vision.
_BESIDE = {
    "backbone.": ("backbone.fpn.", "backbone.norms.", "rpn.", "roi_heads."),
    "encoder.": ("decoder.", "segmentation_head.", "classification_head."),
}
_MODEL_STARTS = ("stem.", "patch_embed1.")  # of this project and of the authors' code


def _block(match: re.Match) -> str:
    return f"stages.{int(match[1]) - 1}.blocks.{match[2]}"


def is_released_state_dict(sd: Mapping[str, Tensor]) -> bool:
    """True where names are those of the authors' code."""
    return any(_GROUP_NAME.fullmatch(name) for name in sd)


def unwrap_checkpoint(checkpoint: Mapping) -> dict[str, Tensor]:
    """The names and tensors of the model inside a training checkpoint, without what wrappers add.

    Goes into the entries "model_ema", "state_dict_ema", "model", "state_dict" and "module" (the first that is there,
    averages before weights). Drops prefixes such as "module.", "_orig_mod.", "model." and "backbone.", in any order and
    number, and the counter ``n_averaged`` of torch's averages. Of a detector or segmenter of ``groupmamba.vision`` it
    takes the backbone, with a warning that the rest is left out.

    Raises:
        TypeError: ``checkpoint`` is no mapping of names to tensors.
        ValueError: it holds two models, or one entry twice.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint must be a mapping of names to tensors, got {type(checkpoint).__name__}")
    for key in _WEIGHTS_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            return unwrap_checkpoint(checkpoint[key])
    for name, value in checkpoint.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{type(value).__name__} at {name!r}"
            raise TypeError(f"checkpoint must be a mapping of names to tensors, got {what}")
    tensors: dict[str, Tensor] = {}
    for name, value in checkpoint.items():
        new = _INNER_WRAPPERS.sub("", name)
        if new in tensors:
            raise ValueError(f"checkpoint[{name!r}] and another entry both become {new!r}")
        tensors[new] = value
    names = [name for name, value in tensors.items() if not (_is_counter(name) and value.numel() == 1)]
    prefix = _model_prefix(names)
    beside = _beside_backbone(names, prefix)
    if beside:
        warnings.warn(f"Only the backbone of the checkpoint is loaded, without {', '.join(beside)}", stacklevel=2)
    out: dict[str, Tensor] = {}
    for name in names:
        if name.startswith(beside):
            continue
        new = name.removeprefix(prefix)
        if new in out:
            raise ValueError(f"checkpoint[{name!r}] and another entry both become {new!r}")
        out[new] = tensors[name]
    return out


def _is_counter(name: str) -> bool:
    return _WRAPPERS.sub("", name, count=1) == "n_averaged"


def _beside_backbone(names: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Starts of the names that a detector or segmenter has beside the backbone at ``prefix``."""
    starts = []
    for around, parts in _BESIDE.items():
        outer, found, _ = prefix.partition(around)
        if found:
            starts += [outer + part for part in parts if any(name.startswith(outer + part) for name in names)]
    return tuple(starts)


def _model_prefix(names: Sequence[str]) -> str:
    """What stands in front of all names of the model, or "" where no model is found."""
    prefixes = set()
    for name in names:
        match = _WRAPPERS.match(name)
        prefix = match[0] if match else ""
        if name.startswith(_MODEL_STARTS, len(prefix)):
            prefixes.add(prefix)
    if len(prefixes) > 1:
        raise ValueError(f"checkpoint holds several models, at {', '.join(map(repr, sorted(prefixes)))}")
    return prefixes.pop() if prefixes else ""


def convert_released_state_dict(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and stacks the entries of the authors' released code to those of ``GroupedMamba2d(variant="released")``
    or, for a whole model, of :class:`groupmamba.models.GroupMamba`.

    Entries are renamed, lose a dimension of size 1, or are stacked over the four groups, and nothing else: no
    arithmetic, cast or reordering. So it holds for anything with one tensor a parameter: weights, gradients, optimizer
    moments, moving averages. Entries that belong to neither a layer nor a released model pass unchanged. Tensors that
    are not stacked are the ones given, not copies.

    Args:
        sd: released names to tensors, of one ``GroupMambaLayer`` or of any model around such layers. Entries may be
            missing (frozen parameters have no gradient), but not for some of the four groups only.

    Returns:
        New names to tensors; loads with ``strict=True``. The directions are the released order, which is the default of
        ``variant="released"``: (lr, tb, rl, bt).

    Raises:
        TypeError: ``sd`` is no mapping of names to tensors, or the groups differ in dtype.
        ValueError: there is no released layer in it, a group's entry is missing, an entry of a layer is unknown, or
            shapes do not fit.
    """
    if not isinstance(sd, Mapping):
        raise TypeError(f"sd must be a mapping of names to tensors, got {type(sd).__name__}")
    for name, value in sd.items():
        if not isinstance(name, str):
            raise TypeError(f"sd must be a mapping of names to tensors, got the name {name!r}")
        if not isinstance(value, Tensor):
            hint = ", pass it instead of the checkpoint around it" if isinstance(value, Mapping) else ""
            raise TypeError(f"sd[{name!r}] must be a torch.Tensor, got {type(value).__name__}{hint}")
    matches = {name: _GROUP_NAME.fullmatch(name) for name in sd}
    layers = {match["layer"] for match in matches.values() if match}
    if not layers:
        raise ValueError(f"sd has no entry of a released layer ('mamba_g1.in_proj.weight'), got {list(sd)[:3]}")
    # A layer of a whole model may have none of its groups' entries here.
    layers.update(match[0] for name in sd if (match := _MODEL_LAYER.match(name)))

    out: dict[str, Tensor] = {}
    stacked = set()
    for name, value in sd.items():
        match = matches[name]
        if match is None:
            new = _rename_layer_entry(name, layers)
        else:
            if match["entry"] not in _GROUP_ENTRIES or match["group"] not in _GROUP_NUMBERS:
                raise ValueError(
                    f"sd[{name!r}] is no entry of a released group Mamba layer, which has {RELEASED_GROUPS} groups"
                )
            new = f"{match['layer']}mamba.{_GROUP_ENTRIES[match['entry']][0]}"
            if new in stacked:
                continue  # the first of the four brought all
            stacked.add(new)
            value = _stack_groups(sd, match["layer"], match["entry"])
        new = _rename_model_entry(new)
        if new in out:
            raise ValueError(f"sd[{name!r}] and another entry both become {new!r}")
        out[new] = value
    return out


def _rename_model_entry(name: str) -> str:
    for pattern, replacement in _MODEL_ENTRIES:
        if pattern.fullmatch(name):
            return pattern.sub(replacement, name)
    return name


def _rename_layer_entry(name: str, layers: set[str]) -> str:
    """The new name of an entry that belongs to no group."""
    for layer in sorted(layers, key=len, reverse=True):  # of a layer inside another the inner one
        if name.startswith(layer):
            entry = name[len(layer) :]
            if entry not in _LAYER_ENTRIES:
                raise ValueError(f"sd[{name!r}] is no entry of a released group Mamba layer")
            return layer + _LAYER_ENTRIES[entry]
    return name


def _stack_groups(sd: Mapping[str, Tensor], layer: str, entry: str) -> Tensor:
    """One entry of all four groups, stacked, without the released dimension of size 1."""
    names = [f"{layer}mamba_g{group}.{entry}" for group in range(1, RELEASED_GROUPS + 1)]
    missing = [name for name in names if name not in sd]
    if missing:
        raise ValueError(f"sd lacks {', '.join(map(repr, missing))}; the other groups have this entry")
    tensors = [sd[name] for name in names]
    first = tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.shape != first.shape:
            raise ValueError(f"sd[{name!r}] must be {tuple(first.shape)} like group 1's, got {tuple(tensor.shape)}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"sd[{name!r}] must be {first.dtype} like group 1's, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"sd[{name!r}] must be on {first.device} like group 1's, got {tensor.device}")
    single = _GROUP_ENTRIES[entry][1]
    if single is not None:
        if first.dim() <= single or first.shape[single] != 1:
            raise ValueError(f"sd[{names[0]!r}] must have size 1 in dimension {single}, got {tuple(first.shape)}")
        tensors = [tensor.squeeze(single) for tensor in tensors]
    return torch.stack(tensors)
