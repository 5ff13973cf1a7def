# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of channels-last images in the dtype of the image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba.layers._lookup import AFFINE, parameters_of
from groupmamba_ext.layer_ops import takes_image, token_norm


class TokenNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, H, W, C), statistics in float32, the result in the dtype of the image.

    Under autocast the result is low precision (torch's own LayerNorm returns float32 there): the residual stream of a
    model that starts with it stays at two bytes an element. On CUDA it runs through a kernel of its own, since torch's
    gives each short row a block of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and takes_image(x):
            return token_norm(x, *parameters_of(self, AFFINE), self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)
