# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the convolutions between few channels on the CPU: see emulation/README.md."""

import ctypes
import functools
from pathlib import Path

import torch

from support.emulation import DTYPES, ParamArg, param_arg


class NarrowCase(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("height", "width", "in_channels", "taps", "pad", "dtype")),
        *((name, ctypes.c_int) for name in ("strips", "blocks")),
    ]


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.emulated_narrow_conv.restype = lib.emulated_narrow_conv_weight.restype = ctypes.c_char_p
    return lib


def case_of(x: torch.Tensor, weight: torch.Tensor, pad: int, strips: int = 0, blocks: int = 0) -> NarrowCase:
    """Of x (batch, H, W, C), weight (32, C, K, K)."""
    return NarrowCase(*x.shape, weight.shape[2], pad, DTYPES[x.dtype], strips, blocks)


def _pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _convolve(library, case, x, weight, bias, relu, back, y) -> None:
    of_bias = None if bias is None else ctypes.byref(param_arg(bias))
    of_weight: ParamArg = param_arg(weight)
    problem = load(library).emulated_narrow_conv(
        ctypes.byref(case), _pointer(x), ctypes.byref(of_weight), of_bias, relu, back, _pointer(y)
    )
    assert problem is None, problem.decode()


def forward(library: Path, y, x, weight, pad: int, *, bias=None, relu=False, strips=0) -> None:
    """Writes y (batch, H', W', 32)."""
    _convolve(library, case_of(x, weight, pad, strips), x, weight, bias, relu, False, y)


def backward(library: Path, dx, dy, weight, pad: int, *, strips=0) -> None:
    """Writes dx, like x."""
    _convolve(library, case_of(dx, weight, pad, strips), dy, weight, None, False, True, dx)


def weight_gradient(library: Path, x, dy, weight, pad: int, *, blocks=0) -> torch.Tensor:
    """Like weight, the blocks' sums in float64."""
    lib, case = load(library), case_of(x, weight, pad, blocks=blocks)
    rows = lib.emulated_narrow_conv_rows(ctypes.byref(case))
    partials = torch.full((rows + 1, weight.numel()), torch.nan)  # the last row is not the kernel's
    problem = lib.emulated_narrow_conv_weight(ctypes.byref(case), _pointer(x), _pointer(dy), _pointer(partials))
    assert problem is None, problem.decode()
    assert partials[rows].isnan().all(), "written behind the partial sums"
    return partials[:rows].double().sum(0).view(weight.shape)
