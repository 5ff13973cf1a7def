# SPDX-License-Identifier: Apache-2.0
"""GroupMamba (Shaker et al., CVPR 2025, arXiv 2407.13772): image models of modulated group Mamba layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.fx import Proxy

from groupmamba.layers import GroupedMamba2d
from groupmamba.layers._checks import positive_int, rate, sequence
from groupmamba.layers.grouped_mamba import directions_and_groups
from groupmamba.layers.plain import Plain, why_called
from groupmamba.layers.token_norm import LayerNorm, TokenNorm
from groupmamba.layers.tracing import any_size, keepable
from groupmamba.layers.variants import VARIANTS
from groupmamba.layers.weight_decay import no_weight_decay
from groupmamba.models.blocks import BLOCK_EPS, ClassBlock, Stage, Stem
from groupmamba.models.build import build, chosen_stages
from groupmamba.models.hub import HubModel
from groupmamba.models.pretrained import SIZES, default_cfgs  # noqa: F401  timm's registry looks for default_cfgs here
from groupmamba_ext._checks import boolean

_MAP = Plain(nn.Identity)


class GroupMamba(
    nn.Module,
    HubModel,
    library_name="groupmamba",
    paper_url="https://arxiv.org/abs/2407.13772",
    pipeline_tag="image-classification",
    tags=["groupmamba", "timm"],
):
    """Stem, four stages of blocks, a class block on the pooled image, and a head; by default as the authors' code.

    Args:
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for none.
        global_pool: ``"avg"``, or ``""`` for the map of the last stage in place of pooled features. Class block, last
            norm and heads are not there then, and ``num_classes`` becomes 0.
        stem_dim, dims, depths, mlp_ratios: sizes; all but the first have one entry a stage. Each of ``dims`` must be a
            multiple of the number of groups: 8 groups need others than the released ones, such as (64, 128, 352, 448).
        variant, scan, affinity, d_state, directions, groups, gate_source: of every
            :class:`~groupmamba.GroupedMamba2d`. With ``variant="paper"`` stem and blocks are the paper's too, see
            :mod:`groupmamba.models.blocks`.
        distillation: a second head, for a teacher's labels. Its output is averaged with the first's; in training
            after ``set_distilled_training(True)`` the pair is returned.
        drop_rate: dropout before the heads.
        drop_path_rate: rises linearly over all blocks to this.

    Shape:
        (batch, in_chans, H, W), H and W at least 32, to (batch, num_classes). Images in ``torch.channels_last`` format
        are used without a copy; so are models, whose only 4-D weights are convolutions.

    Under autocast the residual stream is low precision, see :class:`~groupmamba.layers.token_norm.TokenNorm`.

    State: weights of the authors' code become this model's by :func:`groupmamba.convert_released_state_dict`.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are those of the Hugging Face hub (safetensors and the
    arguments above as config.json, in which timm finds what it needs too).

    The maps of the stages pass ``stage_maps``, modules that do nothing, for hooks and for timm's feature extractors;
    calls that nobody can see are left out.

    Raises:
        ValueError: sizes that are not one a stage or no multiples of the number of groups, an unknown ``global_pool``,
            or what the layer refuses.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        dims: Sequence[int] = (64, 128, 348, 448),
        depths: Sequence[int] = (3, 4, 9, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        variant: str = "released",
        scan: str = "grouped",
        affinity: bool = True,
        d_state: int = 1,
        directions: Sequence[str] | None = None,
        groups: int | None = None,
        gate_source: str = "input",
        distillation: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        positive_int("in_chans", in_chans)
        positive_int("stem_dim", stem_dim)
        boolean("", "distillation", distillation)
        rate("drop_rate", drop_rate)
        rate("drop_path_rate", drop_path_rate)
        for dim in sequence("dims", dims):
            positive_int("dims", dim)
        sequence("depths", depths)
        sequence("mlp_ratios", mlp_ratios)
        for name, sizes in (("depths", depths), ("mlp_ratios", mlp_ratios)):
            if len(sizes) != len(dims):
                raise ValueError(f"{name} must have one entry a stage ({len(dims)}), got {tuple(sizes)}")
        for depth in depths:
            positive_int("depths", depth)
        directions, groups = directions_and_groups(variant, scan, directions, groups)
        _check_dims(dims, groups)
        options = {
            "variant": variant,
            "scan": scan,
            "affinity": affinity,
            "d_state": d_state,
            "directions": directions,
            "groups": groups,
            "gate_source": gate_source,
        }
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.distillation = distillation
        self.distilled_training = False
        self.grad_checkpointing = False

        self.stem = Stem(in_chans, stem_dim, dims[0], paper=VARIANTS[variant].paper_stem)
        blocks = sum(depths)
        rates = [drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)]
        ends = list(itertools.accumulate(depths, initial=0))
        self.stages = nn.ModuleList(
            Stage(dims[max(i - 1, 0)], dim, depths[i], mlp_ratios[i], rates[ends[i] : ends[i + 1]], i > 0, **options)
            for i, dim in enumerate(dims)
        )
        # Behind all stages but the last, and in front of the next one's downsampling.
        self.stage_norms = nn.ModuleList(TokenNorm(dim, eps=BLOCK_EPS) for dim in dims[:-1])
        self.stage_maps = nn.ModuleList(nn.Identity() for _ in dims)
        self.class_block = self.norm = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stage_maps.{i}"} for i, dim in enumerate(dims)
        ]
        self._class_options = {"mlp_ratio": mlp_ratios[-1], **options}
        self._set_outputs(_class_count(num_classes), _pool(global_pool))
        self.apply(_init_weights)

    def _set_outputs(self, num_classes: int, global_pool: str) -> list[nn.Module]:
        """What stands behind the last stage: a class block and norm where there is none yet, and new heads; or nothing.

        Returns the new modules.
        """
        pools = global_pool == "avg"
        self.global_pool, self.num_classes = global_pool, num_classes if pools else 0
        new: list[nn.Module] = []
        if not pools:
            self.class_block = self.norm = nn.Identity()
        elif isinstance(self.class_block, nn.Identity):
            self.class_block = ClassBlock(self.num_features, **self._class_options)
            self.norm = LayerNorm(self.num_features, eps=BLOCK_EPS)
            new += [self.class_block, self.norm]

        def head() -> nn.Module:
            return nn.Linear(self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

        self.head = head()
        self.dist_head = head() if self.distillation else None
        return [*new, self.head, *([self.dist_head] if self.distillation else [])]

    def init_weights(self) -> None:
        """The released initialisation of everything; also gives a model made on the meta device its values after
        ``to_empty``."""
        for module in self.modules():
            if isinstance(module, (GroupedMamba2d, nn.LayerNorm, nn.BatchNorm2d)):
                module.reset_parameters()
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """What is not decayed: ``A_log``, ``D``, step biases, and the norms and biases that are stacked by group.

        The latter have two dimensions, so that the usual rule (vectors are not decayed) does not find them.
        """
        return no_weight_decay(self)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters for layer-wise learning rates: the stem, each block, the heads.

        A stage's norm and the downsampling behind it belong to the next stage's first block, class block and last norm
        to the last block. ``coarse``: stages in place of blocks.
        """
        first = () if coarse else (0,)
        blocks = [(rf"^stage_norms\.{i}\.", (i + 1, *first)) for i in range(len(self.stage_norms))]
        if coarse:
            blocks.append((r"^stages\.(\d+)", None))
        else:
            blocks += [(r"^stages\.(\d+)\.downsample", first), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": [*blocks, (r"^(?:class_block|norm)\.", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass in place of keeping what it computed."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training return (head, distillation head) in place of their mean.

        Raises:
            ValueError: the model was made with ``distillation=False``.
        """
        if enable and not self.distillation:
            raise ValueError("set_distilled_training needs a model with distillation=True")
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return self.head if self.dist_head is None else (self.head, self.dist_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for ``num_classes`` (0 for none), and another ``global_pool`` if given.

        ``global_pool=""`` takes class block and norm away; ``"avg"`` after that makes new ones.

        Raises:
            ValueError: a negative ``num_classes``, an unknown ``global_pool``, or classes without pooling.
        """
        num_classes = _class_count(num_classes)
        global_pool = self.global_pool if global_pool is None else _pool(global_pool)
        if num_classes > 0 and global_pool == "":
            raise ValueError(f"num_classes must be 0 with global_pool='', which has no heads, got {num_classes}")
        like = self.stem.proj.weight
        with torch.device(like.device):
            new = self._set_outputs(num_classes, global_pool)
        for module in new:
            module.apply(_init_weights).to(like.dtype).train(self.training)
        self._note_outputs()

    def _note_outputs(self) -> None:
        """What save_pretrained writes to config.json."""
        self.init_arguments.update(num_classes=self.num_classes, global_pool=self.global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The normed outputs of stages 1 to 3 and the raw output of the last, those that ``indices`` choose.

        Args:
            x: (batch, in_chans, H, W).
            indices: the last n if int, all if None, or these.
            norm: without effect: no norm of the image follows the last stage.
            stop_early: leave out the stages behind the last one chosen.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: leave out the final map.

        Returns:
            The maps, or the final map and the maps.

        Raises:
            ValueError: an unknown ``output_fmt``, or ``indices`` of stages that aren't there.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take = chosen_stages("indices", indices, len(self.stages))
        last = max(take)

        def out(t: Tensor) -> Tensor:
            return keepable(t.permute(0, 3, 1, 2)) if output_fmt == "NCHW" else t

        intermediates = []
        watched = self._maps_are_watched(x)
        with any_size():
            x = self.stem(x)
            for i, stage in enumerate(self.stages):
                x = self._map(i, stage(x), watched)
                if i in take:
                    intermediates.append(out(x))
                if stop_early and i == last:
                    break
        return intermediates if intermediates_only else (out(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen intermediates do not need; returns their indices.

        Without the head, or the last stage, ``global_pool`` is ``""`` from then on: the model's own output is the last
        map that is left.
        """
        take = chosen_stages("indices", indices, len(self.stages))
        last = max(take)
        shorter = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.stage_norms = self.stage_norms[: last + 1]
        self.stage_maps = self.stage_maps[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self._set_outputs(0, "")
            self._note_outputs()
        elif prune_norm:
            self.norm = nn.Identity()
        return list(take)

    def _maps_are_watched(self, x: Tensor) -> bool:
        """True where a call of ``stage_maps`` can be seen: by a hook, or by torch.fx while it traces."""
        maps = self.stage_maps._modules
        return isinstance(x, Proxy) or why_called(maps, [(name, _MAP) for name in maps]) is not None

    def _map(self, i: int, x: Tensor, watched: bool) -> Tensor:
        """The output of stage i, normed but for the last stage's; in and out (batch, H, W, C)."""
        if i < len(self.stage_norms):
            x = self.stage_norms[i](x)
        return self.stage_maps[i](keepable(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1) if watched else x

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) to the last map, (batch, C, H / 32, W / 32)."""
        watched = self._maps_are_watched(x)
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = self._map(i, stage(x), watched)
        return keepable(x.permute(0, 3, 1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Mean over the map, class block, norm, heads; ``pre_logits`` stops before the heads."""
        if self.global_pool == "":
            return x
        tokens = x.permute(0, 2, 3, 1)  # as they lie in memory, and so will their gradient, which would be copied else
        t = self.head_drop(self.norm(self.class_block(tokens.mean((1, 2)))))
        if pre_logits:
            return t
        if self.dist_head is None:
            return self.head(t)
        first, second = self.head(t), self.dist_head(t)
        if self.distilled_training and self.training:
            return first, second
        return (first + second) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with any_size():
            return self.forward_head(self.forward_features(x))


def _check_dims(dims: Sequence[int], groups: int) -> None:
    for dim in dims:
        if positive_int("dims", dim) % groups:
            below = dim // groups * groups
            near = f"{below} and {below + groups} are" if below else f"{groups} is"
            raise ValueError(
                f"dims must be multiples of {groups}, the number of groups, got {dim} in {tuple(dims)}: {near}"
            )


def _class_count(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"num_classes must be an int of at least 0, got {value!r}")
    return value


def _pool(value: str) -> str:
    if value not in ("avg", ""):
        raise ValueError(
            f"global_pool must be 'avg' or '', got {value!r}: the class block is made for the mean of the last map"
        )
    return value


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # The authors' code cuts the distribution at +-2, a hundred deviations.
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _create(name: str, pretrained: bool, **kwargs: Any) -> GroupMamba:
    return build(GroupMamba, name, pretrained, **{**SIZES[name], **kwargs})


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-T: 23.4 M parameters with both heads, 4.66 G multiply-adds at 224 x 224 (the paper: 4.5 G).

    Args:
        pretrained: load the authors' ImageNet weights from the Hugging Face hub.
        kwargs: ``weights``, the path of a checkpoint to load instead, of this project or of the authors' code (in a
            training checkpoint the averaged weights are preferred), or of a folder that ``save_pretrained`` or timm's
            ``save_for_hf`` wrote; the others go to :class:`GroupMamba` and to timm's builder: ``features_only``,
            ``out_indices``, ``feature_cls`` (``"getter"``, ``"hook"`` or ``"fx"``), ``pretrained_cfg_overlay``, ...

    Every entry of a checkpoint has to fit, but for heads where ``num_classes`` differs, which are left out with a
    warning, and the first convolution where ``in_chans`` is not 3, which timm adapts.

    Raises:
        FileNotFoundError: ``weights`` is no file, and no folder with a checkpoint.
        RuntimeError: the weights can't be had, can't be read safely, or do not fit.
        ValueError: an option that these models do not have: other ``global_pool``, ``output_stride``, ``img_size``.
    """
    return _create("groupmamba_tiny", pretrained, **kwargs)


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-S: 34.8 M parameters, 7.22 G multiply-adds (the paper: 7.0 G). See :func:`groupmamba_tiny`."""
    return _create("groupmamba_small", pretrained, **kwargs)


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-B: 57.2 M parameters, 14.1 G multiply-adds (the paper: 14 G). See :func:`groupmamba_tiny`."""
    return _create("groupmamba_base", pretrained, **kwargs)
