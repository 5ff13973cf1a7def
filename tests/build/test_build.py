# SPDX-License-Identifier: Apache-2.0
"""The built libraries: what they need of their surroundings, what ptxas made of the kernels, how they are found."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from groupmamba_ext import _load

ROOT = Path(__file__).resolve().parents[2]
NEEDED = re.compile(r"lib(torch|stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so[.\d]*|ld-linux.*")
DT_NEEDED, DT_RPATH, DT_RUNPATH = 1, 15, 29
SHN_UNDEF, STB_GLOBAL = 0, 1


class Elf:
    """As much of a 64-bit little-endian ELF shared object as the audits need."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01", f"{path} is no 64-bit little-endian ELF file"
        (table,) = struct.unpack_from("<Q", self.data, 40)
        size, count, names = struct.unpack_from("<HHH", self.data, 58)
        headers = [struct.unpack_from("<IIQQQQ", self.data, table + i * size) for i in range(count)]
        name_offset = headers[names][4]
        self.sections = {self._text(name_offset + h[0]): self.data[h[4] : h[4] + h[5]] for h in headers if h[1] != 8}

    def _text(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode()

    def _dynamic_name(self, offset: int) -> str:
        names = self.sections[".dynstr"]
        return names[offset : names.index(b"\0", offset)].decode()

    def dynamic(self, tag: int) -> list[str]:
        entries = struct.iter_unpack("<qQ", self.sections[".dynamic"])
        return [self._dynamic_name(value) for entry_tag, value in entries if entry_tag == tag]

    def undefined(self) -> dict[str, bool]:
        """Names of the undefined dynamic symbols; True for those that must be found (not weak)."""
        symbols = struct.iter_unpack("<IBBHQQ", self.sections[".dynsym"])
        return {
            self._dynamic_name(name): info >> 4 == STB_GLOBAL
            for name, info, _, section, _, _ in symbols
            if section == SHN_UNDEF and name
        }


@pytest.fixture(scope="module")
def folder() -> Path:
    return _load.library_path().parent


@pytest.fixture(scope="module")
def library(folder) -> Elf:
    return Elf(folder / _load.LIBRARY)


@pytest.fixture(scope="module")
def module(folder) -> Elf:
    return Elf(_load._module_path(folder))


@pytest.fixture(scope="module")
def kernels(folder) -> dict:
    return json.loads((folder / "kernels.json").read_text())


def test_op_library_uses_only_the_stable_abi(library):
    """Every undefined symbol is in torch's C shim or in the C and C++ runtimes; none is C++ of torch or Python's."""
    runtime = ctypes.CDLL("libstdc++.so.6")  # its own dependencies (libm, libc, libgcc_s) are searched too
    others = [ctypes.CDLL(name) for name in library.dynamic(DT_NEEDED) if not name.startswith("libtorch")]
    foreign = []
    for name, required in library.undefined().items():
        if re.match(r"(aoti_torch|torch)_", name) or (not required and re.match(r"_ITM_|_ZGTt|__gmon_start__", name)):
            continue  # weak: the hooks of GCC's transactional memory and profiler, present or not
        if not any(hasattr(lib, name) for lib in [runtime, *others]):
            foreign.append(name)
    assert not foreign
    unstable = [n for n in library.undefined() if re.match(r"_ZN?K?.*(3c10|2at|5torch)\d", n) or re.match(r"_?Py", n)]
    assert not unstable


def test_only_few_functions_of_torch_may_be_missing(library):
    """CPU builds of torch lack those of CUDA, torch before 2.13 the text of its errors; any other one missing at
    load time is an error."""
    weak = {name for name, required in library.undefined().items() if not required and "torch" in name}
    products = {f"aoti_torch_cuda_{name}_out" for name in ("mm", "bmm", "addmm", "baddbmm")}
    text = {"torch_exception_get_what_without_backtrace"}
    assert weak in (
        text,
        text | products | {"aoti_torch_get_current_cuda_stream", "torch_get_current_cuda_blas_handle"},
    )


def test_module_needs_neither_torch_nor_the_op_library(module):
    assert not [name for name in module.undefined() if re.search(r"torch|3c10|2at\d", name)]
    assert not [name for name in module.dynamic(DT_NEEDED) if not NEEDED.fullmatch(name) or "torch" in name]


def test_dependencies_and_search_paths(library, module):
    assert "libtorch.so" in library.dynamic(DT_NEEDED)
    assert not [name for name in library.dynamic(DT_NEEDED) if not NEEDED.fullmatch(name)]
    for elf in (library, module):
        assert elf.dynamic(DT_RPATH) == []
        assert elf.dynamic(DT_RUNPATH) == []


def test_no_build_paths_in_messages(library, module):
    """Line tables inside the GPU code keep theirs: a profiler finds the sources by them."""
    folders = [str(ROOT), str(Path(torch.__file__).parent), "groupmamba-build-", "pip-build-env", "site-packages"]
    for elf in (library, module):
        for name, content in elf.sections.items():
            if name != ".nv_fatbin":
                found = [path for path in folders if path.encode() in content]
                assert not found, f"section {name} names {found}"


def test_no_kernel_spills(kernels):
    """On 9.0, to which the kernels are fitted and which CI builds; a user's nvcc may spill a few bytes elsewhere."""
    spilling = [
        f"sm_{k['arch']}: {k['spill_bytes']} bytes in {k['name']}" for k in kernels["kernels"] if k["spill_bytes"]
    ]
    assert not [kernel for kernel in spilling if kernel.startswith("sm_90")]
    if spilling:
        warnings.warn("kernels spill registers: " + "; ".join(spilling), stacklevel=1)


def test_no_kernel_has_a_stack(kernels):
    """An array in local memory, for an index that the compiler does not know, is no spill to ptxas but costs as much:
    5 to 13% of a convolution."""
    assert not [
        k["name"] for k in kernels["kernels"] if k["arch"] == "90" and k["stack_bytes"] and not k["spill_bytes"]
    ]


def test_sources_are_those_of_cmake():
    """A source that the build does not list would rot; a folder of more than 20 files hides what it holds."""
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert sources == set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    for folder in (p for p in (ROOT / "csrc").rglob("*") if p.is_dir()):
        assert sum(p.is_file() for p in folder.iterdir()) <= 20, folder


def test_every_kernel_waits_for_those_before():
    """One that did not would read, from 9.0 on, what the kernel before it still writes (common/launch_kernel.cuh)."""
    parameters = r"(?:const __grid_constant__ \w+ \w+(?:, )?)+"
    kernel = re.compile(rf"__global__.*?_kernel\({parameters}\) \{{\n(?P<first>[^\n]*)", re.DOTALL)
    sources = sorted(p for p in (ROOT / "csrc" / "cuda").rglob("*") if p.suffix in (".cu", ".cuh"))
    assert any("__global__" in p.read_text() for p in sources if p.suffix == ".cuh")
    for source in sources:
        text = source.read_text()
        first = [match["first"].strip() for match in kernel.finditer(text)]
        assert len(first) == text.count("__global__"), source.name
        assert set(first) <= {"begin_kernel();", "pdl_launch_dependents();"}, source.name
        if "pdl_launch_dependents();" in first:
            assert text.count("pdl_wait();") > text.count("pdl_launch_dependents();"), source.name


def test_build_info(kernels):
    info = _load.build_info()
    assert set(info) == {
        "version", "torch_target", "cuda", "cuda_version", "cuda_archs", "cpu_capability", "cpu_vendor", "kernel_count"
    }  # fmt: skip
    assert info["version"] == _load.__version__
    assert info["torch_target"] == "2.10"
    assert isinstance(info["cpu_capability"], str)
    assert info["cpu_vendor"] in ("amd", "intel", "other")
    assert info["kernel_count"] == kernels["kernel_count"]
    assert info["cuda"] is (info["cuda_version"] is not None) is bool(info["cuda_archs"])
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+", info["cuda_version"])
        numbers = {a.partition("+")[0].replace(".", "").rstrip("af") for a in info["cuda_archs"]}
        assert numbers == set(kernels["architectures"])
        assert info["kernel_count"] > 0
    else:
        assert info["kernel_count"] == 0


def test_launch_plans():
    plan = _load.launch_plan("grouped_selective_scan", tokens=56 * 56, dim=16)
    assert plan["lanes"] & (plan["lanes"] - 1) == 0
    assert _load.launch_plan("grouped_selective_scan", tokens=49, dim=16)["forward_threads"] < plan["forward_threads"]
    conv = _load.launch_plan("depthwise_conv3x3", batch=2, height=57, width=31, groups=4, dim=87)
    for threads in (plan["forward_threads"], plan["backward_threads"]):
        assert threads % 32 == 0
        assert 32 <= threads <= 1024
    for half in ("forward", "backward"):
        assert 1 <= conv[f"{half}_threads"] <= 1024
        assert (conv[f"{half}_strips"] - 1) * conv[f"{half}_rows"] < 57 <= conv[f"{half}_strips"] * conv[f"{half}_rows"]
    norm = _load.launch_plan("layer_norm", batch=2, tokens=57 * 31, dim=348)
    assert (norm["strips"] - 1) * norm["strip_tokens"] < 57 * 31 <= norm["strips"] * norm["strip_tokens"]
    with pytest.raises(ValueError, match=r"dim .* got 0"):
        _load.launch_plan("grouped_selective_scan", tokens=49, dim=0)
    with pytest.raises(ValueError, match=r"op .* got 'softmax'"):
        _load.launch_plan("softmax", dim=1)


@pytest.mark.parametrize(
    ("built", "gpu", "expected"),
    [
        (["9.0"], (9, 0), True),
        (["8.0"], (8, 9), True),
        (["8.9"], (8, 6), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0+PTX"], (8, 9), False),
        (["9.0a"], (9, 0), True),
        (["10.0a"], (10, 3), False),
        (["10.0f"], (10, 3), True),
        (["10.0a+PTX"], (12, 0), False),
        (["7.5", "12.0+PTX"], (12, 1), True),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(built, gpu, expected):
    assert _load.runs_on(built, *gpu) is expected


def test_unsupported_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    info = {"cuda": True, "cuda_archs": ["8.0", "9.0+PTX"]}
    monkeypatch.setattr(_load, "build_info", lambda: info)
    with pytest.raises(RuntimeError, match=r"8\.0, 9\.0\+PTX.*cuda:71, Old GPU.*6\.1.*TORCH_CUDA_ARCH_LIST=6\.1"):
        _load.check_device_supported(71)
    info["cuda"] = False
    with pytest.raises(RuntimeError, match=r"without its CUDA half.*Old GPU.*pip install \."):
        _load.check_device_supported(72)


@pytest.mark.parametrize("version", [_load.__version__, "99.0"])
def test_source_tree_without_libraries(folder, tmp_path, version):
    """It uses the installed libraries if they have its version, else it imports and says what to do on first use."""
    ignore = shutil.ignore_patterns("*.so", "*.json", "__pycache__")
    copy = shutil.copytree(ROOT / "groupmamba_ext", tmp_path / "groupmamba_ext", ignore=ignore)
    (copy / "_version.py").write_text(f'__version__ = "{version}"\n')
    program = (
        "import groupmamba_ext as ext, torch\n"
        "from groupmamba_ext import _load\n"
        "print(ext.__file__, _load.native_available(), _load.load_error(), sep='|')\n"
        "ext.build_info()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(folder.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    origin, available, error = done.stdout.strip().split("|")
    assert Path(origin).parent == copy
    if version == _load.__version__:
        assert (available, error, done.returncode) == ("True", "None", 0), done.stderr
    else:
        assert (available, done.returncode) == ("False", 1)
        assert f"holds version {_load.__version__}" in error
        assert "`pip install .`" in error
        assert error in done.stderr


def _import_file(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ptxas_report_is_read():
    report = _import_file(ROOT / "cmake" / "ptxas_report.py")
    text = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Zfirst' for 'sm_80'
ptxas info    : Function properties for _Zfirst
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Zfirst' for 'sm_90a'
ptxas info    : Function properties for _Zfirst
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
    assert report.parse(text) == [
        {"name": "_Zfirst", "arch": "80", "registers": 255, "spill_bytes": 28, "stack_bytes": 8},
        {"name": "_Zfirst", "arch": "90", "registers": 40, "spill_bytes": 0, "stack_bytes": 0},
    ]


def test_build_hook_takes_only_a_recent_torch(tmp_path):
    pytest.importorskip("setuptools")
    hook = _import_file(ROOT / "build_backend" / "groupmamba_build.py")
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    for version, expected in (("2.9.1", None), ("2.10.0+cpu", package), ("3.0.0", package), ("1.13", None)):
        (package / "version.py").write_text(f"__version__ = '{version}'\n")
        assert hook._torch_in([str(tmp_path)]) == expected, version
    assert hook._torch_in([str(tmp_path / "none")]) is None
    assert hook.find_torch() == Path(torch.__file__).parent


def test_build_says_how_far_it_is(monkeypatch, capfd):
    """On the terminal, every few seconds; the whole output goes where it went."""
    progress = _import_file(ROOT / "build_backend" / "build_progress.py")
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    terminal = io.StringIO()
    script = "echo '[1/3] compiles a'; echo 'a note'; echo '[2/3] compiles b'"
    progress.run_with_progress(["sh", "-c", script], dict(os.environ), terminal)
    assert terminal.getvalue().split("\r")[1:] == [
        f"groupmamba: {i} of 3 build steps done after 0 min 00 s\n" for i in (1, 2)
    ]
    assert capfd.readouterr().out == "[1/3] compiles a\na note\n[2/3] compiles b\n"
    with pytest.raises(subprocess.CalledProcessError):
        progress.run_with_progress(["false"], dict(os.environ), None)
