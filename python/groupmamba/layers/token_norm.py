# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of channels-last images in the dtype of the image."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

from groupmamba.layers.plain import are_plain
from groupmamba.layers.tracing import Leaf, fx_call
from groupmamba_ext.backend import takes_image
from groupmamba_ext.layouts import BIASED_CHANNELS
from groupmamba_ext.ops.token_norm import token_norm
from groupmamba_ext.transforms import layer_norm


class TokenNorm(Leaf, nn.LayerNorm):
    """LayerNorm over the channels of (batch, H, W, C), statistics in float32, the result in the dtype of the image.

    Under autocast the result is low precision (torch's own LayerNorm returns float32 there): the residual stream of a
    model that starts with it stays at two bytes an element. On CUDA it runs through a kernel of its own, since torch's
    gives each short row a block of its own.
    """

    def forward(self, x: Tensor, x_bias: Tensor | None = None) -> Tensor:
        """Of ``x + x_bias``, where that is given, (C,): the bias of what computed ``x``, without a pass of its own."""
        if isinstance(x, Proxy):
            return fx_call(self, x, x_bias)
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        native = x.dim() == 4 and are_plain(weight, bias) and takes_image(x)
        if x_bias is not None and not (native and x.shape[3] <= BIASED_CHANNELS):
            x, x_bias = x + x_bias.to(x.dtype), None
        if native:
            return token_norm(x, weight, bias, self.eps, x_bias)
        return layer_norm(x, self.weight, self.bias, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's over one dimension, with derivatives that are right in every mode: `transforms.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)
