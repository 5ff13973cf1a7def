# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the scan on the CPU: see emulation/README.md."""

import ctypes
import functools
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "emulation"
SOURCES = (  # of csrc/cuda/scan/, and what adds up images
    "fwd.cu", "bwd.cu", "reduce.cu", "many_states/fwd.cu", "many_states/bwd.cu", "many_states/select.cpp",
    "sm90/fwd.cu", "sm90/bwd.cu", "sm90/cross_fwd.cu", "sm90/cross_bwd.cu", "sm90/tma_maps.cpp",
    "../images/images.cu",
)  # fmt: skip
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")
IMAGES = ("u", "dt", "B", "C", "z")
PARAMETERS = ("A", "D", "dt_weight", "dt_bias", "norm_weight", "norm_bias", "gate")
CODES = {"lr": 0, "rl": 1, "tb": 2, "bt": 3}
KERNELS = ("portable", "sm90", "many_states", "cross_sm90")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "groups", "dim", "states", "rank")),
        *((name, ctypes.c_int64) for name in ("param_dim", "norm_dim")),
        *((name, ctypes.c_int) for name in ("dtype", "softplus", "aligned")),
        ("norm_eps", ctypes.c_float),
    ]


class ImageArg(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "group", "scan"))]


class ParamArg(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_void_p), ("is_float", ctypes.c_bool)]


def build(folder: Path, *, threads_sanitized: bool = False, csrc: Path = ROOT / "csrc") -> Path:
    """Compiles the kernels with the C++ compiler of an x86-64 machine, half a minute of two cores."""
    library, copied = folder / "libemulated_scan.so", folder / "emulated"
    for source in (csrc / "cuda").rglob("*.*"):
        target = copied / source.relative_to(csrc)
        target.parent.mkdir(parents=True, exist_ok=True)
        # What C++ has no words for: an array that the launch gives its size.
        array = r"\1* const \2 = reinterpret_cast<\1*>(emulation::self().block->shared);"
        target.write_text(DYNAMIC_SHARED.sub(array, source.read_text()))
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g", "-fPIC", "-w"]
    # The kernels for sm_90 have a body for that architecture alone.
    command += ["-D__CUDA_ARCH__=900", f"-I{FOLDER / 'include'}", f"-I{copied}"]
    sanitizer = ["-fsanitize=thread"] if threads_sanitized else []

    def compile_one(source: Path) -> Path:
        own = sanitizer if source.name != "scheduler.cpp" else ["-DEMULATION_TSAN"] * threads_sanitized
        compiled = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([*command, *own, "-x", "c++", "-c", str(source), "-o", str(compiled)], check=True)
        return compiled

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sources = [
            *(copied / "cuda" / "scan" / name for name in SOURCES),
            FOLDER / "scan.cpp",
            FOLDER / "scheduler.cpp",
        ]
        objects = list(pool.map(compile_one, sources))
    subprocess.run([*command, *sanitizer, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.emulated_scan_states.restype = ctypes.c_int64
    lib.emulated_scan_fwd.restype = lib.emulated_scan_bwd.restype = ctypes.c_char_p
    return lib


def _image(t: torch.Tensor | None) -> ImageArg:
    """Of (batch, H, W, G, .)."""
    return ImageArg() if t is None else ImageArg(t.data_ptr(), t.stride(0), t.stride(2), t.stride(3), 0)


def _parameter(t: torch.Tensor | None) -> ParamArg:
    return ParamArg() if t is None else ParamArg(t.data_ptr(), t.dtype == torch.float32)


def _array(kind, values):
    return (kind * len(values))(*values)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, kernel, options, *tensors):
        images, parameters = tensors[: len(IMAGES)], tensors[len(IMAGES) :]
        u, A = images[0], parameters[0]
        batch, height, width, groups, dim = u.shape
        rank = 0 if parameters[2] is None else images[1].shape[-1]
        sizes = Sizes(batch, height, width, groups, dim, A.shape[-1], rank, A.shape[1], A.shape[1])
        sizes.dtype, sizes.softplus, sizes.norm_eps = DTYPES[u.dtype], options["softplus"], options["norm_eps"]
        sizes.aligned = dim % 4 == 0
        directions = _array(ctypes.c_int, [CODES[d] for d in options["directions"]])
        lib = load(library)
        y = torch.full_like(u, torch.nan)
        states = torch.full((lib.emulated_scan_states(ctypes.byref(sizes)),), torch.nan)
        arguments = [kernel, ctypes.byref(sizes), directions, _array(ImageArg, [_image(t) for t in (*images, y)])]
        arguments += [_array(ParamArg, [_parameter(t) for t in parameters])]
        problem = lib.emulated_scan_fwd(*arguments, ctypes.c_void_p(states.data_ptr()))
        assert problem is None, problem
        ctx.library, ctx.arguments = library, arguments
        ctx.kept = tensors, states
        return y

    @staticmethod
    def backward(ctx, dy):
        tensors, states = ctx.kept
        images = tensors[: len(IMAGES)]
        dy = torch.empty_like(images[0]).copy_(dy)
        gradients = [None if t is None else torch.full_like(t, torch.nan) for t in tensors]
        of_images = _array(ImageArg, [_image(t) for t in gradients[: len(IMAGES)]])
        of_parameters = _array(ParamArg, [_parameter(t) for t in gradients[len(IMAGES) :]])
        ctx.arguments[3] = _array(ImageArg, [_image(t) for t in (*images, dy)])
        problem = load(ctx.library).emulated_scan_bwd(
            *ctx.arguments, ctypes.c_void_p(states.data_ptr()), of_images, of_parameters
        )
        assert problem is None, problem
        return None, None, None, *gradients


def scan(library: Path, kernel: str, *, directions, softplus=True, norm_eps=1e-5, **tensors) -> torch.Tensor:
    """`groupmamba_ext.grouped_selective_scan` by a kernel for the GPU, one of `KERNELS`."""
    options = {"directions": directions, "softplus": softplus, "norm_eps": norm_eps}
    return _Scan.apply(library, KERNELS.index(kernel), options, *(tensors.get(name) for name in (*IMAGES, *PARAMETERS)))


def cross_scan(library: Path, *, directions, u, softplus=True, **tensors) -> torch.Tensor:
    """`groupmamba_ext.cross_selective_scan` of u (batch, H, W, D) by the sm_90 kernels."""
    of_each = u.unsqueeze(3).expand(*u.shape[:3], len(directions), u.shape[3])
    parts = scan(library, "cross_sm90", directions=directions, softplus=softplus, u=of_each, **tensors)
    return parts.float().sum(3).to(u.dtype)
