# SPDX-License-Identifier: Apache-2.0
"""``groupmamba info``: what a bug report needs to say, as a Markdown list."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata

import torch
from torch.utils import collect_env

import groupmamba_ext as ext
from groupmamba_ext._command import gpu_problem, one_line
from groupmamba_ext._load import check_device_supported

PACKAGES = ("numpy", "triton", "timm", "torchvision", "segmentation-models-pytorch")
VARIABLES = re.compile(
    "GROUPMAMBA_.*|TORCH_CUDA_ARCH_LIST|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|OMP_NUM_THREADS|"
    "PYTORCH_(CUDA_)?ALLOC_CONF"
)


def _build() -> tuple[str, str, bool]:
    """What the ops were built for, the instruction set in use on this CPU, and whether the ops can be used."""
    problem = ext._load.load_error()
    try:
        built = ext.build_info()
    except RuntimeError:
        return problem or "", "", False
    target = f"torch >= {built['torch_target']} and the CPU"
    if built["cuda"]:
        architectures = " ".join(built["cuda_archs"])
        target += f", and with CUDA {built['cuda_version']} for {architectures} ({built['kernel_count']} kernels)"
    else:
        target += " alone, without the CUDA half"
    return problem or f"built for {target}", built["cpu_capability"], problem is None


def _torch() -> str:
    parts = [str(torch.__version__)]
    if torch.version.cuda is not None:
        parts.append(f"built with CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        parts.append("built without CUDA")
    return ", ".join(parts)


def _cpu(capability: str) -> str:
    name = re.search(r"Model name: *(.+)", collect_env.get_cpu_info(collect_env.run))
    cores = len(os.sched_getaffinity(0))
    parts = [name[1] if name else platform.machine(), f"cores: {cores}", f"threads: {torch.get_num_threads()}"]
    return ", ".join([*parts, f"kernels for {capability}"] if capability else parts)


def _gpus() -> Iterator[tuple[str, bool]]:
    """A line for each GPU and whether the ops can use it; one line where there is none that torch can use."""
    problem = gpu_problem(ops=False)
    if problem is not None:
        yield f"none that can be used: {problem}", True
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = (
            f"cuda:{index}, {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        try:
            check_device_supported(index)
        except RuntimeError as error:
            yield f"{text}, cannot be used: {one_line(error)}", False
        else:
            yield f"{text}, can be used", True


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "none of " + ", ".join(PACKAGES)


def main() -> int:
    """Prints the list; 1 if the ops, or a GPU that torch can use, cannot be used by this build, else 0."""
    build, capability, usable = _build()
    python = f"{platform.python_version()} ({sys.implementation.name}, {platform.machine()})"
    system = f"{collect_env.get_os(collect_env.run)}, Linux {platform.release()}, {' '.join(platform.libc_ver())}"
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)]
    gpus = list(_gpus())
    lines = [
        ("groupmamba", f"{ext.__version__}, {build}"),
        ("torch", _torch()),
        ("Python", python),
        ("system", system),
        ("CPU", _cpu(capability)),
        *(("GPU", text) for text, _ in gpus),
        ("GPU driver", collect_env.get_nvidia_driver_version(collect_env.run) or "nvidia-smi finds none"),
        ("packages", _packages()),
        ("environment", " ".join(settings) or "none of this project's or CUDA's variables is set"),
    ]
    for name, text in lines:
        print(f"- {name}: {one_line(text)}")
    return 0 if usable and all(supported for _, supported in gpus) else 1
