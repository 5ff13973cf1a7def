# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of channels-last images in the dtype of the image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import groupmamba_ext as ext
from groupmamba_ext.backend import use_native


class TokenNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, H, W, C), statistics in float32, the result in the dtype of the image.

    Under autocast the result is low precision (torch's own LayerNorm returns float32 there): the residual stream of a
    model that starts with it stays at two bytes an element. On CUDA it runs through
    :func:`groupmamba_ext.layer_norm_pool`, since torch's kernel gives each short row a block of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.is_cuda and use_native(x, "layer_norm_pool"):
            return ext.layer_norm_pool(x.contiguous(), self.weight, self.bias, self.eps)[0]
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)
