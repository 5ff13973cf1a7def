# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels take beside their results: scratch that fits caches, whatever the image."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groupmamba_ext as ext
from support.every_op import OPS, make_case, results

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
ARENA = """
#include "cpu/scratch.h"
#include <cstdio>
int main() {
    gm::cpu::baseline::Scratch arena(nullptr);
    const int counts[] = {1, 16, 17, 100};
    for (const int count : counts) {
        const auto address = reinterpret_cast<uintptr_t>(arena.take<float>(count));
        std::printf("%zu %zu ", static_cast<size_t>(address), static_cast<size_t>(arena.used()));
    }
}
"""


# A wheel is tested where there may be no compiler.
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_arrays_of_scratch_begin_on_cache_lines(tmp_path):
    """One behind the other, each in whole lines of 64 bytes."""
    source, program = tmp_path / "arena.cpp", tmp_path / "arena"
    source.write_text(ARENA)
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-DGM_CPU_CAPABILITY=baseline"]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert [int(n) for n in said] == [0, 64, 64, 128, 128, 256, 256, 704]


def most_memory():
    """The most address space that this process had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPeak:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmPeak in /proc/self/status")


def grown():
    """By how much each op's first calls, forward and backward, raise it, with one thread."""
    torch.set_num_threads(1)
    ext.build_info()
    with ext.backend("reference"):  # what torch itself takes for the first time
        for name in OPS:
            results(make_case(name, "cpu", torch.float64, {"batch": 1, "h": 2, "w": 3}))
    out = {}
    for name in OPS:
        before = most_memory()
        results(make_case(name, "cpu", torch.float64))
        out[name] = most_memory() - before
    return out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_scratch_is_small():
    """An op's inputs here are at most 7 MiB; all ops together raised it by 14 MiB when this was written."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    code = "import json, test_cpu_memory; print(json.dumps(test_cpu_memory.grown()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == set(OPS)
    assert all(bytes < 64 * MIB for bytes in found.values()), found
