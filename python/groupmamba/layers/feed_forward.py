# SPDX-License-Identifier: Apache-2.0
"""The feed-forward network of a GroupMamba block: two products with a depthwise convolution and GELU between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

import groupmamba_ext as ext
from groupmamba.layers._checks import parameter_dtype, positive_int
from groupmamba.layers.drop_path import DropPathMask, add
from groupmamba.layers.plain import affine, call_in_own_dtype, call_on_rows, convolution, layer_norm, linear, why_called
from groupmamba.layers.token_linear import image_linear
from groupmamba.layers.token_norm import TokenNorm
from groupmamba.layers.tracing import Leaf, fx_call, keepable
from groupmamba_ext import _explain
from groupmamba_ext.backend import takes_image
from groupmamba_ext.ops.feed_forward import FeedForwardParameters, feed_forward


class ConvFeedForward(Leaf, nn.Module):
    """``fc2(gelu(dwconv3x3(fc1(x))))`` on channels-last images, GELU by the error function (as the authors' code).

    The hidden image is the widest tensor of a block. On CUDA one op (``groupmamba_ext.ops.feed_forward``) computes all
    of it; on a GPU of compute capability 9.0, in 16 bits and for up to 192 channels, one kernel that keeps that image
    on the chip and writes it only for a backward. There an infinity or NaN reaches up to 14 neighbours in a row, not 3.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        device, dtype: of the parameters.

    Shape: (batch, H, W, dim) in and out.

    State: ``fc1.weight`` (hidden, dim), ``fc1.bias``, ``dwconv.weight`` (hidden, 1, 3, 3), ``dwconv.bias``,
    ``fc2.weight`` (dim, hidden), ``fc2.bias``.

    Raises:
        TypeError, ValueError: ``dim`` or ``hidden_dim`` is not a positive int.
        TypeError: ``dtype`` is none that the ops take.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dim, hidden_dim = positive_int("dim", dim), positive_int("hidden_dim", hidden_dim)
        parameter_dtype(dtype)
        place = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **place)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **place)
        self.fc2 = nn.Linear(hidden_dim, dim, **place)
        self._parts = (
            ("fc1", linear(hidden_dim)),
            ("dwconv", convolution(3, 1, hidden_dim, bias=True)),
            ("fc2", linear(dim)),
        )
        self._norm_part = (("norm", layer_norm(TokenNorm, dim)),)

    def _why_called(self) -> str | None:
        return why_called(self._modules, self._parts)

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm | None = None,
        *,
        residual: bool = False,
        drop_path: DropPathMask | None = None,
    ) -> Tensor:
        """``[x +] mlp(norm(x))``: with ``norm`` and ``residual`` the whole second half of a block in one op on CUDA.

        Args:
            x: (batch, H, W, dim).
            norm: applied to ``x`` first, or None.
            residual: add ``x``.
            drop_path: with ``residual``, the images whose branch is added, and its scale.

        Returns:
            (batch, H, W, dim); on CUDA with ``norm``, pixels lie a multiple of 8 channels apart.
        """
        if isinstance(x, Proxy):
            return fx_call(self, x, norm, residual=residual, drop_path=drop_path)
        if drop_path is not None:
            drop_path.check(x, residual)
        reason = self._why_called()
        plain = reason is None
        if _explain.asked():
            how = "reads its submodules' parameters" if plain else f"calls its submodules one by one: {reason}"
            _explain.note(f"ConvFeedForward({x.shape[-1]}): {how}")
        if plain and norm is not None and takes_image(x) and why_called({"norm": norm}, self._norm_part) is None:
            modules = self._modules
            layers = (norm, modules["fc1"], modules["dwconv"], modules["fc2"])
            parameters = FeedForwardParameters(*(t for layer in layers for t in affine(layer)))
            return feed_forward(x, parameters, eps=norm.eps, residual=residual, drop_path=drop_path)
        y = x if norm is None else norm(x)
        if plain:
            hidden = image_linear(y, self.fc1.weight, self.fc1.bias)
            hidden = ext.depthwise_conv3x3(hidden, self.dwconv.weight, self.dwconv.bias, activation="gelu")
            if residual and drop_path is None:
                return image_linear(hidden, self.fc2.weight, self.fc2.bias, x)
            y = image_linear(hidden, self.fc2.weight, self.fc2.bias)
        else:
            hidden = keepable(call_on_rows(self.fc1, y).permute(0, 3, 1, 2))
            if hidden.numel():  # torch convolves no empty image
                hidden = F.gelu(call_in_own_dtype(self.dwconv, hidden))
            y = call_on_rows(self.fc2, hidden.permute(0, 2, 3, 1))
        return add(x, y, residual, drop_path)
