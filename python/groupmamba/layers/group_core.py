# SPDX-License-Identifier: Apache-2.0
"""The Mamba of each channel group, all groups at once: in_proj, convolution, scan along paths, out_proj."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

import groupmamba_ext as ext
from groupmamba.layers._checks import parameter_dtype, positive_int, scaled_width
from groupmamba.layers.plain import Plain
from groupmamba.layers.token_linear import token_linear
from groupmamba.layers.tracing import Leaf, fx_call
from groupmamba_ext._checks import boolean, choice
from groupmamba_ext.directions import Directions
from groupmamba_ext.layouts import MAX_STATES
from groupmamba_ext.transforms import layer_norm

SCANS = ("grouped", "cross")
NORM_EPS = 1e-5
STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 0.1, 1e-4
_CORE = (
    "in_proj_weight", "conv_weight", "conv_bias", "x_proj_weight", "dt_weight", "dt_bias", "A_log", "D",
    "out_norm_weight", "out_norm_bias",
)  # fmt: skip


class GroupCore(Leaf, nn.Module):
    r"""G independent Mambas over the image, one for each group of D channels, with their parameters stacked.

    .. code-block:: text

        u, z = split(in_proj_g(x_g));  u = silu(conv3x3_depthwise_g(u) + bias)
        dt, B, C = split(x_proj_g(u));  step = softplus(dt_g(dt) + dt_bias)           along the path of group g
        h_t = exp(step_t A) h_{t-1} + step_t B_t u_t;   y_t = C_t . h_t + D u_t;      A = -exp(A_log)
        o_g = out_proj_g( LayerNorm(y; out_norm, eps 1e-5) * silu(z) [* gate] )

    With ``scan="cross"`` every group is scanned along all K directions, each with its own x_proj, dt, A and D, and y is
    the sum over them (4-D scanning, the paper's ablation).

    With E = int(expand * D) scanned channels, N states and R = ceil(D / 16) step features (``dt_rank="auto"``), the
    state is ``in_proj_weight`` (G, 2E, D), ``conv_weight`` (G, E, 3, 3), ``conv_bias`` (G, E), ``x_proj_weight``
    (G, R + 2N, E), ``dt_weight`` (G, E, R), ``dt_bias`` (G, E), ``A_log`` (G, E, N), ``D`` (G, E), ``out_norm_weight``
    and ``out_norm_bias`` (G, E), ``out_proj_weight`` (G, D, E). With ``scan="cross"``, ``x_proj_weight``,
    ``dt_weight``, ``dt_bias``, ``A_log`` and ``D`` have K as a second dimension: (G, K, R + 2N, E) and so on.
    ``dt_bias``, ``A_log`` and ``D`` carry ``_no_weight_decay = True`` for training scripts that look for it, as Mamba's
    do; :func:`groupmamba.no_weight_decay` goes by names.

    Args:
        groups, dim: G and D.
        directions: one of ``"lr"``, ``"rl"``, ``"tb"``, ``"bt"`` for each group; with ``scan="cross"`` the K directions
            of every group.
        scan: ``"grouped"`` or ``"cross"``.
        d_state: N, up to 256.
        d_conv: 3, or 1 for no convolution (``u = silu(u)``, as released).
        expand: E / D.
        dt_rank: R, or ``"auto"``.
        out_proj: False leaves out_proj away, and the result has E channels a group.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        groups: int,
        dim: int,
        *,
        directions: Sequence[str],
        scan: str = "grouped",
        d_state: int = 1,
        d_conv: int = 3,
        expand: float = 1.0,
        dt_rank: int | str = "auto",
        out_proj: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.groups = positive_int("groups", groups)
        self.dim = positive_int("dim", dim)
        choice("", "scan", scan, SCANS)
        boolean("", "out_proj", out_proj)
        parameter_dtype(dtype)
        self.scan = scan
        self.directions = tuple(Directions.of(directions, None if scan == "cross" else groups))
        self.d_state = positive_int("d_state", d_state, MAX_STATES)
        if positive_int("d_conv", d_conv) not in (1, 3):
            raise ValueError(f"d_conv must be 1 or 3, got {d_conv!r}")
        self.d_conv = d_conv
        self.inner_dim = scaled_width("expand", expand, dim)
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f'dt_rank must be a positive int or "auto", got {dt_rank!r}')
        self.dt_rank = math.ceil(dim / 16) if isinstance(dt_rank, str) else positive_int("dt_rank", dt_rank)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(groups, *shape, device=device, dtype=dtype))

        inner, states, rank = self.inner_dim, self.d_state, self.dt_rank
        scans = (len(self.directions),) if scan == "cross" else ()
        self.in_proj_weight = parameter(2 * inner, dim)
        self.conv_weight = parameter(inner, 3, 3) if d_conv == 3 else None
        self.conv_bias = parameter(inner) if d_conv == 3 else None
        self.x_proj_weight = parameter(*scans, rank + 2 * states, inner)
        self.dt_weight = parameter(*scans, inner, rank)
        self.dt_bias = parameter(*scans, inner)
        self.A_log = parameter(*scans, inner, states)
        self.D = parameter(*scans, inner)
        self.out_norm_weight = parameter(inner)
        self.out_norm_bias = parameter(inner)
        self.out_proj_weight = parameter(dim, inner) if out_proj else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The released initialisation: steps log-uniform in [1e-3, 0.1], A = -(1..N), D = 1."""
        nn.init.normal_(self.in_proj_weight, std=0.02)
        if self.conv_weight is not None:
            nn.init.normal_(self.conv_weight, std=math.sqrt(2 / 9))  # fan_out of a depthwise 3x3 kernel: 9
            nn.init.zeros_(self.conv_bias)
        bound = self.inner_dim**-0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_weight, -bound, bound)
        log_step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(STEP_MIN), math.log(STEP_MAX))
        step = log_step.exp().clamp(min=STEP_FLOOR)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        states = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        for weight in (self.D, self.out_norm_weight):
            nn.init.ones_(weight)
        nn.init.zeros_(self.out_norm_bias)
        if self.out_proj_weight is not None:
            nn.init.normal_(self.out_proj_weight, std=0.02)
        for weight in (self.dt_bias, self.A_log, self.D):
            weight._no_weight_decay = True

    def plain(self) -> Plain:
        """What this module is where a layer may read it and not call it."""
        names = frozenset(name for name, p in self._parameters.items() if p is not None)
        fixed = ("d_conv", "scan", "directions")  # others show in the parameters' shapes, which the op checks
        return Plain(type(self), names, config=tuple((name, getattr(self, name)) for name in fixed))

    def core_parameters(self) -> list[Tensor]:
        """All but out_proj, as `groupmamba_ext.ops.grouped_mamba_layer.LayerParameters` names them."""
        held = self._parameters  # an attribute of a module costs a slow host a microsecond
        return [held[name] for name in _CORE]

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Runs every group along its path.

        Args:
            x: (batch, H, W, G, D); token-major and group-major storage are both read without a copy.
            gate: factors for the result before out_proj, (batch, G, E).

        Returns:
            (batch, H, W, G, D), or E channels a group without out_proj; stored group-major, (G, batch, H, W, D).
        """
        if isinstance(x, Proxy):
            return fx_call(self, x, gate)
        batch, height, width, groups, _ = x.shape

        def rows(image: Tensor) -> Tensor:  # (batch, H, W, G, K) -> (G, tokens, K)
            return image.flatten(0, 2).transpose(0, 1)

        def image(rows: Tensor) -> Tensor:  # (G, tokens, K) -> (batch, H, W, G, K)
            return rows.view(groups, batch, height, width, rows.shape[-1]).permute(1, 2, 3, 0, 4)

        # Splits come before the permutes: their gradients then are one concatenation in storage order.
        u, z = (image(t) for t in token_linear(rows(x), self.in_proj_weight).chunk(2, dim=-1))
        if self.conv_weight is not None:
            u = ext.depthwise_conv3x3(u, self.conv_weight, self.conv_bias, activation="silu")
        else:
            u = nn.functional.silu(u)
        # cuBLAS is several times slower where an output is not a multiple of 8 channels wide.
        x_proj = self.x_proj_weight.flatten(1, -2)  # with all directions of a cross scan in one product
        pad = -x_proj.shape[1] % 8 if u.is_cuda else 0
        features = token_linear(rows(u), nn.functional.pad(x_proj, (0, 0, 0, pad)))
        parts = (self.dt_rank, self.d_state, self.d_state)
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        A = -torch.exp(self.A_log.to(wide))
        step = {"dt_weight": self.dt_weight, "dt_bias": self.dt_bias, "directions": self.directions}
        if self.scan == "cross":
            features = image(features)[..., : x_proj.shape[1]].unflatten(-1, (len(self.directions), -1))
            dt, B, C = features.split(parts, dim=-1)
            y = self._norm_and_gates(ext.cross_selective_scan(u, dt, A, B, C, self.D, **step), z, gate)
        else:
            dt, B, C, _ = (image(t) for t in features.split((*parts, pad), dim=-1))
            y = ext.grouped_selective_scan(
                u, dt, A, B, C, self.D, z=z, norm_weight=self.out_norm_weight, norm_bias=self.out_norm_bias,
                norm_eps=NORM_EPS, gate=gate, **step,
            )  # fmt: skip
        if self.out_proj_weight is None:
            return y
        return image(token_linear(rows(y), self.out_proj_weight))

    def _norm_and_gates(self, y: Tensor, z: Tensor, gate: Tensor | None) -> Tensor:
        """What the grouped scan does in its own pass."""
        dtype = y.dtype
        y = torch.addcmul(self.out_norm_bias, layer_norm(y, None, None, NORM_EPS), self.out_norm_weight)
        y = y * nn.functional.silu(z)
        return (y if gate is None else y * gate[:, None, None]).to(dtype)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}in_proj_weight")
        if isinstance(found, Tensor) and found.dim() == 3 and found.shape[0] != self.groups:
            errors = args[-1]
            errors.append(
                f"{prefix}in_proj_weight is of {found.shape[0]} groups, and the layer has {self.groups} (directions "
                f"{self.directions}); weights of the authors' code need 4 groups"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, dim={self.dim}, inner_dim={self.inner_dim}, d_state={self.d_state}, "
            f"d_conv={self.d_conv}, dt_rank={self.dt_rank}, scan={self.scan!r}, directions={self.directions}"
        )
