# SPDX-License-Identifier: Apache-2.0
"""The modulated group Mamba layer: channel groups, each scanned along its own direction, and channel affinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from groupmamba.layers._checks import image_input, parameter_dtype, positive_int
from groupmamba.layers.channel_affinity import ChannelAffinity
from groupmamba.layers.drop_path import DropPathMask
from groupmamba.layers.group_core import SCANS, GroupCore
from groupmamba.layers.tracing import Leaf, fx_call
from groupmamba.layers.variants import VARIANTS
from groupmamba.layers.vsss import GroupedVSSS
from groupmamba_ext._checks import boolean, choice
from groupmamba_ext.directions import Directions

CROSS_GROUPS = 4  # of scan="cross", where the number of directions says nothing of that of the groups
GATE_SOURCES = ("input", "output")


def directions_and_groups(
    variant: str, scan: str, directions: Sequence[str] | None, groups: int | None
) -> tuple[Directions, int]:
    """The directions of a layer with these arguments, and its number of channel groups.

    Raises:
        TypeError, ValueError: one of them has a wrong type or value, or they do not go together.
    """
    choice("", "variant", variant, tuple(VARIANTS))
    choice("", "scan", scan, SCANS)
    names = Directions.of(VARIANTS[variant].directions if directions is None else directions, None)
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

    # What the variant builds: the paper's vsss alone, the others all but that.
    norm: nn.LayerNorm
    mamba: GroupCore
    proj: nn.Linear
    skip_scale: nn.Parameter | None
    vsss: GroupedVSSS

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
        self.directions = tuple(directions)  # no subclass: torch.compile of torch 2.10 cannot compare these
        self.groups = groups
        self.gate_source = gate_source
        self._variant = VARIANTS[variant]
        place = {"device": device, "dtype": dtype}
        core = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        gates = self._variant.build(self, place, directions=directions, scan=scan, **core)
        seen = gates if gate_source == "output" else dim
        self.affinity = ChannelAffinity(seen, reduction, out_dim=gates, **place) if affinity else None
        # What the fused paths read of these in place of calling them.
        self._parts = self._variant.parts(self)
        self._variant.reset_parameters(self)

    def _why_called(self) -> str | None:
        """Why the layer calls its submodules one by one, None where it reads them: :func:`groupmamba.why_not_fused`."""
        return self._variant.why_called(self)

    def reset_parameters(self) -> None:
        """The released initialisation; also gives a module made on the meta device its values after ``to_empty``."""
        self._variant.core(self).reset_parameters()
        if self.affinity is not None:
            self.affinity.reset_parameters()
        self._variant.reset_parameters(self)

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
        variant = self._variant
        image_input(x, self.dim, variant.floating_parameter(self), tokens=tokens)
        if drop_path is not None:
            if x.dim() == 3:
                raise ValueError(f"drop_path needs a batch of images, got x of shape {tuple(x.shape)}")
            drop_path.check(x, residual)
        return (variant.tokens if tokens else variant.image)(self, x, residual, drop_path)

    def extra_repr(self) -> str:
        source = "" if self.affinity is None else f", gate_source={self.gate_source!r}"
        return (
            f"dim={self.dim}, groups={self.groups}, variant={self.variant!r}, scan={self.scan!r}, "
            f"directions={self.directions}{source}"
        )
