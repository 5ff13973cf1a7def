# SPDX-License-Identifier: Apache-2.0
"""Drives CMakeLists.txt, which has the sources, architectures and flags; everything declarative is in pyproject.toml.

Environment: TORCH_CUDA_ARCH_LIST (which GPUs to build for), MAX_JOBS (compilers at a time), CUDACXX or CUDA_HOME
(which nvcc), CMAKE_ARGS (further arguments for CMake).
"""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))
from build_progress import run_with_progress, user_terminal  # noqa: E402
from groupmamba_build import TORCH_REQUIREMENT, find_torch  # noqa: E402

GIGABYTES_PER_JOB = 2  # what nvcc may take for one kernel file


def jobs() -> int:
    """MAX_JOBS, else as many as there are usable cores and memory for."""
    if asked := os.environ.get("MAX_JOBS"):
        return max(1, int(asked))
    kilobytes = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    return max(1, min(len(os.sched_getaffinity(0)), (kilobytes >> 20) // GIGABYTES_PER_JOB))


class CMakeBuild(build_ext):
    """Builds ``libgroupmamba.so``, ``_C`` and ``kernels.json`` in one go, in a fresh temporary folder.

    Fresh, because a CMake cache names the compilers and tools of pip's build environment, which is gone by the next
    build.
    """

    BESIDE = ("libgroupmamba.so", "kernels.json")

    def build_extension(self, ext: Extension) -> None:
        if sys.platform != "linux":
            raise SystemExit(f"groupmamba builds on Linux (x86-64 or aarch64), and this is {sys.platform}")
        torch_root = find_torch()
        if torch_root is None:
            raise SystemExit(f"no torch to build against: pip install '{TORCH_REQUIREMENT}', then build again")
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        environment = dict(os.environ)
        environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        with tempfile.TemporaryDirectory(prefix="groupmamba-build-") as folder:
            configure = ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DGM_TORCH_ROOT={torch_root}"]
            configure += shlex.split(environment.pop("CMAKE_ARGS", ""))
            subprocess.run(configure, check=True, env=environment)
            build = ["cmake", "--build", folder, "--parallel", str(jobs())]
            with user_terminal() as terminal:
                run_with_progress(build, environment, terminal)
            install = ["cmake", "--install", folder, "--prefix", str(package.parent)]
            subprocess.run(install, check=True, env=environment)

    def _beside(self, extension_file: str) -> list[str]:
        return [str(Path(extension_file).parent / name) for name in self.BESIDE]

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        return outputs + [other for path in outputs for other in self._beside(path)]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            package = ROOT.joinpath(*ext.name.split(".")).parent
            for path in self._beside(str(Path(self.build_lib, self.get_ext_filename(ext.name)))):
                shutil.copy2(path, package)


# setuptools' own build folder is temporary too, or files that the sources no longer have would come back from it.
scratch = tempfile.mkdtemp(prefix="groupmamba-setuptools-")
atexit.register(shutil.rmtree, scratch, ignore_errors=True)

setup(
    ext_modules=[Extension("groupmamba_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    options={"build": {"build_base": scratch}},
)
