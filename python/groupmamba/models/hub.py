# SPDX-License-Identifier: Apache-2.0
"""Folders and repositories of models: the Hugging Face hub's own and timm's, each readable by the other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from timm.models import filter_pretrained_cfg

from groupmamba.checksum import check, with_checksum
from groupmamba.models.pretrained import SIZES, default_cfgs, read_checkpoint, weights_file
from groupmamba.models.weights import load_strictly

_HUB_ARGUMENTS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class HubModel(PyTorchModelHubMixin):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    config.json holds the constructor's arguments, and with them what timm needs for
    ``create_model("local-dir:FOLDER", pretrained=True)``. ``from_pretrained`` also takes folders of timm's
    ``save_for_hf``.
    """

    @property
    def init_arguments(self) -> dict:
        """The constructor's arguments that build this model as it is now."""
        return self._hub_mixin_config

    # timm's create_model notes what it was given, for save_for_hf. The constructor's arguments say more, and no path.
    @property
    def _model_args(self) -> dict:
        return {name: value for name, value in self.init_arguments.items() if value is not None}

    @_model_args.setter
    def _model_args(self, value: dict) -> None:
        pass

    def save_pretrained(self, save_directory: str | Path, *, config: dict | None = None, **options: Any) -> str | None:
        """As the hub's own, with timm's entries in config.json.

        Raises:
            ValueError: stages of this model were pruned away, so that no arguments of the constructor build it.
        """
        if len(self.stages) < len(self.init_arguments["dims"]):
            raise ValueError(
                f"save_pretrained needs all {len(self.init_arguments['dims'])} stages, got a model pruned to its first "
                f"{len(self.stages)}; save its state_dict instead"
            )
        return super().save_pretrained(save_directory, config=config or self._config_for_both(), **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        path = save_directory / SAFETENSORS_SINGLE_FILE
        path.write_bytes(with_checksum(path.read_bytes()))

    @classmethod
    def _load_as_safetensor(cls, model: HubModel, model_file: str, map_location: str, strict: bool) -> HubModel:
        try:
            check(model_file)
        except RuntimeError as error:
            raise RuntimeError(f"{cls.__name__}: {model_file!r} could not be loaded: {error}") from error
        return super()._load_as_safetensor(model, model_file, map_location, strict)

    def _config_for_both(self) -> dict:
        config = self.init_arguments
        sizes = {"stem_dim": config["stem_dim"], "dims": tuple(config["dims"]), "depths": tuple(config["depths"])}
        # Of other sizes any of the names will do: model_args hold them.
        architecture = next((name for name, known in SIZES.items() if known == sizes), "groupmamba_tiny")
        source = getattr(self, "pretrained_cfg", None) or default_cfgs[architecture].default.to_dict()
        cfg = filter_pretrained_cfg({k: v for k, v in source.items() if k != "state_dict"}, remove_source=True)
        cfg["num_classes"] = self.num_classes
        for name in ("input_size", "min_input_size"):
            if cfg.get(name):
                cfg[name] = (self.in_chans, *cfg[name][1:])
        cfg.pop("architecture", None)
        return {**config, "architecture": architecture, "model_args": self._model_args, "pretrained_cfg": cfg}

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict | None = None,
        map_location: str = "cpu",
        strict: bool = True,
        **options: Any,
    ) -> HubModel:
        config = config or {}
        hub = {name: options.pop(name) for name in _HUB_ARGUMENTS if name in options}
        options = {**SIZES.get(config.get("architecture"), {}), **config.get("model_args", {}), **options}
        if not strict or not os.path.isdir(model_id):
            return super()._from_pretrained(
                model_id=model_id, map_location=map_location, strict=strict, **hub, **options
            )
        path = weights_file(model_id)
        model = cls(**options)
        try:
            load_strictly(model, read_checkpoint(path))
        except RuntimeError as error:
            raise RuntimeError(f"{cls.__name__}: {path!r} could not be loaded: {error}") from error
        return model.to(map_location).eval()
