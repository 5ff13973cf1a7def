# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the depthwise convolution on the CPU: see emulation/README.md."""

import ctypes
import functools
from pathlib import Path

import torch

from support.emulation import DTYPES, ImageArg, ParamArg, array_of, image_arg, param_arg

KERNELS = ("portable", "sm90")
ACTIVATIONS = (None, "silu", "gelu")
TAPS = 9


class ConvCase(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "groups", "dim")),
        *((name, ctypes.c_int) for name in ("dtype", "activation", "images")),
    ]


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.emulated_conv_partial_rows.restype = ctypes.c_int64
    lib.emulated_conv_fwd.restype = lib.emulated_conv_bwd.restype = ctypes.c_char_p
    return lib


def case_of(x: torch.Tensor, activation: str | None, images: int) -> ConvCase:
    return ConvCase(*x.shape, DTYPES[x.dtype], ACTIVATIONS.index(activation), images)


def plan(library: Path, shape: tuple[int, ...], *, backward: bool) -> tuple[int, int]:
    """Runs of 8 channels that a block of the sm_90 kernels has, and its blocks."""
    octets, blocks = ctypes.c_int64(), ctypes.c_int64()
    case = ConvCase(*shape)
    load(library).emulated_conv_plan(ctypes.byref(case), backward, ctypes.byref(octets), ctypes.byref(blocks))
    return octets.value, blocks.value


def _pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def forward(library: Path, kernel: str, y, x, weight, bias, activation, *, mask=None, images=0) -> None:
    """Writes y. Images are (batch, H, W, G, D); `images` of them are a block's, by default as the plan has it."""
    problem = load(library).emulated_conv_fwd(
        KERNELS.index(kernel),
        ctypes.byref(case_of(x, activation, images)),
        array_of(ImageArg, [image_arg(x), image_arg(y)]),
        array_of(ParamArg, [param_arg(weight), param_arg(bias)]),
        _pointer(mask),
    )
    assert problem is None, problem.decode()


def backward(
    library: Path, kernel: str, dx, dy, x, weight, bias, activation, *, y=None, mask=None, sum_dx=False, images=0
) -> dict[str, torch.Tensor]:
    """Writes dx and, where it is there, y. Gives the sums over the blocks, in float64."""
    lib, case = load(library), case_of(x, activation, images)
    groups, dim = x.shape[3:]
    sums = TAPS + 1 + sum_dx
    rows = lib.emulated_conv_partial_rows(KERNELS.index(kernel), ctypes.byref(case))
    partials = torch.full((rows + 1, groups * dim * sums), torch.nan)  # the last row is not the kernel's
    problem = lib.emulated_conv_bwd(
        KERNELS.index(kernel),
        ctypes.byref(case),
        array_of(ImageArg, [image_arg(x), image_arg(dy), image_arg(dx), image_arg(y)]),
        array_of(ParamArg, [param_arg(weight), param_arg(bias)]),
        _pointer(mask),
        sums,
        _pointer(partials),
    )
    assert problem is None, problem.decode()
    assert partials[rows].isnan().all(), "written behind the partial sums"
    weights, *others = partials[:rows].double().sum(0).split([groups * dim * TAPS] + [groups * dim] * (sums - TAPS))
    names = ("dbias", "dx_sum")[: len(others)]
    return {
        "dweight": weights.view(groups, dim, 3, 3),
        **{name: sum.view(groups, dim) for name, sum in zip(names, others, strict=True)},
    }
