# SPDX-License-Identifier: Apache-2.0
"""The modulated group Mamba layer: channel groups, each scanned along its own direction, and channel affinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

import groupmamba_ext as ext
from groupmamba.layers._checks import image_input, parameter_dtype, positive_int
from groupmamba.layers.channel_affinity import ChannelAffinity, image_mean
from groupmamba.layers.drop_path import DropPathMask, add
from groupmamba.layers.group_core import SCANS, GroupCore
from groupmamba.layers.plain import (
    Plain,
    affine,
    are_plain,
    call_on_rows,
    floating_parameter,
    layer_norm,
    linear,
    why_called,
)
from groupmamba.layers.token_linear import token_linear
from groupmamba.layers.tracing import Leaf, fx_call
from groupmamba.layers.vsss import GroupedVSSS
from groupmamba_ext import _explain
from groupmamba_ext._checks import boolean, choice
from groupmamba_ext.directions import Directions
from groupmamba_ext.layouts import FUSED_CHANNELS, MAX_GROUPS
from groupmamba_ext.ops.grouped_mamba_layer import LayerParameters, can_fuse, grouped_mamba_layer, scan_path

CROSS_GROUPS = 4  # of scan="cross", where the number of directions says nothing of that of the groups
GATE_SOURCES = ("input", "output")
PAPER_ORDER = ("lr", "rl", "tb", "bt")
RELEASED_ORDER = ("lr", "tb", "rl", "bt")
VARIANT_DIRECTIONS = {"released": RELEASED_ORDER, "fused": PAPER_ORDER, "paper": PAPER_ORDER}


def directions_and_groups(
    variant: str, scan: str, directions: Sequence[str] | None, groups: int | None
) -> tuple[Directions, int]:
    """The directions of a layer with these arguments, and its number of channel groups.

    Raises:
        TypeError, ValueError: one of them has a wrong type or value, or they do not go together.
    """
    choice("", "variant", variant, tuple(VARIANT_DIRECTIONS))
    choice("", "scan", scan, SCANS)
    names = Directions.of(VARIANT_DIRECTIONS[variant] if directions is None else directions, None)
    default = CROSS_GROUPS if scan == "cross" else len(names)
    count = default if groups is None else positive_int("groups", groups)
    if scan == "grouped" and count != len(names):
        raise ValueError(f"groups must be {len(names)} with scan='grouped' and directions {names}, got {count}")
    return names, count


class GroupedMamba2d(Leaf, nn.Module):
    r"""Modulated group Mamba layer (Shaker et al., GroupMamba, CVPR 2025, arXiv 2407.13772).

    The channels are split into groups, four by default, each with its own Mamba
    (:class:`~groupmamba.layers.group_core.GroupCore`) and scan direction; channel affinity modulation
    (:class:`ChannelAffinity`) connects the groups. Variants:

    .. code-block:: text

        "released", as the authors' code computes it
            xn = LayerNorm(x; norm);  gate = affinity(xn);  o = Mamba of each group of xn
            out = proj(LayerNorm(o * skip_scale * xn * gate; norm again))
        "fused", one pass from scan to affinity
            xn, gate and the Mambas as above but without out_proj, the gate applied with the scan
            out = proj(y)
        "paper", the paper's equations
            out = VSSS block of each group of x * affinity(x)

    With ``gate_source="output"`` the affinity looks at what it gates, in place of the layer's input: squeeze-and-
    excitation (Hu et al., CVPR 2018, arXiv 1709.01507), as a baseline for the paper's affinity.

    .. code-block:: text

        "released"    gate = affinity(o), the rest as above: gate and state have the same shapes
        "fused"       y = the Mambas without a gate;  out = proj(y * affinity(y))
        "paper"       y = VSSS block of each group of x;  out = y * affinity(y)

    Args:
        dim: channels, a multiple of the number of groups.
        variant: ``"released"``, ``"fused"`` or ``"paper"``.
        scan: ``"grouped"``: one direction a group. ``"cross"``: every group along all directions, each with its own
            parameters, and the results added (4-D scanning, the paper's ablation).
        affinity: False drops the channel affinity (the paper's ablation).
        d_state: states a channel, up to 256.
        d_conv: 3, or 1 for no depthwise convolution before the scan.
        expand: scanned channels over channels.
        dt_rank: step features a group, ``"auto"`` for ceil(dim / groups / 16).
        directions: one of ``"lr"`` (row-major path over the image), ``"rl"`` (its reverse), ``"tb"`` (column-major),
            ``"bt"`` (its reverse) for each group: any number of them, each as often as wanted. By default the
            variant's own four: released (lr, tb, rl, bt), as weights of the authors' code need it; fused and paper
            (lr, rl, tb, bt). With ``scan="cross"`` the directions of every group.
        groups: number of channel groups. It follows from ``directions`` where ``scan="grouped"``; with
            ``scan="cross"`` it is 4 by default, and 1 makes the layer a cross scan of all channels.
        gate_source: what the channel affinity looks at: ``"input"`` (the paper's) or ``"output"``, see above.
        reduction: the affinity's hidden width is ``dim // reduction``; in the fused variant that gates by its output
            the scanned channels count in place of ``dim``.
        device, dtype: of the parameters.

    Shape:
        (batch, dim, H, W) or (dim, H, W), and the same out, stored channels-last; on CUDA its pixels lie a multiple
        of 8 channels apart. ``torch.channels_last`` inputs are used without a copy. Sizes of 0 are allowed.

    The input has the dtype of the parameters, or any that autocast converts. Norms, steps, states and gates are
    computed in float32 (float64 for float64). On CUDA the released and fused variants are one op, forward and backward,
    where groups have up to 128 scanned channels, ``scan="grouped"``, ``d_conv=3`` and ``gate_source="input"``; else
    several ops.

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
        groups: int | None = None,
        gate_source: str = "input",
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        positive_int("dim", dim)
        directions, groups = directions_and_groups(variant, scan, directions, groups)
        if dim % groups:
            raise ValueError(f"dim must be a multiple of {groups}, the number of groups, got {dim}")
        boolean("", "affinity", affinity)
        choice("", "gate_source", gate_source, GATE_SOURCES)
        if gate_source == "output" and not affinity:
            raise ValueError("gate_source='output' needs affinity=True, got affinity=False")
        positive_int("reduction", reduction)
        parameter_dtype(dtype)
        self.dim = dim
        self.variant = variant
        self.scan = scan
        self.directions: tuple[str, ...] = directions
        self.groups = groups
        self.gate_source = gate_source
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
            self.vsss = GroupedVSSS(groups, dim // groups, **options)
            gates = dim
        else:
            self.norm = nn.LayerNorm(dim, **place)
            self.mamba = GroupCore(groups, dim // groups, out_proj=variant == "released", **options)
            gates = dim if variant == "released" else groups * self.mamba.inner_dim
            self.proj = nn.Linear(gates, dim, **place)
            self.skip_scale = nn.Parameter(torch.empty(1, **place)) if variant == "released" else None
            # What every call would look up or work out again.
            by_input = gate_source == "input"
            self._one_op = scan == "grouped" and d_conv == 3 and by_input and groups <= MAX_GROUPS
            self._inner_dim = self.mamba.inner_dim
            self._scan_path = scan_path(directions, self._inner_dim)
        seen = gates if gate_source == "output" else dim
        self.affinity = ChannelAffinity(seen, reduction, out_dim=gates, **place) if affinity else None
        # What the fused paths read of these in place of calling them.
        self._parts = () if variant == "paper" else self._read_parts()
        self._reset_own_parameters()

    def _read_parts(self) -> tuple[tuple[str, Plain], ...]:
        affinity = () if self.affinity is None else (("affinity", self.affinity.plain()),)
        norm, proj = layer_norm(nn.LayerNorm, self.dim), linear(self.dim)
        return (("norm", norm), ("mamba", self.mamba.plain()), *affinity, ("proj", proj))

    def _why_called(self) -> str | None:
        """Why the layer calls its submodules one by one, None where it reads them: :func:`groupmamba.why_not_fused`."""
        if self.variant == "paper":
            return None
        skip_scale = self._parameters.get("skip_scale")
        if skip_scale is not None and not are_plain(skip_scale):
            return f"skip_scale is {type(skip_scale).__qualname__}, a subclass of torch.Tensor"
        return why_called(self._modules, self._parts)

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
        self, x: Tensor, *, residual: bool = False, tokens: bool = False, drop_path: DropPathMask | None = None
    ) -> Tensor:
        """The layer, or with ``residual`` ``x`` plus it, which on CUDA costs no pass of its own.

        With ``tokens`` ``x`` and the result are (batch, H, W, dim), as they lie in memory: a network that keeps its
        images so is spared the views. ``drop_path``, with ``residual`` and a batch, is stochastic depth:
        ``x + drop_path.mask * drop_path.scale * layer(x)``, in the released variant again without a pass of its own.
        """
        if isinstance(x, Proxy):
            return fx_call(self, x, residual=residual, tokens=tokens, drop_path=drop_path)
        paper = self.variant == "paper"
        first = self._parameters.get("skip_scale")
        if first is None:
            part, name = ("vsss", "norm1_weight") if paper else ("norm", "weight")
            first = floating_parameter(self._modules[part], name)
        image_input(x, self.dim, first, tokens=tokens)
        if drop_path is not None:
            if x.dim() == 3:
                raise ValueError(f"drop_path needs a batch of images, got x of shape {tuple(x.shape)}")
            drop_path.check(x, residual)
        if not tokens:
            return self._image(x, residual, drop_path)
        if paper:
            return self._image(x.permute(0, 3, 1, 2), residual, drop_path).permute(0, 2, 3, 1)
        return self._tokens(x, residual, drop_path)

    def _image(self, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        """Any variant on (batch, dim, H, W) or (dim, H, W)."""
        if self.variant == "paper":
            y = self.vsss(x)
            if self.affinity is not None:
                gate = self.affinity(x if self.gate_source == "input" else y)
                y = y * gate.to(y.dtype)[..., None, None]
            return add(x, y, residual, drop_path)
        if x.dim() == 4:
            return self._tokens(x.permute(0, 2, 3, 1), residual, drop_path).permute(0, 3, 1, 2)
        return self._tokens(x.unsqueeze(0).permute(0, 2, 3, 1), residual, drop_path).permute(0, 3, 1, 2).squeeze(0)

    def _tokens(self, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        """The released and fused variants on (batch, H, W, dim)."""
        why_called = self._why_called()
        if _explain.asked():
            _explain.note(f"GroupedMamba2d({self.dim}): {self._path(x, why_called)}")
        if why_called is not None:
            return add(x, self._call_all(x), residual, drop_path)
        if self._one_op and can_fuse(x, self._inner_dim):
            if drop_path is None or self.variant == "released":
                return self._fused(x, residual, drop_path)
            return drop_path.added(x, self._fused(x, False, None))
        mixed = self._mix(x.contiguous())
        y = token_linear(mixed.flatten(0, 2).unsqueeze(0), self.proj.weight.unsqueeze(0), self.proj.bias)
        return add(x, y.view(*mixed.shape[:3], self.dim), residual, drop_path)

    def _path(self, x: Tensor, why_called: str | None) -> str:
        """How the layer computes ``x``, and why not in one op."""
        if why_called is not None:
            return f"calls its submodules one by one: {why_called}"
        if not self._one_op:
            return f"op by op: one op has no scan='cross', d_conv=1, gate_source='output' or {MAX_GROUPS + 1} groups"
        if self._inner_dim > FUSED_CHANNELS:
            return f"op by op: a group scans {self._inner_dim} channels, one op up to {FUSED_CHANNELS}"
        return "one op" if can_fuse(x, self._inner_dim) else "op by op: one op is for images on CUDA"

    def _fused(self, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        """In one op, from the parameters of all submodules."""
        modules = self._modules
        norm, mamba, affinity = modules["norm"], modules["mamba"], modules.get("affinity")
        fc: tuple[Tensor | None, ...] = (None,) * 4
        if affinity is not None:
            parts = affinity._modules
            fc = (*affine(parts["fc1"]), *affine(parts["fc2"]))
        merge = (mamba._parameters.get("out_proj_weight"), self.skip_scale)
        held = (*affine(norm), *fc, *mamba.core_parameters(), *merge, *affine(modules["proj"]))
        parameters = LayerParameters(*held)
        return grouped_mamba_layer(
            x, parameters, path=self._scan_path, eps=norm.eps, residual=residual, drop_path=drop_path
        )

    def _affinities(self) -> tuple[ChannelAffinity | None, ChannelAffinity | None]:
        """The affinity as one of what goes into the Mambas, and as one of what comes out."""
        return (self.affinity, None) if self.gate_source == "input" else (None, self.affinity)

    def _mix(self, x: Tensor) -> Tensor:
        """What goes into proj, (batch, H, W, dim or G * E), from the image (batch, H, W, dim), op by op; reads the
        parameters of norm and affinity."""
        xn, pooled = ext.layer_norm_pool(x, self.norm.weight, self.norm.bias, self.norm.eps)
        before, after = self._affinities()
        gate = None if before is None else before.from_pooled(pooled)
        groups = xn.unflatten(-1, (self.groups, self.dim // self.groups))
        if self.variant == "fused":
            y = self.mamba(groups, None if gate is None else gate.unflatten(-1, (self.groups, -1))).flatten(-2)
            return y if after is None else _gated(y, after.from_pooled(image_mean(y, 1, 2)))
        o = self.mamba(groups)
        if after is not None:
            gate = after.from_pooled(image_mean(o, 1, 2).flatten(1))
        # A view of the groups made after o: its token-major gradient is the first to arrive there, so that the sum with
        # o's group-major one is token-major and goes on to the norm without a copy.
        xn = groups.flatten(-2)
        norm = self.norm
        return ext.modulated_layer_norm(o, xn, self.skip_scale, norm.weight, norm.bias, gate=gate, eps=norm.eps)

    def _call_all(self, x: Tensor) -> Tensor:
        """The layer on the image (batch, H, W, dim) by calls of all submodules."""
        xn = self.norm(x)
        before, after = self._affinities()
        gate = None if before is None else before(xn.permute(0, 3, 1, 2))
        groups = xn.unflatten(-1, (self.groups, self.dim // self.groups))
        if self.variant == "fused":
            mixed = self.mamba(groups, None if gate is None else gate.unflatten(-1, (self.groups, -1))).flatten(-2)
            if after is not None:
                mixed = _gated(mixed, after(mixed.permute(0, 3, 1, 2)))
        else:
            o = self.mamba(groups).flatten(-2)
            if after is not None:
                gate = after(o.permute(0, 3, 1, 2))
            # Not in 16 bits, where a product of what the norm brings back to its size may be infinite.
            wide = torch.promote_types(xn.dtype, torch.float32)
            product = o.to(wide) * self.skip_scale * xn
            if gate is not None:
                product = product * gate[:, None, None]
            mixed = self.norm(product.to(xn.dtype))
        return call_on_rows(self.proj, mixed)

    def extra_repr(self) -> str:
        source = "" if self.affinity is None else f", gate_source={self.gate_source!r}"
        return (
            f"dim={self.dim}, groups={self.groups}, variant={self.variant!r}, scan={self.scan!r}, "
            f"directions={self.directions}{source}"
        )


def _gated(y: Tensor, gate: Tensor) -> Tensor:
    """(batch, H, W, C) times (batch, C), rounded once."""
    return (y * gate[:, None, None]).to(y.dtype)
