# SPDX-License-Identifier: Apache-2.0
"""The backbone of mmdetection and mmsegmentation, under the name by which forks of these call it: ``MM_GroupMamba``.

Importing this module registers it with mmengine's root registry, where those of mmdetection, mmsegmentation and
mmpretrain look too. In a configuration:

.. code-block:: python

    custom_imports = dict(imports=["groupmamba.vision.mm"], allow_failed_imports=False)
    model = dict(
        backbone=dict(_delete_=True, type="MM_GroupMamba", pretrained="groupmamba_tiny.pth", drop_path_rate=0.2),
        neck=dict(type="FPN", in_channels=[64, 128, 348, 448], out_channels=256, num_outs=5),
    )
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn

try:
    from mmengine.registry import MODELS
except ImportError as error:
    raise ImportError(f"groupmamba.vision.mm needs {error.name}: pip install mmengine") from error

import groupmamba.models  # noqa: F401  registers them
from groupmamba.checkpoints import convert_released_state_dict, is_released_state_dict, unwrap_checkpoint
from groupmamba.layers.tracing import keepable
from groupmamba.models.blocks import BLOCK_EPS
from groupmamba.models.build import chosen_stages
from groupmamba.models.pretrained import read_checkpoint, weights_file

NAME, STAGES = "MM_GroupMamba", 4


class MMGroupMamba(nn.Module):
    """GroupMamba as a backbone of the OpenMMLab projects.

    The defaults are the tiny model's. Names that are not explained here are those of the authors' code.

    Args:
        embed_dims, depths, mlp_ratios: of the four stages.
        stem_hidden_dim: channels inside the stem.
        drop_path_rate: rises linearly over all blocks to this.
        out_indices: the stages whose maps are returned.
        pretrained: a checkpoint of the authors' code or of this project, or None. Every entry of the backbone must fit.
        frozen_stages: so many stages, with the stem before the first, are not trained and stay in evaluation mode: 0
            the stem alone, -1 none.
        norm_eval: all BatchNorms, which are in the stem, stay in evaluation mode.
        in_chans: channels of the image.
        with_cp: blocks are computed again in the backward pass, to save memory.
        init_cfg: mmengine's; only None and ``dict(type="Pretrained", checkpoint=FILE)``.
        options: more of :func:`groupmamba.models.groupmamba_tiny`: ``variant``, ``d_state``, ``scan``, ... Taken and
            without effect, since a backbone has no head: ``num_classes``, ``distillation``, ``num_stages=4``,
            ``use_v2d``.

    Shape:
        (batch, in_chans, H, W), H and W at least 32, to a tuple of maps (batch, embed_dims[i], H / s, W / s), s = 4, 8,
        16 and 32, each normalised; the last one by the norm that the classifier has behind its class block.

    Raises:
        FileNotFoundError: ``pretrained`` is no file and no folder with a checkpoint.
        RuntimeError: the checkpoint can't be read, or does not fit.
        TypeError, ValueError: an option has a wrong type or value.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 348, 448),
        depths: Sequence[int] = (3, 4, 9, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        stem_hidden_dim: int = 32,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | os.PathLike | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        in_chans: int = 3,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        **options: Any,
    ):
        super().__init__()
        for name in ("num_classes", "distillation", "use_v2d"):
            options.pop(name, None)
        stages = options.pop("num_stages", STAGES)
        if stages != STAGES or len(embed_dims) != STAGES:
            raise ValueError(f"num_stages must be {STAGES}, got {stages!r} with embed_dims {tuple(embed_dims)}")
        if type(frozen_stages) is not int or not -1 <= frozen_stages <= STAGES:
            raise ValueError(f"frozen_stages must be from -1 to {STAGES}, got {frozen_stages!r}")
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.out_indices = chosen_stages("out_indices", tuple(out_indices), STAGES)
        weights = _checkpoint(pretrained, init_cfg)
        if weights is not None:
            options["weights"] = weights_file(weights)
        self.body = timm.create_model(
            "groupmamba_tiny",
            features_only=True,
            out_indices=self.out_indices,
            in_chans=in_chans,
            dims=tuple(embed_dims),
            depths=tuple(depths),
            mlp_ratios=tuple(mlp_ratios),
            stem_dim=stem_hidden_dim,
            drop_path_rate=drop_path_rate,
            **options,
        )
        self.norm = LayerNorm2d(embed_dims[-1], eps=BLOCK_EPS) if STAGES - 1 in self.out_indices else None
        if self.norm is not None and weights is not None:
            _fill_norm(self.norm, weights)
        if with_cp:
            self.body.model.set_grad_checkpointing(True)
        self.train()

    def init_weights(self) -> None:
        """mmengine's trainers call it: the constructor has given all weights their values."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.body(x)
        if self.norm is not None:
            maps[-1] = keepable(self.norm(maps[-1]))
        return tuple(maps)

    def train(self, mode: bool = True) -> MMGroupMamba:
        super().train(mode)
        if self.frozen_stages >= 0:
            model: Any = self.body.model
            parts = [model.stem, *model.stages[: self.frozen_stages], *model.stage_norms[: self.frozen_stages]]
            if self.frozen_stages == STAGES and self.norm is not None:
                parts.append(self.norm)
            for part in parts:
                part.eval().requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _fill_norm(norm: nn.Module, weights: str | os.PathLike) -> None:
    """The last norm of a classifier's checkpoint, where it has one."""
    state = dict(unwrap_checkpoint(read_checkpoint(weights_file(weights))))
    if is_released_state_dict(state):
        state = dict(convert_released_state_dict(state))
    if "norm.weight" in state:
        norm.load_state_dict({name: state[f"norm.{name}"] for name in ("weight", "bias")})


def _checkpoint(pretrained: str | os.PathLike | None, init_cfg: dict | None) -> str | os.PathLike | None:
    """Forks give the checkpoint by either argument, and an empty text where there is none."""
    if init_cfg is not None:
        if pretrained:
            raise ValueError(f"pretrained must be None beside init_cfg, got {pretrained!r}")
        if not isinstance(init_cfg, dict) or init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
            raise ValueError(f'init_cfg must be None or dict(type="Pretrained", checkpoint=FILE), got {init_cfg!r}')
        return init_cfg["checkpoint"]
    return pretrained or None


MODELS.register_module(name=NAME, module=MMGroupMamba)
