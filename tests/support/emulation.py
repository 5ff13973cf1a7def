# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels on the CPU, and those of the scan: see emulation/README.md. The convolution's are in emulated_conv.py,
the norms' in emulated_norm.py."""

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

SANITIZED = "GROUPMAMBA_EMULATION"  # names the sanitized library in the process that runs it
# scheduler.cpp switches between fibers by instructions of x86-64. Without a compiler there is nothing to run.
needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="needs a C++ compiler for x86-64",
)
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "emulation"
SOURCES = {  # of csrc/cuda/; emulation/<name>.cpp has the functions that call them
    "scan": (
        "scan/fwd.cu", "scan/bwd.cu", "scan/reduce.cu", "scan/many_states/fwd.cu", "scan/many_states/bwd.cu",
        "scan/many_states/select.cpp", "scan/sm90/fwd.cu", "scan/sm90/bwd.cu", "scan/sm90/cross_fwd.cu",
        "scan/sm90/cross_bwd.cu", "scan/sm90/tma_maps.cpp", "images/images.cu",
    ),
    "conv": tuple(f"depthwise_conv/{name}.cu" for name in ("fwd", "bwd", "fwd_sm90", "bwd_sm90")),
    "narrow_conv": tuple(f"narrow_conv/{name}.cu" for name in ("pack", "conv_sm90a", "weight_sm90a")),
    "feed_forward": ("feed_forward/fwd_sm90a.cu", "feed_forward/bwd_sm90a.cu"),
    "norm": tuple(f"layer_norm/{name}.cu" for name in ("pool", "modulated_fwd", "modulated_bwd")),
}  # fmt: skip
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")
BLOCK_NUMBER = re.compile(r'asm volatile\("mov\.u32 %0, %%ctaid\.x;" : "=r"\((\w+)\)\);')
LOAD_SHARED = re.compile(r'asm volatile\("ld\.shared\.[^"]*"\s*: (.*?)\s*: "r"\((.*)\)\);')
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


def as_cpp(source: str) -> str:
    """The kernels without what C++ has no words for."""
    # An array that the launch gives its size.
    source = DYNAMIC_SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(emulation::self().block->shared);", source)
    source = source.replace("__shared__ alignas(16)", "alignas(16) __shared__")  # the order of C++
    # A register for a float, by its name on x86, and an instruction.
    source = source.replace('"+f"', '"+x"')
    source = BLOCK_NUMBER.sub(r"\1 = blockIdx.x;", source)
    return LOAD_SHARED.sub(lambda found: f"load_shared({found[2]}, {found[1]});".replace('"=f"', ""), source)


def build(folder: Path, kernels: str, *, threads_sanitized: bool = False, csrc: Path = ROOT / "csrc") -> Path:
    """Compiles one of `SOURCES` with the C++ compiler of an x86-64 machine: on two cores the scan's take half a minute,
    the convolution's 8 seconds."""
    library, copied = folder / f"libemulated_{kernels}.so", folder / "emulated"
    for source in (csrc / "cuda").rglob("*.*"):
        target = copied / source.relative_to(csrc)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(as_cpp(source.read_text()))
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
        sources = [copied / "cuda" / name for name in (*SOURCES[kernels], "common/tensor_map.cpp")]
        objects = list(pool.map(compile_one, [*sources, FOLDER / f"{kernels}.cpp", FOLDER / "scheduler.cpp"]))
    subprocess.run([*command, *sanitizer, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


def library(folders: pytest.TempPathFactory, kernels: str) -> Path:
    """What a session's tests run: in the process that `sanitized` starts, the library that it names."""
    if SANITIZED in os.environ:
        return Path(os.environ[SANITIZED])
    return build(folders.mktemp("emulation"), kernels)


def sanitized(folder: Path, kernels: str, tests: str, chosen: str, **options) -> subprocess.CompletedProcess:
    """Some of the tests of a file under ThreadSanitizer; the file takes the library that `SANITIZED` names."""
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run([compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):  # the compiler found no such file; GCC has it, unless it was packaged apart
        pytest.skip(f"{compiler} has no ThreadSanitizer")
    environment = {
        **os.environ,
        SANITIZED: str(build(folder, kernels, threads_sanitized=True, **options)),
        "LD_PRELOAD": runtime,
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
        "OMP_NUM_THREADS": "1",
    }
    argv = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", chosen, tests]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.emulated_scan_states.restype = ctypes.c_int64
    lib.emulated_scan_fwd.restype = lib.emulated_scan_bwd.restype = ctypes.c_char_p
    return lib


def image_arg(t: torch.Tensor | None) -> ImageArg:
    """Of (batch, H, W, G, .)."""
    return ImageArg() if t is None else ImageArg(t.data_ptr(), t.stride(0), t.stride(2), t.stride(3), 0)


def param_arg(t: torch.Tensor | None) -> ParamArg:
    return ParamArg() if t is None else ParamArg(t.data_ptr(), t.dtype == torch.float32)


def array_of(kind, values):
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
        directions = array_of(ctypes.c_int, [CODES[d] for d in options["directions"]])
        lib = load(library)
        y = torch.full_like(u, torch.nan)
        states = torch.full((lib.emulated_scan_states(ctypes.byref(sizes)),), torch.nan)
        arguments = [kernel, ctypes.byref(sizes), directions, array_of(ImageArg, [image_arg(t) for t in (*images, y)])]
        arguments += [array_of(ParamArg, [param_arg(t) for t in parameters])]
        problem = lib.emulated_scan_fwd(*arguments, ctypes.c_void_p(states.data_ptr()))
        assert problem is None, problem.decode()
        ctx.library, ctx.arguments = library, arguments
        ctx.kept = tensors, states
        return y

    @staticmethod
    def backward(ctx, dy):
        tensors, states = ctx.kept
        images = tensors[: len(IMAGES)]
        dy = torch.empty_like(images[0]).copy_(dy)
        gradients = [None if t is None else torch.full_like(t, torch.nan) for t in tensors]
        of_images = array_of(ImageArg, [image_arg(t) for t in gradients[: len(IMAGES)]])
        of_parameters = array_of(ParamArg, [param_arg(t) for t in gradients[len(IMAGES) :]])
        ctx.arguments[3] = array_of(ImageArg, [image_arg(t) for t in (*images, dy)])
        problem = load(ctx.library).emulated_scan_bwd(
            *ctx.arguments, ctypes.c_void_p(states.data_ptr()), of_images, of_parameters
        )
        assert problem is None, problem.decode()
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
