# SPDX-License-Identifier: Apache-2.0
"""The variants of `GroupedMamba2d`: what each is made of and how it computes.

A variant is an object without state. The layer holds the modules and parameters, under the names that its
``state_dict`` has; a variant makes them, and reads or calls them.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

import groupmamba_ext as ext
from groupmamba.layers.channel_affinity import ChannelAffinity, image_mean
from groupmamba.layers.drop_path import DropPathMask, add
from groupmamba.layers.group_core import GroupCore
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
from groupmamba.layers.token_linear import image_linear
from groupmamba.layers.tracing import keepable
from groupmamba.layers.vsss import GroupedVSSS
from groupmamba_ext import _explain
from groupmamba_ext.directions import Directions
from groupmamba_ext.layouts import FUSED_CHANNELS, MAX_GROUPS
from groupmamba_ext.ops.grouped_mamba_layer import LayerParameters, can_fuse, grouped_mamba_layer, scan_path

PAPER_ORDER = ("lr", "rl", "tb", "bt")
RELEASED_ORDER = ("lr", "tb", "rl", "bt")


class Variant(abc.ABC):
    """One variant, for layers of any size. ``layer`` is the `GroupedMamba2d` everywhere."""

    directions: tuple[str, ...] = PAPER_ORDER  # where the layer is given none
    residual_block = True  # a block of the models adds the layer's result to its input
    paper_stem = False  # the models begin with the paper's patch embedding, not with the authors' stem

    @abc.abstractmethod
    def build(self, layer: nn.Module, place: dict[str, Any], directions: Directions, **options: Any) -> int:
        """Adds the modules and parameters but for the affinity, uninitialised where they are the layer's own.

        Args:
            place: ``device`` and ``dtype`` of the parameters.
            directions, options: of :class:`~groupmamba.layers.group_core.GroupCore`.

        Returns:
            The number of channels that the affinity weighs.
        """

    @abc.abstractmethod
    def reset_parameters(self, layer: nn.Module) -> None:
        """Of what the layer itself holds; `core` and affinity have their own."""

    @abc.abstractmethod
    def core(self, layer: nn.Module) -> nn.Module:
        """What computes the groups."""

    @abc.abstractmethod
    def floating_parameter(self, layer: nn.Module) -> Tensor | None:
        """One whose dtype the input must have, or None where no part of the layer holds any."""

    def parts(self, layer: nn.Module) -> tuple[tuple[str, Plain], ...]:
        """The submodules that `tokens` may read in place of calling them; for a layer that is built."""
        return ()

    def why_called(self, layer: nn.Module) -> str | None:
        """Why submodules are called one by one, None where they are read or where there is no other way."""
        return None

    @abc.abstractmethod
    def image(self, layer: nn.Module, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        """The layer on (batch, dim, H, W) or (dim, H, W)."""

    @abc.abstractmethod
    def tokens(self, layer: nn.Module, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        """The layer on (batch, H, W, dim)."""


class Paper(Variant):
    """``VSSS block of each group of x * affinity(x)``, or with ``gate_source="output"`` of the blocks' result."""

    residual_block = False
    paper_stem = True

    def build(self, layer: nn.Module, place: dict[str, Any], directions: Directions, **options: Any) -> int:
        layer.vsss = GroupedVSSS(layer.groups, layer.dim // layer.groups, directions=directions, **options, **place)
        return layer.dim

    def reset_parameters(self, layer: nn.Module) -> None:
        pass

    def core(self, layer: nn.Module) -> nn.Module:
        return layer.vsss

    def floating_parameter(self, layer: nn.Module) -> Tensor | None:
        return floating_parameter(layer._modules["vsss"], "norm1_weight")

    def image(self, layer: nn.Module, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        y = keepable(layer.vsss(x))
        if layer.affinity is not None:
            gate = layer.affinity(x if layer.gate_source == "input" else y)
            y = y * gate.to(y.dtype)[..., None, None]
        return add(x, y, residual, drop_path)

    def tokens(self, layer: nn.Module, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        return self.image(layer, x.permute(0, 3, 1, 2), residual, drop_path).permute(0, 2, 3, 1)


class _Projected(Variant):
    """What the released and the fused variant share: norm, Mambas, a product of all channels; one op on CUDA."""

    out_proj: bool  # of each group, before the groups are merged
    drops_path_in_op: bool  # the one op takes a drop-path mask

    def build(self, layer: nn.Module, place: dict[str, Any], directions: Directions, **options: Any) -> int:
        groups, dim = layer.groups, layer.dim
        layer.norm = nn.LayerNorm(dim, **place)
        core = {"directions": directions, "out_proj": self.out_proj, **options, **place}
        layer.mamba = GroupCore(groups, dim // groups, **core)
        mixed = dim if self.out_proj else groups * layer.mamba.inner_dim
        layer.proj = nn.Linear(mixed, dim, **place)
        layer.skip_scale = nn.Parameter(torch.empty(1, **place)) if self.out_proj else None
        # What every call would look up or work out again.
        by_input = layer.gate_source == "input"
        layer._one_op = layer.scan == "grouped" and layer.mamba.d_conv == 3 and by_input and groups <= MAX_GROUPS
        layer._inner_dim = layer.mamba.inner_dim
        layer._scan_path = scan_path(directions, layer._inner_dim, layer.mamba.d_state)
        return mixed

    def reset_parameters(self, layer: nn.Module) -> None:
        layer.norm.reset_parameters()
        nn.init.normal_(layer.proj.weight, std=0.02)
        nn.init.zeros_(layer.proj.bias)
        if layer.skip_scale is not None:
            nn.init.ones_(layer.skip_scale)

    def core(self, layer: nn.Module) -> nn.Module:
        return layer.mamba

    def floating_parameter(self, layer: nn.Module) -> Tensor | None:
        first = layer._parameters.get("skip_scale")
        return floating_parameter(layer._modules["norm"], "weight") if first is None else first

    def parts(self, layer: nn.Module) -> tuple[tuple[str, Plain], ...]:
        affinity = () if layer.affinity is None else (("affinity", layer.affinity.plain()),)
        norm, proj = layer_norm(nn.LayerNorm, layer.dim), linear(layer.dim)
        return (("norm", norm), ("mamba", layer.mamba.plain()), *affinity, ("proj", proj))

    def why_called(self, layer: nn.Module) -> str | None:
        skip_scale = layer._parameters.get("skip_scale")
        if skip_scale is not None and not are_plain(skip_scale):
            return f"skip_scale is {type(skip_scale).__qualname__}, a subclass of torch.Tensor"
        return why_called(layer._modules, layer._parts)

    def image(self, layer: nn.Module, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        if x.dim() == 4:
            return self.tokens(layer, x.permute(0, 2, 3, 1), residual, drop_path).permute(0, 3, 1, 2)
        tokens = x.unsqueeze(0).permute(0, 2, 3, 1)
        return self.tokens(layer, tokens, residual, drop_path).permute(0, 3, 1, 2).squeeze(0)

    def tokens(self, layer: nn.Module, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
        called = self.why_called(layer)
        if _explain.asked():
            _explain.note(f"GroupedMamba2d({layer.dim}): {_path(layer, x, called)}")
        if called is not None:
            return add(x, call_on_rows(layer.proj, self._called(layer, x)), residual, drop_path)
        if layer._one_op and can_fuse(x, layer._inner_dim):
            if drop_path is None or self.drops_path_in_op:
                return _one_op(layer, x, residual, drop_path)
            return drop_path.added(x, _one_op(layer, x, False, None))
        mixed = self._mixed(layer, x.contiguous())
        proj = layer.proj
        if residual and drop_path is None:
            return image_linear(mixed, proj.weight, proj.bias, x)
        return add(x, image_linear(mixed, proj.weight, proj.bias), residual, drop_path)

    @abc.abstractmethod
    def _mixed(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What proj reads, (batch, H, W, dim or G * E), from the image (batch, H, W, dim), op by op; reads the
        parameters of norm and affinity."""

    @abc.abstractmethod
    def _called(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The same by calls of all submodules."""


class Released(_Projected):
    """As the authors' code computes it: ``proj(norm(o * skip_scale * xn * gate))`` with out_proj in each Mamba."""

    directions = RELEASED_ORDER
    out_proj = True
    drops_path_in_op = True

    def _mixed(self, layer: nn.Module, x: Tensor) -> Tensor:
        norm = layer.norm
        xn, pooled = ext.layer_norm_pool(x, norm.weight, norm.bias, norm.eps)
        before, after = _affinities(layer)
        gate = None if before is None else before.from_pooled(pooled)
        groups = _groups(layer, xn)
        o = layer.mamba(groups)
        if after is not None:
            gate = after.from_pooled(image_mean(o, 1, 2).flatten(1))
        # A view of the groups made after o: its token-major gradient is the first to arrive there, so that the sum with
        # o's group-major one is token-major and goes on to the norm without a copy. A compiler orders sums by itself,
        # and should keep no view: see `keepable`.
        if not torch.compiler.is_compiling():
            xn = groups.flatten(-2)
        return ext.modulated_layer_norm(o, xn, layer.skip_scale, norm.weight, norm.bias, gate=gate, eps=norm.eps)

    def _called(self, layer: nn.Module, x: Tensor) -> Tensor:
        xn = layer.norm(x)
        before, after = _affinities(layer)
        gate = None if before is None else before(xn.permute(0, 3, 1, 2))
        o = keepable(layer.mamba(_groups(layer, xn)).flatten(-2))
        if after is not None:
            gate = after(o.permute(0, 3, 1, 2))
        # Not in 16 bits, where a product of what the norm brings back to its size may be infinite.
        wide = torch.promote_types(xn.dtype, torch.float32)
        product = o.to(wide) * layer.skip_scale * xn
        if gate is not None:
            product = product * gate[:, None, None]
        return layer.norm(product.to(xn.dtype))


class Fused(_Projected):
    """One pass from scan to affinity: ``proj(y)`` with the gate applied by the scan, without out_proj."""

    out_proj = False
    drops_path_in_op = False

    def _mixed(self, layer: nn.Module, x: Tensor) -> Tensor:
        norm = layer.norm
        xn, pooled = ext.layer_norm_pool(x, norm.weight, norm.bias, norm.eps)
        before, after = _affinities(layer)
        y = self._scanned(layer, xn, None if before is None else before.from_pooled(pooled))
        return y if after is None else _gated(y, after.from_pooled(image_mean(y, 1, 2)))

    def _called(self, layer: nn.Module, x: Tensor) -> Tensor:
        xn = layer.norm(x)
        before, after = _affinities(layer)
        y = self._scanned(layer, xn, None if before is None else before(xn.permute(0, 3, 1, 2)))
        return y if after is None else _gated(y, after(y.permute(0, 3, 1, 2)))

    def _scanned(self, layer: nn.Module, xn: Tensor, gate: Tensor | None) -> Tensor:
        gates = None if gate is None else gate.unflatten(-1, (layer.groups, -1))
        return keepable(layer.mamba(_groups(layer, xn), gates).flatten(-2))


VARIANTS: dict[str, Variant] = {"released": Released(), "fused": Fused(), "paper": Paper()}


def _groups(layer: nn.Module, xn: Tensor) -> Tensor:
    return xn.unflatten(-1, (layer.groups, layer.dim // layer.groups))


def _affinities(layer: nn.Module) -> tuple[ChannelAffinity | None, ChannelAffinity | None]:
    """The affinity as one of what goes into the Mambas, and as one of what comes out."""
    return (layer.affinity, None) if layer.gate_source == "input" else (None, layer.affinity)


def _gated(y: Tensor, gate: Tensor) -> Tensor:
    """(batch, H, W, C) times (batch, C), rounded once."""
    return (y * gate[:, None, None]).to(y.dtype)


def _path(layer: nn.Module, x: Tensor, called: str | None) -> str:
    """How the layer computes ``x``, and why not in one op."""
    if called is not None:
        return f"calls its submodules one by one: {called}"
    if not layer._one_op:
        return f"op by op: one op has no scan='cross', d_conv=1, gate_source='output' or {MAX_GROUPS + 1} groups"
    if layer._inner_dim > FUSED_CHANNELS:
        return f"op by op: a group scans {layer._inner_dim} channels, one op up to {FUSED_CHANNELS}"
    return "one op" if can_fuse(x, layer._inner_dim) else "op by op: one op is for images on CUDA"


def _one_op(layer: nn.Module, x: Tensor, residual: bool, drop_path: DropPathMask | None) -> Tensor:
    """From the parameters of all submodules."""
    modules = layer._modules
    norm, mamba, affinity = modules["norm"], modules["mamba"], modules.get("affinity")
    fc: tuple[Tensor | None, ...] = (None,) * 4
    if affinity is not None:
        inner = affinity._modules
        fc = (*affine(inner["fc1"]), *affine(inner["fc2"]))
    merge = (mamba._parameters.get("out_proj_weight"), layer._parameters.get("skip_scale"))
    held = (*affine(norm), *fc, *mamba.core_parameters(), *merge, *affine(modules["proj"]))
    return grouped_mamba_layer(
        x, LayerParameters(*held), path=layer._scan_path, eps=norm.eps, residual=residual, drop_path=drop_path
    )
