# SPDX-License-Identifier: Apache-2.0
"""What ptxas said about every kernel: registers, spills, stack; collected while compiling and printed once at the end.

``run COMPILER ARGUMENTS...`` is nvcc's launcher: it runs the compiler and moves the lines of ``-Xptxas -v`` from stderr
into ``OBJECT.ptxas``. ``table JSON HEADER OBJECTS...`` reads those files, prints one table, and writes the figures as
JSON (installed beside libgroupmamba.so) and the number of kernels as a C++ header.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Kernels by instructions of one architecture (sm_90a) count among those of that architecture.
ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)[af]?'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
STACK = re.compile(r"(\d+) bytes stack frame")
REGISTERS = re.compile(r"Used (\d+) registers")
FIGURES = ("registers", "spill_bytes", "stack_bytes")
CHATTER = re.compile(r"ptxas info\s*:|\d+ bytes stack frame|bytes gmem")


def run(command: list[str]) -> int:
    """Compile; keep what ptxas reported, pass on everything else."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    report = [line for line in done.stderr.splitlines() if CHATTER.search(line)]
    other = [line for line in done.stderr.splitlines() if not CHATTER.search(line)]
    if other:
        print("\n".join(other), file=sys.stderr)
    if done.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("\n".join(report) + "\n")
    return done.returncode


def parse(text: str) -> list[dict]:
    """One record a kernel and architecture, in the order of ptxas."""
    records: list[dict] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            records.append({"name": entry["name"], "arch": entry["arch"]} | dict.fromkeys(FIGURES, 0))
        elif records and (spills := SPILLS.search(line)):
            records[-1]["spill_bytes"] += int(spills[1]) + int(spills[2])
            if stack := STACK.search(line):
                records[-1]["stack_bytes"] += int(stack[1])
        elif records and (registers := REGISTERS.search(line)):
            records[-1]["registers"] = int(registers[1])
    return records


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if not tool or not names:
        return names
    return subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


def table(json_path: str, header_path: str, objects: list[str]) -> None:
    kernels = [record for path in objects for record in parse(Path(path + ".ptxas").read_text())]
    for kernel, name in zip(kernels, demangle([kernel["name"] for kernel in kernels]), strict=True):
        kernel["name"] = name
    architectures = {}
    for arch in sorted({kernel["arch"] for kernel in kernels}, key=int):
        of_arch = [kernel for kernel in kernels if kernel["arch"] == arch]
        architectures[arch] = {
            "kernels": len(of_arch),
            "max_registers": max(kernel["registers"] for kernel in of_arch),
            "spilling_kernels": sum(kernel["spill_bytes"] > 0 for kernel in of_arch),
            "spill_bytes": sum(kernel["spill_bytes"] for kernel in of_arch),
        }
    count = max((figures["kernels"] for figures in architectures.values()), default=0)
    Path(json_path).write_text(
        json.dumps({"kernel_count": count, "architectures": architectures, "kernels": kernels}, indent=1) + "\n"
    )
    Path(header_path).write_text(f"#pragma once\n#define GM_KERNEL_COUNT {count}\n")
    if not architectures:
        return
    lines = ["  architecture  kernels  max registers  kernels that spill  spill bytes"]
    for arch, f in architectures.items():
        lines.append(
            f"  {'sm_' + arch:<12}  {f['kernels']:>7}  {f['max_registers']:>13}"
            f"  {f['spilling_kernels']:>18}  {f['spill_bytes']:>11}"
        )
    print("CUDA kernels built:\n" + "\n".join(lines))
    spilling = [kernel for kernel in kernels if kernel["spill_bytes"]]
    if spilling:
        print(f"!!! {len(spilling)} KERNELS SPILL REGISTERS, which costs speed (on sm_90 test_build.py fails):")
        for kernel in spilling:
            print(f"!!!   sm_{kernel['arch']}  {kernel['spill_bytes']:>6} bytes  {kernel['name']}")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(run(sys.argv[2:]))
    table(sys.argv[2], sys.argv[3], sys.argv[4:])
