# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the two compiled libraries: ``libgroupmamba.so`` (the ops) and ``_C`` (what was built).

They lie beside this file. When this folder is a source tree whose libraries were installed elsewhere (``pip install .``
and then ``pytest`` from the repository root), the installed ones are used, provided that they have this version.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from groupmamba_ext._version import __version__

OLDEST_TORCH = (2, 10)
LIBRARY = "libgroupmamba.so"
CURE = "run `pip install .` (or `pip install -e .`) in the root of the groupmamba sources"

_HERE = Path(__file__).resolve().parent
_loaded = False
_built_for_sm90a = False


def _module_path(folder: Path) -> Path | None:
    """The ``_C`` module for this Python in ``folder``, where both libraries are there."""
    paths = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in paths if path.is_file() and (folder / LIBRARY).is_file()), None)


def _import_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("groupmamba_ext._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _find() -> tuple[Path, ModuleType]:
    """Folder of the libraries and the loaded ``_C``; RuntimeError, naming the cure, where there are none."""
    roots = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    folders = dict.fromkeys([_HERE, *((Path(root) / "groupmamba_ext").resolve() for root in roots)])
    others = []
    for path in filter(None, map(_module_path, folders)):
        module = _import_module(path)
        built = module.build_info()["version"]
        if built == __version__:
            return path.parent, module
        others.append(f"{path.parent} holds version {built}")
    python = "Python {}.{}".format(*sys.version_info)
    found = "; ".join(others) or f"there is no {LIBRARY} with a _C module for {python} in {_HERE} or on sys.path"
    raise RuntimeError(f"the compiled ops of groupmamba {__version__} are not installed: {found}. To cure it, {CURE}.")


def library_path() -> Path:
    """Where the op library lies; it needs no Python, so a C++ program can load it too."""
    return _find()[0] / LIBRARY


def _check_torch() -> None:
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or tuple(map(int, version.groups())) < OLDEST_TORCH:
        raise RuntimeError(
            f"groupmamba {__version__} needs torch >= 2.10, and this is torch {torch.__version__}: "
            "pip install --upgrade 'torch>=2.10'"
        )


@functools.cache
def c_library() -> ctypes.CDLL:
    """The op library, for what it exports to ctypes."""
    return ctypes.CDLL(str(library_path()))


@ctypes.CFUNCTYPE(ctypes.c_int)
def _wants_choice_by_time() -> int:
    """Asked when a product of new sizes comes: what torch asks for cuDNN's convolutions, and whether results are to be
    those of another process too."""
    fixed = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return int(torch.backends.cudnn.benchmark and not fixed)


def load_ops() -> None:
    """Load ``libgroupmamba.so``, after which ``torch.ops.groupmamba`` has the ops; later calls do nothing.

    Raises:
        RuntimeError: torch is too old, libgroupmamba.so is missing or of another version, or it cannot be loaded; the
            message names the cure.
    """
    global _loaded, _built_for_sm90a
    if _loaded:
        return
    _check_torch()
    path = library_path()
    try:
        torch.ops.load_library(str(path))
        if build_info()["cuda"]:
            c_library().groupmamba_choose_by_time(_wants_choice_by_time)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path} cannot be loaded ({error}). To cure it, {CURE}.") from error
    _built_for_sm90a = any(entry.startswith("9.0") for entry in build_info()["cuda_archs"])
    _loaded = True


def has_sm90a(device: torch.device) -> bool:
    """Whether the loaded ops have kernels that only compute capability 9.0 runs, and a CUDA device has it."""
    if not _built_for_sm90a or not torch.cuda.is_available():  # or these are fake tensors
        return False
    gpu = torch.cuda.get_device_properties(device.index or 0)  # torch.compile knows what this is
    return (gpu.major, gpu.minor) == (9, 0)


@functools.cache
def load_error() -> str | None:
    """Why the compiled ops cannot be used, None where they can."""
    try:
        load_ops()
    except RuntimeError as error:
        return str(error)
    return None


def native_available() -> bool:
    """Whether the compiled ops can be used."""
    return load_error() is None


def build_info() -> dict[str, Any]:
    """What the libraries were built for.

    Returns:
        A new dict: ``version`` (str), ``torch_target`` (the oldest torch they run under, str), ``cuda`` (True when the
        CUDA half was built), ``cuda_version`` (str or None), ``cuda_archs`` (list of str in the notation of
        TORCH_CUDA_ARCH_LIST), ``cpu_capability`` (the instruction set in use on this machine, str), ``cpu_vendor``
        (``"amd"``, ``"intel"`` or ``"other"``), ``kernel_count`` (CUDA kernels per architecture, int).

    Raises:
        RuntimeError: the libraries are not installed; the message names the cure.
    """
    return _find()[1].build_info()


def launch_plan(op: str, **sizes: int) -> dict[str, int]:
    """How the CUDA kernels of ``op`` divide an image; their variants for sm_90 divide it differently.

    Args:
        op: ``"grouped_selective_scan"`` with sizes ``tokens``, ``dim`` (a group's channels), ``states=1`` and
            ``element_size=2``; ``"depthwise_conv3x3"`` with ``batch``, ``height``, ``width``, ``groups``, ``dim``;
            ``"layer_norm"`` with ``batch``, ``tokens``, ``dim``.

    Raises:
        ValueError: another ``op``, or sizes that its kernels do not take.
        RuntimeError: the libraries are not installed; the message names the cure.
    """
    module = _find()[1]
    ops = [name.removesuffix("_plan") for name in dir(module) if name.endswith("_plan")]
    if op not in ops:
        raise ValueError(f"op must be one of {ops}, got {op!r}")
    return getattr(module, f"{op}_plan")(**sizes)


def library_layouts() -> ModuleType:
    """Functions by which the compiled ops size and order what they allocate on CUDA; `layouts` repeats them.

    Raises:
        RuntimeError: the libraries are not installed; the message names the cure.
    """
    return _find()[1].layouts


def runs_on(architectures: list[str], major: int, minor: int) -> bool:
    """Whether code for ``architectures`` runs on a GPU of compute capability ``major.minor``.

    Machine code runs within its major version from its own minor upwards; with suffix ``a`` on its own capability
    only; with suffix ``f`` within its family (the same major version). PTX runs from its own capability upwards.
    """
    for entry in architectures:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        assert match is not None, entry
        built, suffix, ptx = (int(match[1]), int(match[2])), match[3], match[4]
        if suffix == "a":
            if built == (major, minor):
                return True
        elif (built[0] == major and built[1] <= minor) or (ptx and not suffix and built <= (major, minor)):
            return True
    return False


@functools.cache
def check_device_supported(index: int) -> None:
    """Raise unless the build has code for CUDA device ``index``.

    Raises:
        RuntimeError: the CUDA half was not built, or for other GPUs; the message names both sides and the cure.
    """
    info = build_info()
    major, minor = torch.cuda.get_device_capability(index)
    gpu = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"
    if not info["cuda"]:
        raise RuntimeError(
            f"groupmamba was built without its CUDA half, since there was no nvcc, and cannot run on cuda:{index}, "
            f"{gpu}. Install the CUDA toolkit, then {CURE}."
        )
    if not runs_on(info["cuda_archs"], major, minor):
        raise RuntimeError(
            f"groupmamba was built for the GPU architectures {', '.join(info['cuda_archs'])} and has no code for "
            f"cuda:{index}, {gpu}. To cure it, with TORCH_CUDA_ARCH_LIST={major}.{minor} set, {CURE}."
        )
