# SPDX-License-Identifier: Apache-2.0
"""The modulated group Mamba layer: four channel groups, each scanned along its own direction, and channel affinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

import groupmamba_ext as ext
from groupmamba.layers._checks import direction_names, image_input, parameter_dtype, positive_int
from groupmamba.layers.channel_affinity import ChannelAffinity
from groupmamba.layers.group_core import SCANS, GroupCore
from groupmamba.layers.plain import Plain, affine, call_on_rows, floating_parameter, layer_norm, linear, why_called
from groupmamba.layers.stochastic_depth import KeptImages, add
from groupmamba.layers.token_linear import token_linear
from groupmamba.layers.tracing import Leaf, fx_call
from groupmamba.layers.vsss import GroupedVSSS
from groupmamba_ext._checks import boolean, choice
from groupmamba_ext.layer_ops import can_fuse, grouped_mamba_layer, scan_constants

GROUPS = 4
PAPER_ORDER = ("lr", "rl", "tb", "bt")
RELEASED_ORDER = ("lr", "tb", "rl", "bt")
VARIANT_DIRECTIONS = {"released": RELEASED_ORDER, "fused": PAPER_ORDER, "paper": PAPER_ORDER}


class GroupedMamba2d(Leaf, nn.Module):
    r"""Modulated group Mamba layer (Shaker et al., GroupMamba, CVPR 2025, arXiv 2407.13772).

    The channels are split into four groups, each with its own Mamba (:class:`~groupmamba.layers.group_core.GroupCore`)
    and scan direction; channel affinity modulation (:class:`ChannelAffinity`) connects the groups. Variants:

    .. code-block:: text

        "released", as the authors' code computes it
            xn = LayerNorm(x; norm);  gate = affinity(xn);  o = Mamba of each group of xn
            out = proj(LayerNorm(o * skip_scale * xn * gate; norm again))
        "fused", one pass from scan to affinity
            xn, gate and the Mambas as above but without out_proj, the gate applied with the scan
            out = proj(y)
        "paper", the paper's equations
            out = VSSS block of each group of x * affinity(x)

    Args:
        dim: channels, a multiple of 4.
        variant: ``"released"``, ``"fused"`` or ``"paper"``.
        scan: ``"grouped"``: one direction a group. ``"cross"``: every group along all directions, each with its own
            parameters, and the results added (4-D scanning, the paper's ablation).
        affinity: False drops the channel affinity (the paper's ablation).
        d_state: states a channel, up to 256.
        d_conv: 3, or 1 for no depthwise convolution before the scan.
        expand: scanned channels over channels.
        dt_rank: step features a group, ``"auto"`` for ceil(dim / 64).
        directions: four of ``"lr"`` (row-major path over the image), ``"rl"`` (its reverse), ``"tb"`` (column-major),
            ``"bt"`` (its reverse). By default the variant's own: released (lr, tb, rl, bt), as weights of the authors'
            code need it; fused and paper (lr, rl, tb, bt). With ``scan="cross"`` any number of them, for every group.
        reduction: the affinity's hidden width is ``dim // reduction``.
        device, dtype: of the parameters.

    Shape:
        (batch, dim, H, W) or (dim, H, W), and the same out, stored channels-last; on CUDA its pixels lie a multiple
        of 8 channels apart. ``torch.channels_last`` inputs are used without a copy. Sizes of 0 are allowed.

    The input has the dtype of the parameters, or any that autocast converts. Norms, steps, states and gates are
    computed in float32 (float64 for float64).

    State: ``mamba.*`` (see :class:`~groupmamba.layers.group_core.GroupCore`; no ``out_proj_weight`` in the fused
    variant, more dimensions with ``scan="cross"``), ``norm.weight``, ``norm.bias`` (dim,), ``affinity.fc1.*``,
    ``affinity.fc2.*``, ``proj.weight`` (dim, dim), ``proj.bias`` and, released only, ``skip_scale`` (1,). The paper
    variant has ``vsss.*`` (see :class:`~groupmamba.layers.vsss.GroupedVSSS`) and ``affinity.*``. Weights of the
    authors' code are converted by :func:`groupmamba.convert_released_state_dict`.

    Raises:
        TypeError: an argument or the input has a wrong type or dtype.
        ValueError: an argument or the input's shape is wrong.
    """

    def __init__(
        self,
        dim: int,
        *,
        variant: str = "released",
        scan: str = "grouped",
        affinity: bool = True,
        d_state: int = 1,
        d_conv: int = 3,
        expand: float = 1.0,
        dt_rank: int | str = "auto",
        directions: Sequence[str] | None = None,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if positive_int("dim", dim) % GROUPS:
            raise ValueError(f"dim must be a multiple of {GROUPS}, got {dim}")
        choice("", "variant", variant, tuple(VARIANT_DIRECTIONS))
        choice("", "scan", scan, SCANS)
        boolean("", "affinity", affinity)
        positive_int("reduction", reduction)
        parameter_dtype(dtype)
        self.dim = dim
        self.variant = variant
        self.scan = scan
        directions = VARIANT_DIRECTIONS[variant] if directions is None else directions
        self.directions = direction_names(directions, None if scan == "cross" else GROUPS)
        place = {"device": device, "dtype": dtype}
        options = {
            "directions": self.directions,
            "scan": scan,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "dt_rank": dt_rank,
            **place,
        }
        if variant == "paper":
            self.vsss = GroupedVSSS(GROUPS, dim // GROUPS, **options)
            gates = dim
        else:
            self.norm = nn.LayerNorm(dim, **place)
            self.mamba = GroupCore(GROUPS, dim // GROUPS, out_proj=variant == "released", **options)
            gates = dim if variant == "released" else GROUPS * self.mamba.inner_dim
            self.proj = nn.Linear(gates, dim, **place)
            self.skip_scale = nn.Parameter(torch.empty(1, **place)) if variant == "released" else None
            # What every call would look up or work out again.
            self._one_op = scan == "grouped" and d_conv == 3
            self._inner_dim = self.mamba.inner_dim
            self._scan_constants = scan_constants(self.directions, self._inner_dim)
        self.affinity = ChannelAffinity(dim, reduction, out_dim=gates, **place) if affinity else None
        # What the fused paths read of these in place of calling them.
        self._parts = () if variant == "paper" else self._read_parts()
        self._reset_own_parameters()

    def _read_parts(self) -> tuple[tuple[str, Plain], ...]:
        affinity = () if self.affinity is None else (("affinity", self.affinity.plain()),)
        norm, proj = layer_norm(nn.LayerNorm, self.dim), linear(self.dim)
        return (("norm", norm), ("mamba", self.mamba.plain()), *affinity, ("proj", proj))

    def _why_called(self) -> str | None:
        """Why the layer calls its submodules one by one, None where it reads them: :func:`groupmamba.why_not_fused`."""
        return None if self.variant == "paper" else why_called(self._modules, self._parts)

    def _reset_own_parameters(self) -> None:
        if self.variant == "paper":
            return
        self.norm.reset_parameters()
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        if self.skip_scale is not None:
            nn.init.ones_(self.skip_scale)

    def reset_parameters(self) -> None:
        """The released initialisation; also gives a module made on the meta device its values after ``to_empty``."""
        (self.vsss if self.variant == "paper" else self.mamba).reset_parameters()
        if self.affinity is not None:
            self.affinity.reset_parameters()
        self._reset_own_parameters()

    def forward(
        self, x: Tensor, *, residual: bool = False, tokens: bool = False, kept: KeptImages | None = None
    ) -> Tensor:
        """The layer, or with ``residual`` ``x`` plus it, which on CUDA costs no pass of its own.

        With ``tokens`` ``x`` and the result are (batch, H, W, dim), as they lie in memory: a network that keeps its
        images so is spared the views. ``kept``, with ``residual`` and a batch, is stochastic depth:
        ``x + kept.kept * kept.scale * layer(x)``, in the released variant again without a pass of its own.
        """
        if isinstance(x, Proxy):
            return fx_call(self, x, residual=residual, tokens=tokens, kept=kept)
        paper = self.variant == "paper"
        first = self._parameters.get("skip_scale")
        if first is None:
            part, name = ("vsss", "norm1_weight") if paper else ("norm", "weight")
            first = floating_parameter(self._modules[part], name)
        image_input(x, self.dim, first, tokens=tokens)
        if kept is not None:
            if x.dim() == 3:
                raise ValueError(f"kept needs a batch of images, got x of shape {tuple(x.shape)}")
            kept.check(x, residual)
        if not tokens:
            return self._image(x, residual, kept)
        if paper:
            return self._image(x.permute(0, 3, 1, 2), residual, kept).permute(0, 2, 3, 1)
        return self._tokens(x, residual, kept)

    def _image(self, x: Tensor, residual: bool, kept: KeptImages | None) -> Tensor:
        """Any variant on (batch, dim, H, W) or (dim, H, W)."""
        if self.variant == "paper":
            y = self.vsss(x)
            y = y if self.affinity is None else y * self.affinity(x).to(y.dtype)[..., None, None]
            return add(x, y, residual, kept)
        if x.dim() == 4:
            return self._tokens(x.permute(0, 2, 3, 1), residual, kept).permute(0, 3, 1, 2)
        return self._tokens(x.unsqueeze(0).permute(0, 2, 3, 1), residual, kept).permute(0, 3, 1, 2).squeeze(0)

    def _tokens(self, x: Tensor, residual: bool, kept: KeptImages | None) -> Tensor:
        """The released and fused variants on (batch, H, W, dim)."""
        if self._why_called() is not None:
            return add(x, self._call_all(x), residual, kept)
        if self._one_op and can_fuse(x, self._inner_dim):
            if kept is None or self.variant == "released":
                return self._fused(x, residual, kept)
            return kept.added(x, self._fused(x, False, None))
        mixed = self._mix(x.contiguous())
        y = token_linear(mixed.flatten(0, 2).unsqueeze(0), self.proj.weight.unsqueeze(0), self.proj.bias)
        return add(x, y.view(*mixed.shape[:3], self.dim), residual, kept)

    def _fused(self, x: Tensor, residual: bool, kept: KeptImages | None) -> Tensor:
        """In one op, from the parameters of all submodules."""
        modules = self._modules
        norm, mamba, affinity = modules["norm"], modules["mamba"], modules.get("affinity")
        if affinity is not None:
            parts = affinity._modules
            affinity = (*affine(parts["fc1"]), *affine(parts["fc2"]))
        codes, chunk = self._scan_constants
        return grouped_mamba_layer(
            x,
            norm=affine(norm),
            affinity=affinity,
            core=mamba.core_parameters(),
            out_proj_weight=mamba._parameters.get("out_proj_weight"),
            skip_scale=self.skip_scale,
            proj=affine(modules["proj"]),
            codes=codes,
            chunk=chunk,
            eps=norm.eps,
            residual=residual,
            kept=kept,
        )

    def _mix(self, x: Tensor) -> Tensor:
        """What goes into proj, (batch, H, W, dim or 4 E), from the image (batch, H, W, dim), op by op; reads the
        parameters of norm and affinity."""
        xn, pooled = ext.layer_norm_pool(x, self.norm.weight, self.norm.bias, self.norm.eps)
        gate = None if self.affinity is None else self.affinity.from_pooled(pooled)
        groups = xn.unflatten(-1, (GROUPS, self.dim // GROUPS))
        if self.variant == "fused":
            return self.mamba(groups, None if gate is None else gate.unflatten(-1, (GROUPS, -1))).flatten(-2)
        o = self.mamba(groups)
        # A view of the groups made after o: its token-major gradient is the first to arrive there, so that the sum with
        # o's group-major one is token-major and goes on to the norm without a copy.
        xn = groups.flatten(-2)
        norm = self.norm
        return ext.modulated_layer_norm(o, xn, self.skip_scale, norm.weight, norm.bias, gate=gate, eps=norm.eps)

    def _call_all(self, x: Tensor) -> Tensor:
        """The layer on the image (batch, H, W, dim) by calls of all submodules."""
        xn = self.norm(x)
        gate = None if self.affinity is None else self.affinity(xn.permute(0, 3, 1, 2))
        groups = xn.unflatten(-1, (GROUPS, self.dim // GROUPS))
        if self.variant == "fused":
            mixed = self.mamba(groups, None if gate is None else gate.unflatten(-1, (GROUPS, -1))).flatten(-2)
        else:
            product = self.mamba(groups).flatten(-2) * self.skip_scale * xn
            if gate is not None:
                product = product * gate[:, None, None]
            mixed = self.norm(product.to(xn.dtype))
        return call_on_rows(self.proj, mixed)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, variant={self.variant!r}, scan={self.scan!r}, directions={self.directions}"
