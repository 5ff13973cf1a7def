# SPDX-License-Identifier: Apache-2.0
"""The models' sizes, where their weights come from, and how a checkpoint is read."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, generate_default_cfgs, load_state_dict_from_hf

from groupmamba.checksum import check

SIZES = {
    "groupmamba_tiny": {"stem_dim": 32, "dims": (64, 128, 348, 448), "depths": (3, 4, 9, 3)},
    "groupmamba_small": {"stem_dim": 64, "dims": (64, 128, 348, 512), "depths": (3, 4, 16, 3)},
    "groupmamba_base": {"stem_dim": 64, "dims": (96, 192, 424, 512), "depths": (3, 6, 21, 3)},
}

# Training checkpoints of timm and of the authors' code hold their configuration; this lets torch read it, the latter
# without the package that defines it, as the dictionary that it is. Nothing of the file is executed.
SAFE_TYPES = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]

# What save_pretrained and timm's save_for_hf write, in the order of preference.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")


def _cfg(size: str) -> dict:
    return {
        "hf_hub_id": f"Abdelrahman-shaker/GroupMamba-{size.capitalize()}",
        "hf_hub_filename": f"groupmamba_{size}_ema.pth",  # a dictionary of tensors, read with weights_only=True
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
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


def weights_file(path: str | os.PathLike) -> str:
    """The checkpoint at ``path``: the file itself, or that of a folder of ``save_pretrained`` or ``save_for_hf``.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError: there is no such file, or none in the folder.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"weights must be a path, got {type(path).__name__}")
    path = os.fspath(path)
    if os.path.isfile(path):
        return path
    for name in FOLDER_FILES:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    names = ", ".join(FOLDER_FILES)
    raise FileNotFoundError(
        f"weights must be the path of a checkpoint, or of a folder with one of {names}, got {path!r}"
    )


def read_checkpoint(path: str) -> object:
    """What the file holds, on the CPU: safetensors by its name, or anything that torch reads without executing it.

    A safetensors file that this project wrote is compared with its checksum.

    Raises:
        RuntimeError: the file can't be read so, or is damaged.
    """
    if path.endswith(".safetensors"):
        check(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path, device="cpu")
        with torch.serialization.safe_globals(SAFE_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on bytes that are no checkpoint has any type
        raise RuntimeError(
            f"no checkpoint that can be read safely ({type(error).__name__}: {_cause(error)})"
        ) from error


def _cause(error: Exception) -> str:
    """Of an error of ``torch.load`` the cause, without its advice to execute what the file says."""
    text = str(error)
    return text.rpartition("WeightsUnpickler error: ")[2].partition("Check the documentation")[0].strip() or text


def find_checkpoint(cfg: PretrainedCfg, cache_dir: str | os.PathLike | None = None) -> tuple[object, str]:
    """The checkpoint that timm's configuration names, and in words where it is.

    Raises:
        RuntimeError: it can't be had, or can't be read safely.
    """
    if cfg.source != "hf-hub":
        if cfg.state_dict:
            return cfg.state_dict, "the state_dict of pretrained_cfg"
        if cfg.file:
            try:
                path = weights_file(cfg.file)
                return read_checkpoint(path), f"weights={path!r}"
            except (FileNotFoundError, RuntimeError) as error:
                raise RuntimeError(f"weights={cfg.file!r} could not be loaded: {error}") from error
    if cfg.hf_hub_id:
        return _from_hub(cfg, cache_dir)
    if cfg.url:
        options = {"map_location": "cpu", "weights_only": True, "model_dir": cache_dir, "progress": False}
        try:
            with torch.serialization.safe_globals(SAFE_TYPES):
                return torch.hub.load_state_dict_from_url(cfg.url, **options), cfg.url
        except Exception as error:  # whatever a network and an unpickler do
            raise RuntimeError(f"the weights of {cfg.url} could not be loaded ({type(error).__name__})") from error
    raise RuntimeError("pretrained_cfg names no weights (file, state_dict, hf_hub_id or url)")


def _from_hub(cfg: PretrainedCfg, cache_dir: str | os.PathLike | None) -> tuple[object, str]:
    name = cfg.hf_hub_filename
    where = f"the file {name} of huggingface.co/{cfg.hf_hub_id}" if name else f"huggingface.co/{cfg.hf_hub_id}"
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            filename = {"filename": name} if name else {}
            return load_state_dict_from_hf(cfg.hf_hub_id, cache_dir=cache_dir, **filename), where
    except Exception as error:  # as in read_checkpoint, and whatever a network does
        raise RuntimeError(
            f"the weights could not be loaded ({type(error).__name__}). With pretrained=True they are {where}; without "
            f"a network give that file, or another checkpoint of the authors' code or of this project: "
            f"{cfg.architecture}(weights='path/to/{name or FOLDER_FILES[0]}')"
        ) from error
