# SPDX-License-Identifier: Apache-2.0
"""Puts a checkpoint into a model: every entry that the model has, and no other, or an error that names them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from groupmamba.checkpoints import (
    RELEASED_GROUPS,
    convert_released_state_dict,
    is_released_state_dict,
    unwrap_checkpoint,
)
from groupmamba.layers.grouped_mamba import GroupedMamba2d
from groupmamba.layers.variants import RELEASED_ORDER
from groupmamba.models.pretrained import SIZES

FIRST_CONV = "stem.conv.0.weight"
HEADS = ("head", "dist_head")
NAMES_SHOWN = 8
_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.norm2\.weight")
_GROUPS = re.compile(r"stages\.0\.blocks\.0\.attn\.(?:vsss\.)?mamba\.in_proj_weight")


def load_strictly(model: nn.Module, checkpoint: object) -> None:
    """Loads ``checkpoint``, of this project or of the authors' code, into a :class:`groupmamba.models.GroupMamba`.

    - The first convolution of a checkpoint for 3 channels is adapted to the model's number of channels by timm.
    - Heads for another number of classes are left out, with a warning that names the entries.
    - The authors' weights are for four groups, their order of directions and a gate by the input. A model of other
      groups is an error, other directions or another gate a warning.
    - What the built model leaves away on purpose (heads, class block, stages behind the last one that is needed) may be
      in the checkpoint and is left out.

    Raises:
        RuntimeError: the checkpoint is no mapping of names to tensors, or an entry is missing, is none of the model's
            or has another shape.
    """
    released = False
    try:
        state = dict(unwrap_checkpoint(checkpoint))
        if is_released_state_dict(state):
            state = convert_released_state_dict(state)
            released = True
            if (groups := _layer(model).groups) != RELEASED_GROUPS:
                raise ValueError(f"the authors' weights are for {RELEASED_GROUPS} groups, and the model has {groups}")
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error
    expected = model.state_dict()
    heads = _other_heads(state, expected)
    dropped = {name: state.pop(name) for name in list(state) if name in expected and name.startswith(heads)}
    first = state.get(FIRST_CONV)
    if first is not None and first.dim() == 4 and first.shape[1] == 3:
        state[FIRST_CONV] = adapt_input_conv(model.in_chans, first)
    missing = [name for name in expected if name not in state and not name.startswith(heads)]
    others = [name for name in state if name not in expected]
    if others:
        complete = _complete_names(model)
        others = [name for name in others if name not in complete]
    wrong = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    types = [
        f"{name} {state[name].dtype} in place of {value.dtype}"
        for name, value in expected.items()
        if name in state and state[name].is_floating_point() != value.is_floating_point()
    ]
    if missing or others or wrong or types:
        problems = (
            ("Missing keys", missing), ("Unexpected keys", others), ("Wrong shapes", wrong), ("Wrong dtypes", types)
        )  # fmt: skip
        text = "; ".join(f"{title}: {_listed(names)}" for title, names in problems if names)
        raise RuntimeError(
            f"it does not fit the model. {_other_sizes(state, expected)}{_other_groups(state, expected)}{text}"
        )
    if dropped:
        theirs, ours = (len(values[next(iter(dropped))]) for values in (dropped, expected))
        warnings.warn(
            f"The checkpoint is for another number of classes ({theirs} in place of {ours}): {', '.join(dropped)} are "
            f"not loaded and keep their initial values",
            stacklevel=2,
        )
    if released:
        _warn_of_other_options(_layer(model))
    model.load_state_dict({name: state.get(name, value) for name, value in expected.items()}, strict=True)


def _layer(model: nn.Module) -> GroupedMamba2d:
    """The first of the model's layers, which all have the same options."""
    return model.get_submodule("stages.0.blocks.0.attn")  # type: ignore[return-value]


def _warn_of_other_options(layer: GroupedMamba2d) -> None:
    """Where weights of the authors' code fit and mean something else."""
    for name, theirs in (("directions", RELEASED_ORDER), ("gate_source", "input")):
        if getattr(layer, name) != theirs:
            warnings.warn(
                f"Weights of the authors' code are for {name}={theirs!r}, and the model has {getattr(layer, name)!r}",
                stacklevel=3,
            )


def _other_heads(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Starts of the names of heads that are for another number of classes."""
    other = []
    for head in HEADS:
        theirs, ours = state.get(f"{head}.weight"), expected.get(f"{head}.weight")
        if theirs is None or ours is None or theirs.dim() != 2:
            continue
        if theirs.shape[1] == ours.shape[1] and theirs.shape[0] != ours.shape[0]:
            other.append(f"{head}.")
    return tuple(other)


def _complete_names(model: nn.Module) -> set[str]:
    """The entries of such a model with nothing left away."""
    whole = {"num_classes": 1, "global_pool": "avg", "distillation": True}
    with torch.device("meta"):
        return set(type(model)(**{**model.init_arguments, **whole}).state_dict())


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _sizes(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(dims, depths) of the stages that ``state`` holds."""
    dims: dict[int, int] = {}
    depths: dict[int, int] = {}
    for name, value in state.items():
        if match := _BLOCK.fullmatch(name):
            stage, block = int(match[1]), int(match[2])
            dims[stage] = value.shape[0] if value.dim() else 0
            depths[stage] = max(depths.get(stage, 0), block + 1)
    return tuple(dims[i] for i in sorted(dims)), tuple(depths[i] for i in sorted(depths))


def _other_sizes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """A sentence where the checkpoint is of another size."""
    theirs, ours = _sizes(state), _sizes(expected)
    stages = len(ours[0])
    if not theirs[0] or all(a[:stages] == b for a, b in zip(theirs, ours, strict=True)):
        return ""
    known = [name for name, size in SIZES.items() if (size["dims"], size["depths"]) == theirs]
    is_one = f" ({known[0]})" if known else ""
    return (
        f"It is of another size: dims {theirs[0]} and depths {theirs[1]}{is_one} in place of dims {ours[0]} and depths "
        f"{ours[1]}. "
    )


def _other_groups(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """A sentence where the checkpoint has another number of channel groups."""
    theirs, ours = (
        next((len(value) for name, value in tensors.items() if _GROUPS.fullmatch(name) and value.dim()), None)
        for tensors in (state, expected)
    )
    return "" if None in (theirs, ours) or theirs == ours else f"It has {theirs} groups in place of {ours}. "
