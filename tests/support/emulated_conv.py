# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the depthwise convolution on the CPU: see emulation/README.md."""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from support.emulation import DTYPES, ImageArg, ParamArg, array_of, image_arg, param_arg

KERNELS = ("portable", "sm90")
ACTIVATIONS = (None, "silu", "gelu")
TAPS = 9
# Half of the distance between adjacent numbers; of float32 some roundings, since its sums are float32 too.
ROUNDING = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


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


def channels_first(t: torch.Tensor) -> torch.Tensor:
    return t.double().flatten(3).permute(0, 3, 1, 2)


def truth(x, dy, weight, bias, activation, kept) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Results in float64, and how far the kernels' may be from them: in units of `ROUNDING`. Weights are taken as they
    are; g, the gradient of what the activation takes, is rounded to the images' type, and the slope that it comes from
    has a tenth of this error."""
    groups, dim = x.shape[3:]
    channels = groups * dim
    kept = kept.double().view(-1, 1, 1, 1)
    x, dy = channels_first(x), channels_first(dy) * kept
    w = weight.double().view(channels, 1, 3, 3)
    b = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.double().flatten()
    pre = F.conv2d(x, w, b, padding=1, groups=channels).requires_grad_()
    y = {None: lambda t: t * 1, "silu": F.silu, "gelu": F.gelu}[activation](pre)
    (g,) = torch.autograd.grad(y, pre, dy)
    y, pre = y.detach() * kept, pre.detach()
    about = g.abs() + (0.1 * dy.abs() if activation else 0)  # g, and the slope's error as a part of dy
    size = F.conv2d(x.abs(), w.abs(), b.abs(), padding=1, groups=channels)
    dx = conv2d_input(x.shape, w, g, padding=1, groups=channels)
    reach = F.conv2d(torch.ones_like(x), w.abs(), padding=1, groups=channels)

    def image(t):
        return t.permute(0, 2, 3, 1).unflatten(3, (groups, dim))

    def spread(squares):  # of a sum of terms whose roundings do not depend on one another
        return 4 * squares.clamp(min=0).sqrt()

    def backwards(a, b, c):
        return {
            "dx": image(conv2d_input(a.shape, b, c, padding=1, groups=channels)),
            "dweight": conv2d_weight(a, b.shape, c, padding=1, groups=channels).view(groups, dim, 3, 3),
            "dbias": c.sum((0, 2, 3)).view(groups, dim),
        }

    values = backwards(x, w, g)
    errors = {name: spread(t) for name, t in backwards(x**2, w**2, about**2).items()}
    errors["dx"] = errors["dx"] + 1.1 * values["dx"].abs()
    values["dx_sum"] = dx.sum((0, 2, 3)).view(groups, dim)
    errors["dx_sum"] = spread((about * reach).square().sum((0, 2, 3))).view(groups, dim)
    values["y"], errors["y"] = image(y), image(1.1 * y.abs() + 0.02 * size)
    return {name: (value, errors[name]) for name, value in values.items()}


def compare(got: torch.Tensor, value: torch.Tensor, error: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    assert got.shape == value.shape
    excess = (got.double() - value).abs() - error * ROUNDING[dtype] - 1e-6 * value.abs().mean() - 1e-7
    excess = excess.nan_to_num(torch.inf)
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    assert excess[at] <= 0, f"{name} at {at}: {got[at].item():.8g} instead of {value[at].item():.8g}"
