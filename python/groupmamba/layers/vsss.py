# SPDX-License-Identifier: Apache-2.0
"""The visual single selective scan block: a Mamba and a feed-forward network, both pre-normed and residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from groupmamba.layers._checks import image_input, parameter_dtype, positive_int, scaled_width
from groupmamba.layers.group_core import GroupCore
from groupmamba.layers.plain import floating_parameter
from groupmamba.layers.tracing import Leaf, fx_call
from groupmamba_ext._checks import choice
from groupmamba_ext.directions import DIRECTIONS
from groupmamba_ext.transforms import layer_norm

NORM_EPS = 1e-6


def _grouped_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the D channels of each group: x (batch, H, W, G, D), weight and bias (G, D)."""
    return torch.addcmul(bias, layer_norm(x, None, None, NORM_EPS), weight)


class GroupedVSSS(Leaf, nn.Module):
    r"""G independent VSSS blocks side by side on the channels of one image (GroupMamba, arXiv 2407.13772).

    For each group of D channels, with its own parameters and scan direction:

    .. code-block:: text

        Z'  = Z  + Mamba(LayerNorm(Z))
        Z'' = Z' + fc2(gelu(fc1(LayerNorm(Z'))))                                       eps 1e-6

    State, with M = int(mlp_ratio * D): ``norm1_weight``, ``norm1_bias``, ``norm2_weight``, ``norm2_bias`` (G, D),
    ``mamba.*`` as in :class:`~groupmamba.layers.group_core.GroupCore`, ``fc1_weight`` (G, M, D), ``fc1_bias`` (G, M),
    ``fc2_weight`` (G, D, M), ``fc2_bias`` (G, D).

    Args:
        groups, dim: G and D.
        mlp_ratio: M / D.
        others: as in :class:`~groupmamba.layers.group_core.GroupCore`.

    Shape:
        (batch, G * D, H, W) or (G * D, H, W), and the same out, stored channels-last.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """

    def __init__(
        self,
        groups: int,
        dim: int,
        *,
        directions: Sequence[str],
        scan: str = "grouped",
        mlp_ratio: float = 4.0,
        d_state: int = 1,
        d_conv: int = 3,
        expand: float = 1.0,
        dt_rank: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.groups = positive_int("groups", groups)
        self.dim = positive_int("dim", dim)
        hidden = scaled_width("mlp_ratio", mlp_ratio, dim)
        parameter_dtype(dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(groups, *shape, device=device, dtype=dtype))

        self.norm1_weight = parameter(dim)
        self.norm1_bias = parameter(dim)
        self.mamba = GroupCore(
            groups,
            dim,
            directions=directions,
            scan=scan,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            device=device,
            dtype=dtype,
        )
        self.norm2_weight = parameter(dim)
        self.norm2_bias = parameter(dim)
        self.fc1_weight = parameter(hidden, dim)
        self.fc1_bias = parameter(hidden)
        self.fc2_weight = parameter(dim, hidden)
        self.fc2_bias = parameter(dim)
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        for weight in (self.norm1_weight, self.norm2_weight):
            nn.init.ones_(weight)
        for weight in (self.fc1_weight, self.fc2_weight):
            nn.init.normal_(weight, std=0.02)
        for bias in (self.norm1_bias, self.norm2_bias, self.fc1_bias, self.fc2_bias):
            nn.init.zeros_(bias)

    def reset_parameters(self) -> None:
        """Norms 1 and 0, feed-forward weights normal of deviation 0.02, biases 0, the Mamba its own."""
        self.mamba.reset_parameters()
        self._reset_own_parameters()

    def _feed_forward(self, x: Tensor) -> Tensor:  # (batch, H, W, G, D)
        batch, height, width, groups, dim = x.shape
        rows = x.flatten(0, 2).transpose(0, 1)
        hidden = F.gelu(torch.baddbmm(self.fc1_bias.unsqueeze(1), rows, self.fc1_weight.mT))
        rows = torch.baddbmm(self.fc2_bias.unsqueeze(1), hidden, self.fc2_weight.mT)
        return rows.view(groups, batch, height, width, dim).permute(1, 2, 3, 0, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return fx_call(self, x)
        image_input(x, self.groups * self.dim, floating_parameter(self, "norm1_weight"))
        z = (x if x.dim() == 4 else x.unsqueeze(0)).permute(0, 2, 3, 1).contiguous()
        z = z.unflatten(-1, (self.groups, self.dim))
        # z comes first in both sums: the result then has its token-major strides.
        z = z + self.mamba(_grouped_layer_norm(z, self.norm1_weight, self.norm1_bias))
        z = z + self._feed_forward(_grouped_layer_norm(z, self.norm2_weight, self.norm2_bias))
        y = z.flatten(-2).permute(0, 3, 1, 2)
        return y if x.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, dim={self.dim}, mlp_hidden={self.fc1_bias.shape[1]}"


class VSSSBlock(GroupedVSSS):
    """One group's VSSS block: its Mamba along one direction and its feed-forward network.

    ``GroupedMamba2d(G * dim, variant="paper")`` is G of these on ``dim`` channels each, with parameters stacked, and
    the affinity. The state has the names and shapes of :class:`GroupedVSSS` with G = 1.

    Args:
        dim: channels.
        direction: one of ``"lr"``, ``"rl"``, ``"tb"``, ``"bt"``.
        mlp_ratio: hidden width of the feed-forward network over ``dim``.
        d_state, d_conv, expand, dt_rank, device, dtype: as in :class:`groupmamba.GroupedMamba2d`.

    Shape:
        (batch, dim, H, W) or (dim, H, W), and the same out, stored channels-last.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """

    def __init__(
        self,
        dim: int,
        *,
        direction: str = "lr",
        mlp_ratio: float = 4.0,
        d_state: int = 1,
        d_conv: int = 3,
        expand: float = 1.0,
        dt_rank: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        choice("", "direction", direction, DIRECTIONS)
        super().__init__(
            1,
            dim,
            directions=(direction,),
            mlp_ratio=mlp_ratio,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            device=device,
            dtype=dtype,
        )
