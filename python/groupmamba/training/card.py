# SPDX-License-Identifier: Apache-2.0
"""What weights are for: the model, its options, its classes. It stands in the header of their safetensors file."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from groupmamba.training.option_table import check_model_kwargs
from groupmamba_ext._command import CommandError, UsageError, one_line

KEY = "groupmamba"
RUN_FILES = ("best.safetensors", "last.safetensors")


@dataclass
class Card:
    """Description of a checkpoint."""

    model: str
    num_classes: int
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    task: str = "classification"
    img_size: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    options: dict[str, Any] = field(default_factory=dict)  # of the task, beside those of the model

    def header(self) -> dict[str, str]:
        """For the header of a safetensors file, which holds text."""
        return {"format": "pt", KEY: json.dumps(asdict(self))}


def read_card(file: Path) -> Card | None:
    """The card of a safetensors file; None where it has none.

    Raises:
        CommandError: the file can't be read, or its card is of another version.
    """
    if file.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
    except Exception as error:  # safetensors has its own type, which is no OSError
        raise CommandError(f"{file} can't be read: {one_line(error)}") from error
    if text is None:
        return None
    try:
        card = Card(**json.loads(text))
        card.mean, card.std = tuple(card.mean), tuple(card.std)
        return card
    except (TypeError, ValueError) as error:
        raise CommandError(f"{file} has a card that this version can't read: {one_line(error)}") from error


def find_weights(path: str) -> Path:
    """The file of weights: itself, or a run's folder's best or last, or that of a folder with a model.

    Raises:
        CommandError: there is none.
    """
    from groupmamba.models.pretrained import FOLDER_FILES, weights_file

    for name in RUN_FILES:
        if (Path(path) / name).is_file():
            return Path(path) / name
    try:
        return Path(weights_file(path))
    except FileNotFoundError as error:
        names = ", ".join((*RUN_FILES, *FOLDER_FILES))
        raise CommandError(f"--weights {path} is no file, and no folder with one of {names}") from error


def create_model(name: str, option: str = "--model", /, **options: Any) -> nn.Module:
    """timm's ``create_model``, with this project's models registered; ``option`` is what errors call the name.

    Raises:
        UsageError: there is no such model, or it does not take an option.
        CommandError: its weights can't be had or do not fit.
    """
    import timm

    import groupmamba.models  # registers them

    assert groupmamba.models
    return made(name, lambda: timm.create_model(name, **options), option=option)


def _advice(error: str) -> str:
    """Which option gave the argument that a model refuses, with a semicolon before it."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", error)
    if "drop_path_rate" in error:
        return "; --drop-path 0 leaves that out"
    if unknown is None:
        return ""
    return "; --drop 0 leaves that out" if unknown[1] == "drop_rate" else f"; --model-kwargs {unknown[1]}=... gives it"


def made(name: str, make: Callable[[], nn.Module], *, option: str = "--model") -> nn.Module:
    """What ``make`` makes of the model ``name`` of this project or timm.

    Raises:
        UsageError: there is no such model, or it does not take an option.
        CommandError: its weights can't be had or do not fit.
    """
    import timm

    import groupmamba.models  # registers them

    assert groupmamba.models
    if not timm.is_model(name):
        names = ", ".join(timm.list_models("groupmamba*"))
        raise UsageError(f"{option} must be one of {names}, or another model of timm, got {name!r}")
    try:
        return make()
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"{option} {name} can't be made so: {one_line(error)}{_advice(str(error))}") from error
    except (RuntimeError, OSError) as error:
        raise CommandError(one_line(error)) from error


def check_images(model: nn.Module, name: str, size: tuple[int, int]) -> Any:
    """What the model makes of an image of ``size``, height and width, on the meta device, where nothing is computed;
    None where it has an op that this device does not have.

    Raises:
        UsageError: it does not take such images.
    """
    try:
        with torch.no_grad():
            return copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, *size, device="meta"))
    except NotImplementedError:
        return None
    except Exception as error:  # models of timm refuse a size with exceptions of any kind
        text = f"--model {name} does not take images of {size[0]} x {size[1]} pixels: {one_line(error)}"
        raise UsageError(text) from error


def check_classifier(model: nn.Module, name: str, size: int, num_classes: int) -> None:
    """UsageError unless the model makes ``num_classes`` values of an image of ``size`` x ``size`` pixels."""
    made = check_images(model, name, (size, size))
    shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
    if made is not None and shape != (1, num_classes):
        raise UsageError(f"--model {name} must make {num_classes} values, one a class, of an image; it makes {shape}")


def load(model: nn.Module, file: Path) -> list[str]:
    """Loads weights strictly; heads of another number of classes alone keep their values.

    Returns:
        What was said of them, and of options with which the weights were trained otherwise though they fit.

    Raises:
        CommandError: the file can't be read or does not fit.
    """
    from groupmamba.models import GroupMamba
    from groupmamba.models.pretrained import read_checkpoint
    from groupmamba.models.weights import load_strictly

    try:
        checkpoint = read_checkpoint(str(file))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if isinstance(model, GroupMamba):
                load_strictly(model, checkpoint)
            else:
                model.load_state_dict(state_of(checkpoint))
        return [*(one_line(warning.message) for warning in caught), *_other_options(model, file)]
    except RuntimeError as error:
        raise CommandError(f"{file} could not be loaded: {one_line(error)}") from error


def _other_options(model: nn.Module, file: Path) -> list[str]:
    """Lines on options of the layers that no shape of a weight shows, where those of a file's card differ."""
    from groupmamba.layers import GroupedMamba2d
    from groupmamba.layers.grouped_mamba import directions_and_groups

    layer = next((module for module in model.modules() if isinstance(module, GroupedMamba2d)), None)
    card = read_card(file)
    if layer is None or card is None:
        return []
    given = card.model_kwargs
    variant, scan = given.get("variant", "released"), given.get("scan", "grouped")
    directions, _ = directions_and_groups(variant, scan, given.get("directions"), given.get("groups"))
    trained = {"directions": directions, "gate_source": given.get("gate_source", "input")}
    return [
        f"{file} was trained with {name}={value!r}, and the model has {name}={getattr(layer, name)!r}"
        for name, value in trained.items()
        if value != getattr(layer, name)
    ]


def state_of(checkpoint: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint of any trainer.

    Raises:
        RuntimeError: it is none.
    """
    from groupmamba.checkpoints import unwrap_checkpoint

    try:
        return dict(unwrap_checkpoint(checkpoint))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error


def model_of(
    file: Path,
    name: str | None = None,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> tuple[nn.Module, Card]:
    """The model that a file of weights is for, filled with them, in evaluation mode.

    Args:
        file: the weights.
        name: the model, for files that do not say; must be the same in those that do.
        model_kwargs: its arguments, likewise.
        num_classes: for files that do not say; by default read off the weights.

    Raises:
        UsageError: ``name`` is needed, or it or ``model_kwargs`` differ from what the file says.
        CommandError: the file can't be read or does not fit.
    """
    check_model_kwargs(model_kwargs)
    card = read_card(file)
    if card is None and name is None:
        _read(file)
        raise UsageError(f"{file} does not say of which model it is: add --model, such as --model groupmamba_tiny")
    if card is not None and name not in (None, card.model):
        raise UsageError(f"--model {name} is not the {card.model} that {file} is for")
    bare = card is None
    if card is None:
        assert name is not None
        card = Card(name, num_classes or _classes_of(name, file), dict(model_kwargs or {}))
    else:
        _check_same(file, card, model_kwargs or {})
    if card.task != "classification":
        from groupmamba.training.dense import dense_model_of
        from groupmamba.training.task import task_of

        return dense_model_of(file, card, task_of(card.task)), card
    model = create_model(card.model, num_classes=card.num_classes, **card.model_kwargs)
    for line in load(model, file):
        raise CommandError(f"{file} could not be loaded: {line}")
    cfg = getattr(model, "pretrained_cfg", {})
    if bare:
        card.mean, card.std = tuple(cfg.get("mean", card.mean)), tuple(cfg.get("std", card.std))
        card.img_size = card.model_kwargs.get("img_size", cfg.get("input_size", (3, card.img_size))[-1])
        card.crop_pct, card.interpolation = cfg.get("crop_pct", card.crop_pct), cfg.get("interpolation", "bicubic")
    return model.eval(), card


def _check_same(file: Path, card: Card, model_kwargs: Mapping[str, Any]) -> None:
    """UsageError for an argument of the model that differs from the card's; JSON has lists where Python has tuples."""
    for name, value in model_kwargs.items():
        if name not in card.model_kwargs:
            raise UsageError(f"--model-kwargs {name}={value!r}: {file} has its model's arguments, and no {name}")
        said = card.model_kwargs[name]
        if json.dumps(value, default=repr) != json.dumps(said):
            raise UsageError(f"--model-kwargs {name}={value!r} is not the {name}={said!r} that {file} is for")


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, the authors' by the names that they have here."""
    from groupmamba.checkpoints import convert_released_state_dict, is_released_state_dict
    from groupmamba.models.pretrained import read_checkpoint

    try:
        state = state_of(read_checkpoint(str(file)))
        return dict(convert_released_state_dict(state)) if is_released_state_dict(state) else state
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"{file} could not be loaded: {one_line(error)}") from error


def _classes_of(name: str, file: Path) -> int:
    """The number of outputs of the classifier in a checkpoint of a model of that name."""
    import timm

    import groupmamba.models  # registers them

    assert groupmamba.models
    state = _read(file)
    if not timm.is_model(name):
        create_model(name)  # says so
    cfg = timm.models.get_pretrained_cfg(name)
    heads = (cfg.classifier if cfg is not None else None) or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        if f"{head}.weight" in state:
            return len(state[f"{head}.weight"])
    raise CommandError(f"{file} holds no classifier of {name} ({heads!r})")
