# SPDX-License-Identifier: Apache-2.0
"""Modules of other projects, imported from a checkout that the user names; nothing of theirs is copied or built here.

Both checkouts keep their models in ``classification/models``, as a package that imports its own files relatively. It is
imported under a name of its own, without running its ``__init__``, without leaving bytecode in the checkout, and with
the settings restored that importing it changes for the whole process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from groupmamba import convert_released_state_dict

FILES = {"released": "groupmamba.py", "vmamba": "vmamba.py"}


def checkout(kind: str, path: Path) -> Path:
    """The folder of the models of a checkout.

    Raises:
        ValueError: ``path`` is none.
    """
    folder = path / "classification" / "models"
    if not (folder / FILES[kind]).is_file():
        raise ValueError(f"must be a checkout with classification/models/{FILES[kind]}, got '{path}'")
    return folder.resolve()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, prints, bytecode files or changed cuDNN settings."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.dont_write_bytecode = bytecode
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = before


def load(kind: str, path: Path, module: str) -> types.ModuleType:
    """``classification/models/{module}.py`` of a checkout.

    Raises:
        ValueError: ``path`` is no such checkout.
        ImportError: something that it imports is missing.
    """
    name = f"_bench_{kind}_models"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(checkout(kind, path))]
        sys.modules[name] = package
    with _quiet():
        return importlib.import_module(f"{name}.{module}")


def copy_weights(layer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a module of the released code the weights ``state`` of this project's.

    The inverse of :func:`groupmamba.convert_released_state_dict`, found by sending numbered tensors through it.
    """
    released = layer.state_dict()
    names = list(released)
    numbered = {name: torch.full(t.shape, i, dtype=torch.float64) for i, (name, t) in enumerate(released.items())}
    with torch.no_grad():
        for new, numbers in convert_released_state_dict(numbered).items():
            single = numbers.unique().numel() == 1
            for part, source in ((numbers, state[new]),) if single else zip(numbers, state[new], strict=True):
                target = released[names[int(part.flatten()[0])]]
                target.copy_(source.reshape(target.shape))


def released_layer(path: Path, channels: int, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """The released ``GroupMambaLayer`` with this project's weights, as a module on (batch, C, H, W) images."""
    layer = load("released", path, "groupmamba").GroupMambaLayer(channels, channels).to(device)
    copy_weights(layer, state)
    return _OnImages(layer)


class _OnImages(nn.Module):
    """A module that takes tokens and the image's size, on images."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return self.layer(x.flatten(2).transpose(1, 2), height, width).transpose(1, 2).unflatten(2, (height, width))
