#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The kernels under the sanitizers, with a verdict on the tree as it is.

    python tools/sanitize.py cpu
        Builds the CPU half with AddressSanitizer and UndefinedBehaviorSanitizer (g++, about 2 minutes of one core) and
        runs the tests of the ops and layers with it, where pytest-xdist is installed in --jobs processes. --capability
        baseline,avx2,avx512 repeats them with each instruction set of this machine; arguments behind -- go to pytest.

    python tools/sanitize.py gpu --report sanitizers.json
        Runs tests/sanitizer_cases.py, every CUDA kernel forward and backward, under compute-sanitizer's memcheck,
        racecheck, initcheck and synccheck, in slices of about --seconds each, and prints a verdict a slice. With
        --minutes it stops before that time is over; the same command goes on from the report.

Exit status: 0 where nothing was found and all was run, 1 where something was found, 2 where slices are left.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# cpu ----------------------------------------------------------------------------------------------

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# Those that reach kernels. What they check beside that, shapes and errors, costs little.
CPU_TESTS = (
    "test_scan.py", "test_scan_semantics.py", "test_scan_split.py", "test_cross_scan.py", "test_conv.py",
    "test_norms.py", "test_storage.py", "test_masked_tokens.py", "test_raw_ops.py", "test_generated.py",
    "test_bitwise.py", "test_layer.py", "test_layer_groups.py",
)  # fmt: skip
# Those that start Python anew, from the source tree, without the instrumented library; those of the check of generated
# cases, which compute faults in Python; those whose time is the compiler's of torch, with kernels that others run too.
CPU_LEFT_OUT = (
    "not another_process and not import_needs and not is_found and not what_cancels and not one_graph and not exports"
)


def build_cpu(folder: Path, jobs: int) -> Path:
    """Builds into ``folder``; returns a folder to put on PYTHONPATH: the package with the instrumented libraries."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DGM_CUDA=OFF", "-DCMAKE_BUILD_TYPE=None"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder), "--parallel", str(jobs)], check=True, stdout=subprocess.DEVNULL)
    prefix = folder / "prefix"
    shutil.rmtree(prefix, ignore_errors=True)
    shutil.copytree(
        ROOT / "groupmamba_ext",
        prefix / "groupmamba_ext",
        ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"),
    )
    install = ["cmake", "--install", str(folder), "--prefix", str(prefix)]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    return prefix


def runtime(name: str) -> str:
    """The path of a library of the compiler's that must be in a process before Python's own."""
    compiler = os.environ.get("CXX", "g++")
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"sanitize: {compiler} has no {name}; install its sanitizer runtimes")
    return path


def instrumented_environment(prefix: Path) -> dict[str, str]:
    # libstdc++ too, or AddressSanitizer finds no __cxa_throw to stand in for.
    preload = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "PYTHONPATH": os.pathsep.join([str(prefix), str(ROOT / "python")]),
        # Python and torch keep memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "passive",  # threads that wait in a loop take the time of those that work
    }


CHECK_LIBRARY = """
import ctypes, sys
from groupmamba_ext import _load
path = _load.library_path()
assert str(path).startswith(sys.argv[1]), f"{path} is not the instrumented library"
assert b"__asan_init" in path.read_bytes() and b"__ubsan_handle" in path.read_bytes(), f"{path} is not instrumented"
_load.load_ops()
print(path)
"""

# A read behind the end of a buffer in a library built with the same flags: the set-up finds what it should.
CANARY = """
#include <vector>
extern "C" int canary(int i) {
    std::vector<int> values(4, 1);
    return values.data()[i];
}
"""


def check_canary(folder: Path, environment: dict[str, str]) -> None:
    """SystemExit unless the sanitizers stop a process that reads out of bounds, and let one pass that does not."""
    source, library = folder / "canary.cpp", folder / "libcanary.so"
    source.write_text(CANARY)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *FLAGS.split(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    for index, wanted in ((3, True), (4, False)):
        code = f"import torch, ctypes; ctypes.CDLL({str(library)!r}).canary({index})"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if (done.returncode == 0) is not wanted or ("AddressSanitizer" in done.stderr) is wanted:
            raise SystemExit(f"sanitize: the set-up does not work: reading element {index} of 4 ended with "
                             f"{done.returncode}\n{done.stderr}")  # fmt: skip


def run_cpu(options: argparse.Namespace) -> int:
    start = time.monotonic()
    folder = Path(options.build).resolve()
    prefix = build_cpu(folder, options.jobs)
    environment = instrumented_environment(prefix)
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    check_canary(folder, environment)
    subprocess.run([sys.executable, "-c", CHECK_LIBRARY, str(prefix)], env=environment, check=True, cwd=folder)
    tests = [str(path) for name in CPU_TESTS for path in sorted((ROOT / "tests").rglob(name))]
    arguments = options.pytest or ["-q", "-x", "-p", "no:cacheprovider", "-k", CPU_LEFT_OUT]
    if not options.pytest and options.jobs > 1 and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(options.jobs), "--dist", "worksteal"]
    failed = []
    for capability in options.capability.split(","):
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        done = subprocess.run(
            [*command, *arguments, *tests],
            env={**environment, "GROUPMAMBA_CPU_CAPABILITY": capability},
            cwd=folder,  # or the package of the source tree would come first
        )
        verdict = "clean" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(
            f"AddressSanitizer and UBSan, {capability or 'widest'} kernels: {verdict}, {time.monotonic() - start:.0f} s"
        )
        failed += [capability] if done.returncode else []
    return 1 if failed else 0


# gpu ----------------------------------------------------------------------------------------------

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CASES = ROOT / "tests" / "sanitizer_cases.py"
# Kernels of namespace gm, by their mangled names. Not for initcheck: what other kernels write must count as written.
OURS = "kns=_ZN2gm"
REPORT_LIMIT = 20000  # of a slice; where so many are printed, others may be missing
_RECORD = re.compile(r"^========= (?P<what>\S.*)$", re.M)
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")
_LEFT_OUT = re.compile(r"^case \d+: .*, left out$", re.M)
_RAN = re.compile(r"^ran cases (\d+) to (\d+) of (\d+)$", re.M)


@dataclass
class Slice:
    """What a tool said of some cases."""

    tool: str
    first: int
    end: int  # behind the last
    seconds: float
    verdict: str  # "clean", "found", "failed", "timeout"
    ours: list[str] = field(default_factory=list)
    others: int = 0  # reports on kernels of torch and cuBLAS, which are not judged
    left_out: int = 0  # cases that the tool can't judge, see Case in sanitizer_cases.py


def reports(text: str) -> tuple[list[str], int]:
    """The records of compute-sanitizer on kernels of this project, and the number of those on others.

    A record begins with a line that is indented by one blank and goes on with lines that are indented more.
    """
    ours, others, record = [], 0, []

    def close() -> None:
        nonlocal others
        if not record or re.match(
            r"COMPUTE-SANITIZER|(ERROR|RACECHECK|LEAK) SUMMARY|Target application|Error: No", record[0]
        ):
            return
        joined = "\n".join(record)
        if "gm::" in joined or "_ZN2gm" in joined or "libgroupmamba" in joined:
            ours.append(joined)
        else:
            others += 1

    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        rest = line.removeprefix("=========")
        if rest.strip() and not rest.startswith("  "):
            close()
            record = [rest.strip()]
        elif rest.strip():
            record.append(rest.strip())
    close()
    return ours, others


def command_of(tool: str, first: int, end: int, seconds: float) -> tuple[list[str], dict[str, str]]:
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", str(REPORT_LIMIT), "--error-exitcode", "9"]
    if tool == "initcheck":  # looks at all kernels, since any may write what another one reads
        command += ["--show-backtrace", "no"]
    else:
        command += ["--kernel-name", OURS]
    environment = {**os.environ}
    if tool in ("memcheck", "initcheck"):  # each tensor its own allocation, so that one ends where it should
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command += [sys.executable, str(CASES), "--first", str(first), "--end", str(end), "--seconds", f"{seconds:g}"]
    command += ["--tool", tool]
    return command, environment


def run_slice(tool: str, first: int, end: int, options: argparse.Namespace, seconds: float) -> Slice:
    """A slice that begins with case ``first`` and ends before ``end``.

    One that takes too long is run again with half the time to begin cases in, down to a single case.
    """
    start = time.monotonic()
    command, environment = command_of(tool, first, end, seconds)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired as stopped:
        text = (stopped.stdout or b"").decode(errors="replace")
        began = [int(n) for n in re.findall(r"^case (\d+):", text, re.M)]
        behind = max([*began, first]) + 1
        if behind > first + 1:
            return run_slice(tool, first, end, options, seconds / 2 if seconds > 5 else 0)
        return Slice(tool, first, behind, time.monotonic() - start, "timeout", reports(text)[0])
    text = done.stdout + done.stderr
    ours, others = reports(text)
    ran = _RAN.search(text)
    took = time.monotonic() - start
    if ran is None:
        tail = "\n".join(text.splitlines()[-15:])
        began = [int(n) for n in re.findall(r"^case (\d+):", text, re.M)]
        return Slice(tool, first, max([*began, first]) + 1, took, "failed", [*ours, tail], others)
    summed, left_out = _SUMMARY.search(text), len(_LEFT_OUT.findall(text))
    judged = done.returncode in (0, 9) and summed and len(ours) + others < REPORT_LIMIT
    nothing = left_out == int(ran[2]) - int(ran[1])  # no case used the GPU, which the tool calls an error
    verdict = "found" if ours else "clean" if judged or nothing else "failed"
    return Slice(tool, int(ran[1]), int(ran[2]), took, verdict, ours, others, left_out)


def case_count() -> int:
    done = subprocess.run([sys.executable, str(CASES), "--count"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"sanitize: {CASES} failed\n{done.stderr}")
    return int(done.stdout)


def gaps(slices: list[Slice], total: int, jobs: int) -> list[tuple[int, int]]:
    """What no slice has run, as (first, behind the last), in at least `jobs` pieces where there are as many cases."""
    missing = sorted(set(range(total)) - {n for s in slices for n in range(s.first, s.end)})
    size = max(1, -(-len(missing) // jobs))
    pieces: list[tuple[int, int]] = []
    for n in missing:
        first, end = pieces[-1] if pieces else (-1, -1)
        if end == n and end - first < size:
            pieces[-1] = (first, n + 1)
        else:
            pieces.append((n, n + 1))
    return pieces


def run_gpu(options: argparse.Namespace) -> int:
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("sanitize: there is no compute-sanitizer on PATH; it comes with the CUDA toolkit")
    stop = time.monotonic() + 60 * options.minutes
    report = Path(options.report)
    state = json.loads(report.read_text()) if report.exists() else {"slices": []}
    slices = [Slice(**entry) for entry in state["slices"]]
    total, lock = case_count(), threading.Lock()

    def work(tool: str, first: int, end: int) -> None:
        while first < end and time.monotonic() + options.limit < stop:
            piece = run_slice(tool, first, end, options, options.seconds)
            first = piece.end
            with lock:
                slices.append(piece)
                slices.sort(key=lambda s: (TOOLS.index(s.tool), s.first))
                report.write_text(json.dumps({"total": total, "slices": [vars(s) for s in slices]}, indent=1))
                print(f"{tool}: cases {piece.first} to {piece.end - 1}: {piece.verdict} in {piece.seconds:.0f} s, "
                      f"{piece.others} reports on kernels of others", flush=True)  # fmt: skip
                for text in piece.ours[:5]:
                    print("  " + text.replace("\n", "\n  "), flush=True)

    tools = options.tools.split(",")
    with ThreadPoolExecutor(options.jobs) as pool:
        wanted = [(t, gap) for t in tools for gap in gaps([s for s in slices if s.tool == t], total, options.jobs)]
        for done in [pool.submit(work, tool, *gap) for tool, gap in wanted]:
            done.result()
    print(table(slices, total))
    if any(s.verdict != "clean" for s in slices):
        return 1
    return 2 if any(gaps([s for s in slices if s.tool == tool], total, 1) for tool in tools) else 0


def table(slices: list[Slice], total: int) -> str:
    """Markdown: a row a tool."""
    lines = ["| tool | slices | cases | longest slice | found | verdict |", "|---|---|---|---|---|---|"]
    for tool in dict.fromkeys(s.tool for s in slices):
        own = [s for s in slices if s.tool == tool]
        left = gaps(own, total, 1)
        done = total - sum(end - first for first, end in left)
        bad = [s for s in own if s.verdict != "clean"]
        verdict = "clean" if not bad else ", ".join(f"{s.verdict} in {s.first} to {s.end - 1}" for s in bad)
        verdict += "".join(f"; cases {first} to {end - 1} are left" for first, end in left)
        left_out = sum(s.left_out for s in own)
        verdict += f"; {left_out} left out" if left_out else ""
        found = sum(len(s.ours) for s in own)
        longest = max(s.seconds for s in own)
        lines.append(f"| {tool} | {len(own)} | {done - left_out} of {total} | {longest:.0f} s | {found} | {verdict} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    cpu = modes.add_parser("cpu", help="AddressSanitizer and UBSan over the CPU half")
    cpu.add_argument(
        "--build", default=str(Path(tempfile.gettempdir()) / f"groupmamba-asan-{os.getuid()}"), metavar="DIR"
    )
    cpu.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers, and processes of tests, at a time"
    )
    cpu.add_argument("--capability", default="", help="instruction sets, by commas; default: the widest")
    cpu.add_argument("pytest", nargs="*", help="arguments of pytest in place of the usual")
    gpu = modes.add_parser("gpu", help="compute-sanitizer over every CUDA kernel")
    gpu.add_argument("--tools", default=",".join(TOOLS))
    gpu.add_argument("--report", default="sanitizers.json", metavar="FILE", help="what was found; goes on from it")
    gpu.add_argument("--seconds", type=float, default=75, help="no case begins in a slice after so long")
    gpu.add_argument("--limit", type=float, default=120, help="a slice that takes so long is stopped: no verdict")
    gpu.add_argument("--jobs", type=int, default=1, help="slices at a time")
    gpu.add_argument("--minutes", type=float, default=1e9, help="no slice begins that could end later")
    options = parser.parse_args(argv)
    return run_cpu(options) if options.mode == "cpu" else run_gpu(options)


if __name__ == "__main__":
    sys.exit(main())
