# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the LayerNorms on the CPU: see emulation/README.md."""

import ctypes
import functools
from pathlib import Path

import torch

from support.emulation import DTYPES, ParamArg, array_of, param_arg

VECTOR = 4  # channels of an aligned access


class NormCase(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens")),
        *((name, ctypes.c_int) for name in ("groups", "group_dim", "group_width", "dtype")),
        ("eps", ctypes.c_float),
    ]


class NormImage(ctypes.Structure):
    _fields_ = [
        ("ptr", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "token", "group", "scan")),
        ("aligned", ctypes.c_bool),
        ("width", ctypes.c_int),
        ("tail", ctypes.c_int),
    ]


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.emulated_norm_strips.restype = ctypes.c_int64
    for name in ("pool_fwd", "pool_bwd", "modulated_fwd", "modulated_bwd"):
        getattr(lib, f"emulated_{name}").restype = ctypes.c_char_p
    return lib


def norm_image(t: torch.Tensor | None, *, tail: int = 0) -> NormImage:
    """Of (batch, tokens, groups, width); width: channels of a group, or those and zeros behind them."""
    if t is None:
        return NormImage()
    strides = t.stride()[:3]
    fits = all(stride % VECTOR == 0 for stride in strides) and t.data_ptr() % (VECTOR * t.element_size()) == 0
    group = 0 if t.shape[2] == 1 else strides[2]
    return NormImage(t.data_ptr(), *strides[:2], group, 0, fits and t.shape[3] % VECTOR == 0, t.shape[3], tail)


def case_of(x: torch.Tensor, group_dim: int, eps: float, *images: torch.Tensor | None) -> NormCase:
    widest = max(t.shape[3] for t in images if t is not None)
    width = -(-max(widest, group_dim) // VECTOR) * VECTOR
    groups = next(t.shape[2] for t in images if t is not None)
    return NormCase(*x.shape[:2], groups, group_dim, width, DTYPES[x.dtype], eps)


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def partials_of(lib: ctypes.CDLL, case: NormCase, columns: int, *, backward: bool, modulated: bool) -> torch.Tensor:
    """A row for each strip of each image, and one that is not the kernel's."""
    strips = lib.emulated_norm_strips(ctypes.byref(case), backward, modulated)
    return torch.full((case.batch * strips + 1, columns), torch.nan)


def sums_of(partials: torch.Tensor, batch: int) -> torch.Tensor:
    """(batch, columns): the sums over an image's strips, in float64."""
    assert partials[-1].isnan().all(), "written behind the partial sums"
    return partials[:-1].double().unflatten(0, (batch, -1)).sum(1)


def call(function, case: NormCase, images, parameters, *others) -> None:
    """Images as `norm_image` makes them; parameters are tensors or None."""
    problem = function(
        ctypes.byref(case), array_of(NormImage, images), array_of(ParamArg, [param_arg(t) for t in parameters]), *others
    )
    assert problem is None, problem.decode()
