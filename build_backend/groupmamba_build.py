# SPDX-License-Identifier: Apache-2.0
"""setuptools' build backend (all PEP 517 and PEP 660 hooks) that builds against the torch of the target environment.

pip builds in an isolated environment whose import path hides the target's packages, but the interpreter is the
target's own: sysconfig and site still report where its packages lie. Only when no usable torch is found there do the
hooks ask for one inside the isolated environment.
"""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "find_torch",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH_REQUIREMENT = "torch>=2.10"
OLDEST_TORCH = (2, 10)


def _sees_base_packages() -> bool:
    """Whether the target is no virtual environment, or one made with --system-site-packages."""
    if sys.prefix == sys.base_prefix:
        return True
    try:
        settings = (Path(sys.prefix) / "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"^include-system-site-packages\s*=\s*true\s*$", settings, re.M | re.I) is not None


def target_package_folders() -> list[str]:
    """Where the target environment's packages lie, in the order in which Python would search them."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages([sys.prefix])]
    if _sees_base_packages():
        folders.append(site.getusersitepackages())
        folders += site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])
    return list(dict.fromkeys(folders))


def _torch_in(folders: list[str]) -> Path | None:
    spec = PathFinder.find_spec("torch", folders)
    if spec is None or not spec.origin:
        return None
    root = Path(spec.origin).parent
    try:
        version = re.search(r"__version__ = '(\d+)\.(\d+)", (root / "version.py").read_text())
    except OSError:
        return None
    if version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
        return None
    return root


def find_torch() -> Path | None:
    """Folder of the torch to compile with: the target environment's, else the build environment's, else None."""
    return _torch_in(target_package_folders()) or _torch_in(sys.path)


def _torch_if_missing() -> list[str]:
    return [] if find_torch() else [TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _torch_if_missing()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _torch_if_missing()
