# SPDX-License-Identifier: Apache-2.0
"""Channel affinity modulation: weights for all channels from the pooled image (GroupMamba, arXiv 2407.13772)."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from groupmamba.layers._checks import image_input, parameter_dtype, positive_int
from groupmamba.layers.plain import Plain, call_on_rows, linear, why_called
from groupmamba.layers.tracing import Leaf, fx_call


def image_mean(x: Tensor, rows: int, columns: int) -> Tensor:
    """Mean over dimensions ``rows`` and ``columns`` in float32 (float64 for float64); 0 where there is no pixel."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.sum((rows, columns), dtype=wide) / max(x.shape[rows] * x.shape[columns], 1)


class ChannelAffinity(Leaf, nn.Module):
    r"""``sigmoid(fc2(relu(fc1(mean over H, W of x))))``: one weight in (0, 1) a channel, which every group can see.

    Pooling, both products and the sigmoid are done in float32 (float64 for a float64 input), also in half precision
    modules and under autocast.

    Args:
        dim: channels of the input.
        reduction: the hidden width is ``dim // reduction``, at least 1. (The released code makes it 0 for dims below
            ``reduction``, so that the input has no influence.)
        out_dim: number of weights, ``dim`` by default.
        device, dtype: of the parameters.

    State: ``fc1.weight`` (hidden, dim), ``fc1.bias``, ``fc2.weight`` (out_dim, hidden), ``fc2.bias``.

    Raises:
        TypeError, ValueError: ``dim``, ``reduction`` or ``out_dim`` is not a positive int.
        TypeError: ``dtype`` is none that the ops take.
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 16,
        *,
        out_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim = positive_int("dim", dim)
        parameter_dtype(dtype)
        self.out_dim = dim if out_dim is None else positive_int("out_dim", out_dim)
        hidden = max(dim // positive_int("reduction", reduction), 1)
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, self.out_dim, device=device, dtype=dtype)
        self._parts = (("fc1", linear(hidden)), ("fc2", linear(self.out_dim)))
        self.reset_parameters()

    def plain(self) -> Plain:
        """What this module is where a layer may read it and not call it."""
        return Plain(type(self), parts=self._parts)

    def _why_called(self) -> str | None:
        return why_called(self._modules, self._parts)

    def reset_parameters(self) -> None:
        """Weights from a normal distribution of deviation 0.02, biases 0."""
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def from_pooled(self, pooled: Tensor) -> Tensor:
        """Weights (batch, out_dim) from the pooled image (batch, dim), in the dtype of ``pooled``; reads ``fc1`` and
        ``fc2``, which must be plain."""
        kind = pooled.device.type
        low = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if low else contextlib.nullcontext():
            dtype = pooled.dtype
            hidden = F.relu(F.linear(pooled, self.fc1.weight.to(dtype), self.fc1.bias.to(dtype)))
            return torch.sigmoid(F.linear(hidden, self.fc2.weight.to(dtype), self.fc2.bias.to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """Weights (batch, out_dim) for an image (batch, dim, H, W), or (out_dim,) for (dim, H, W), in float32.

        Where ``fc1`` or ``fc2`` is not plain (:func:`groupmamba.why_not_fused`), both are called, under autocast in its
        dtype.
        """
        if isinstance(x, Proxy):
            return fx_call(self, x)
        image_input(x, self.dim, None)
        pooled = image_mean(x, -2, -1)
        if self._why_called() is None:
            return self.from_pooled(pooled)
        hidden = F.relu(call_on_rows(self.fc1, pooled, x.dtype))
        return torch.sigmoid(call_on_rows(self.fc2, hidden, x.dtype).to(pooled.dtype))
