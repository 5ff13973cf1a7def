# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the feed-forward network on the CPU: see emulation/README.md."""

import ctypes
import functools
from pathlib import Path

import torch

from support.emulated_conv import TAPS
from support.emulation import DTYPES, ParamArg, array_of, param_arg


class FeedForwardCase(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("height", "width", "channels", "hidden", "dtype", "images")),
        ("scale", ctypes.c_float),
    ]


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.emulated_feed_forward_rows.restype = ctypes.c_int64
    lib.emulated_feed_forward_fwd.restype = lib.emulated_feed_forward_bwd.restype = ctypes.c_char_p
    return lib


def forward(library: Path, out, x, norm, fc1, conv, fc2, *, residual, mask=None, scale=1.0, eps=1e-6) -> None:
    """Writes out of x, (batch, H, W, C). norm, fc1 (hidden, C), conv (hidden, 3, 3) and fc2 (C, hidden) are pairs of
    weight and bias, all in the dtype of x."""
    hidden = fc1[0].shape[0]
    blocks = -(-hidden // 64) * 64

    def padded(t):  # hidden channels up to whole blocks, and taps in rows of four
        shape = (blocks, *t.shape[1:-1], 4) if t.dim() == 3 else (blocks,)
        whole = t.new_zeros(shape)
        whole[(slice(hidden), *(slice(n) for n in t.shape[1:]))] = t
        return whole

    tensors = [x, *norm, fc1[0], padded(fc1[1]), padded(conv[0]), padded(conv[1]).float(), *fc2, out]
    case = FeedForwardCase(*x.shape, hidden, DTYPES[x.dtype], 0, scale)
    problem = load(library).emulated_feed_forward_fwd(
        ctypes.byref(case),
        array_of(ctypes.c_void_p, [t.data_ptr() for t in tensors]),
        ctypes.c_void_p(None if mask is None else mask.data_ptr()),
        residual,
        ctypes.c_float(eps),
    )
    assert problem is None, problem.decode()


def backward(
    library: Path, dhidden, activated, xn, dout, fc1, fc1_bias, conv, conv_bias, fc2, *, mask=None, scale=1.0, images=0
) -> dict[str, torch.Tensor]:
    """Writes dhidden and activated, (batch, H, W, hidden), of xn and dout (batch, H, W, C), fc1 (hidden, C), conv
    (hidden, 3, 3) and fc2 (C, hidden). Gives the sums over the blocks, in float64."""
    lib, hidden = load(library), fc1.shape[0]
    case = FeedForwardCase(*xn.shape, hidden, DTYPES[xn.dtype], images, scale)
    rows = lib.emulated_feed_forward_rows(ctypes.byref(case))
    partials = torch.full((rows + 1, hidden * (TAPS + 2)), torch.nan)  # the last row is not the kernel's
    tensors = (xn, dout, fc1, fc1_bias, fc2, dhidden, activated)
    problem = lib.emulated_feed_forward_bwd(
        ctypes.byref(case),
        array_of(ctypes.c_void_p, [t.data_ptr() for t in tensors]),
        array_of(ParamArg, [param_arg(conv), param_arg(conv_bias)]),
        ctypes.c_void_p(None if mask is None else mask.data_ptr()),
        ctypes.c_void_p(partials.data_ptr()),
    )
    assert problem is None, problem.decode()
    assert partials[rows].isnan().all(), "written behind the partial sums"
    weights, bias, of_hidden = partials[:rows].double().sum(0).split([hidden * TAPS, hidden, hidden])
    return {"dweight": weights.view(1, hidden, 3, 3), "dbias": bias[None], "dx_sum": of_hidden[None]}
