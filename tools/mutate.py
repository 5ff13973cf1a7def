#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Mutation testing: one-line faults in kernels, ops and layers, each of which the tests must notice.

    python tools/mutate.py list                       the mutants of this tree, drawn from --seed
    python tools/mutate.py run --kinds cpu,python     applies each to a copy of the tree, builds, runs the tests
    python tools/mutate.py build --libraries DIR      builds the CUDA mutants, for a machine with a GPU
    python tools/mutate.py run --kinds cuda --libraries DIR

How they are drawn stands in tools/_mutants.py. Results are kept in --report, tools/mutants.json; the same command goes
on from it, and runs what a change of the tree has drawn anew. Verdicts: "killed" by the first test that fails (or a
crash, or an endless loop), "compiler" where it does not compile, "survived" otherwise. Survivors that no test can tell
from the original stand in EQUIVALENT with the reason, and are not run.

Exit status: 0 where none survived, 1 where some did, 2 where mutants are left.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import lzma
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from _mutants import COUNTS, SEED, Mutant, draw

ROOT = Path(__file__).resolve().parents[1]
# (file, line, mutated line): why no test can tell.
EQUIVALENT = {
    (
        "groupmamba_ext/transforms.py",
        "stacked = tuple(torch.stack(parts)[:count] for parts in zip(*results, strict=True))",
        "stacked = tuple(torch.stack(parts)[:count] for parts in zip(*results, strict=False))",
    ): "one op returns equally many results for each sample, so there is nothing for strict to refuse",
    (
        "groupmamba_ext/registry.py",
        "if _traced() or (torch.is_grad_enabled() and _require_gradient(args)):",
        "if _traced() or (torch.is_grad_enabled() or _require_gradient(args)):",
    ): "chooses between two ways to the same kernel: more calls take the one with the check, which is slower",
    (
        "csrc/cpu/params.h",
        "int64_t batch = 0, token = 0, group = 0;",
        "int64_t batch = 1, token = 0, group = 0;",
    ): "of an absent image, whose strides nothing reads: the scans, which alone have any, look at `data` or at z first",
    (
        "csrc/cpu/params.h",
        "int64_t batch = 0, token = 0, group = 0;",
        "int64_t batch = 0, token = 0, group = 1;",
    ): "of an absent image, as above",
    (
        "csrc/cpu/grouped_scan_bwd_kernels.cpp",
        "if (p.states > 1) replay_state<A, false>(p, s, w, saved, n, count, scratch);",
        "if (p.states >= 1) replay_state<A, false>(p, s, w, saved, n, count, scratch);",
    ): "with one state it writes again what the first replay wrote, of inputs that nothing in between changes",
    (
        "csrc/cpu/grouped_scan_fwd_kernels.cpp",
        "constexpr int64_t kBlockBytes = 24 * 1024;  // u, step and y of a block; half of a usual first-level cache",
        "constexpr int64_t kBlockBytes = 24 / 1024;  // u, step and y of a block; half of a usual first-level cache",
    ): "blocks of 8 tokens, the least, in place of up to 128: the same operations in the same order, a matter of speed",
    (
        "csrc/cuda/scan/sm90/channel_table.cuh",
        "table[kBias * Block::kWidth + c] = in ? param_of<T>(args.dt_bias, bias) * kLog2e : -1e30f;",
        "table[kBias / Block::kWidth + c] = in ? param_of<T>(args.dt_bias, bias) * kLog2e : -1e30f;",
    ): "kBias is 0, the first row of the table",
}

# Quick tests for what stands in a file's name, the likeliest to fail first; then all of EVERY.
FIRST = (
    (r"explain", ["test_explain.py"]),
    (r"host/layout", ["test_layouts.py", "test_storage.py", "test_conv.py"]),
    (r"scratch", ["test_scan.py", "test_norms.py", "test_conv.py", "test_cpu_memory.py"]),
    (r"cross", ["test_cross_scan.py", "test_generated.py", "test_scan.py"]),
    (
        r"grouped_sel|grouped_scan|scan|vec|math|rows|capab",
        ["test_generated.py", "test_scan.py", "test_scan_semantics.py", "test_instruction_sets.py"],
    ),
    (r"narrow", ["test_narrow_conv.py", "test_raw_ops.py", "test_batch_norm.py", "test_entry_conv.py"]),
    (r"depthwise|conv", ["test_conv.py", "test_generated.py", "test_feed_forward.py"]),
    (r"norm", ["test_norms.py", "test_generated.py", "test_batch_norm.py"]),
    (
        r"layers/|layer/|group|feed|gemm|param|affinity|images",
        ["test_layer.py", "test_layer_state.py", "test_generated.py", "test_plain.py", "test_layer_groups.py"],
    ),
)
# Of what is for CUDA: tests that need no GPU, and so come first. The kernels run on the CPU too (without the tests that
# look at every access); or _C reports what is computed, where it is built and not just libgroupmamba.so swapped.
WITHOUT_GPU = (
    (r"cuda/(scan|images|common)/", "test_emulated_scan.py"),
    (r"cuda/(depthwise_conv|common)/", "test_emulated_conv.py"),
    (r"cuda/(layer_norm|common)/", "test_emulated_norms.py"),
    (r"cuda/(narrow_conv|common)/", "test_emulated_narrow_conv.py"),
    (r"cuda/(feed_forward|depthwise_conv|common)/", "test_emulated_feed_forward.py"),
    (r"host/layout", "test_layouts.py"),
)
EVERY = (
    "test_generated.py", "test_ops.py", "test_bad_arguments.py", "test_layouts.py", "test_raw_ops.py",
    "test_fake_cuda.py", "test_instruction_sets.py", "test_cpu_memory.py", "test_conv.py", "test_norms.py",
    "test_storage.py", "test_masked_tokens.py", "test_scan.py", "test_scan_semantics.py", "test_scan_split.py",
    "test_cross_scan.py", "test_layer.py", "test_layer_groups.py", "test_layer_values.py", "test_layer_ops.py",
    "test_layer_state.py", "test_unwritten_memory.py", "test_feed_forward.py", "test_batch_norm.py",
    "test_entry_conv.py", "test_narrow_conv.py",
    "test_plain.py", "test_explain.py", "test_backend.py", "test_bitwise.py", "test_hard_use.py",
    "test_forward_mode.py", "test_onednn_linear.py", "test_tools.py", "test_tracing.py", "test_transforms.py",
    "test_blocks.py", "test_models.py",
)  # fmt: skip
LIBRARY, UNCHANGED = "groupmamba_ext/libgroupmamba.so", "unchanged"  # a folder for the libraries of the tree as it is
SECONDS = 1200  # of processor time for the tests of one mutant; the unchanged tree takes a third


def copy_of_tree(root: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:  # no git: an sdist
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        source = ROOT / name
        target = root / name
        if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def build(root: Path, cuda: bool) -> bool:
    """Builds what changed in ``root``; False where it does not compile."""
    folder = root / "build-mutants"
    if not (folder / "build.ninja").exists():
        configure = [
            "cmake",
            "-S",
            str(root),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        configure += [f"-DGM_CUDA={'ON' if cuda else 'OFF'}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    jobs = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs], capture_output=True, text=True)
    if done.returncode != 0:
        return False
    subprocess.run(["cmake", "--install", str(folder), "--prefix", str(root)], check=True, stdout=subprocess.DEVNULL)
    return True


def first_tests(name: str) -> list[str]:
    for pattern, tests in FIRST:
        if re.search(pattern, name):
            return tests
    return ["test_ops.py", "test_bad_arguments.py", "test_generated.py"]


def pytest(root: Path, arguments: list[str], seconds: float) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # Of processor time: what others run on the machine does not count, a loop without an end does.
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_CPU, (int(seconds), int(seconds) + 60))
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, preexec_fn=limit)


def run_tests(root: Path, mutant: Mutant, more: list[str]) -> str:
    """The test that failed, "crash" or "endless", or "" where all passed; ``more`` are arguments of pytest."""
    first = first_tests(mutant.file)
    on_cuda = ["-m", "cuda"] if mutant.kind == "cuda" else []
    no_gpu = [name for pattern, name in WITHOUT_GPU if mutant.kind == "cuda" and re.search(pattern, mutant.file)]
    rest = [name for name in EVERY if name not in first]
    for names, select in (
        (no_gpu, ["-k", "not thread and not missing and not faults and not race"]),
        (first, on_cuda),
        (rest, on_cuda),
    ):
        paths = [str(path) for name in names for path in sorted((root / "tests").rglob(name))]
        if not paths:
            continue
        done = pytest(root, ["-x", "-q", "--tb=no", *more, *select, *paths], SECONDS)
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "endless"
        if done.returncode == 5:  # nothing collected
            continue
        if done.returncode != 0:
            failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
            return failed[1] if failed else f"crash ({done.returncode})"
    return ""


def prepare(root: Path, options: argparse.Namespace, kinds: list[str]) -> None:
    """A copy of the tree in ``root``, built, and its libraries beside it."""
    root.mkdir(parents=True, exist_ok=True)
    copy_of_tree(root)
    in_place = (ROOT / LIBRARY).exists()  # as by `pip install -e .`
    if in_place and (kinds == ["python"] or options.libraries):
        for path in (ROOT / "groupmamba_ext").glob("*.so"):
            shutil.copyfile(path, root / "groupmamba_ext" / path.name)
    elif options.libraries:
        raise SystemExit(f"mutate: --libraries needs {LIBRARY} of the unchanged tree: pip install -e .")
    elif not build(root, "cuda" in kinds):
        raise SystemExit("mutate: the unchanged tree does not compile")
    (root / UNCHANGED).mkdir(exist_ok=True)
    for path in (root / "groupmamba_ext").glob("*.so"):
        shutil.copyfile(path, root / UNCHANGED / path.name)


def try_out(root: Path, mutant: Mutant, options: argparse.Namespace) -> dict:
    """What the report says of a mutant."""
    libraries = Path(options.libraries) if options.libraries else None
    began = time.monotonic()
    mutant.apply(root)
    try:
        verdict, by = judge(root, mutant, libraries, shlex.split(options.pytest))
    finally:
        mutant.undo(root)
    if verdict == "killed" and by.startswith("tests/"):
        check_unchanged(root, by)
    return {**asdict(mutant), "verdict": verdict, "by": by, "seconds": round(time.monotonic() - began)}


def run(options: argparse.Namespace) -> int:
    kinds = options.kinds.split(",")
    mutants = [m for m in draw(ROOT, options.seed) if m.kind in kinds]
    report = Path(options.report)
    results = json.loads(report.read_text()) if report.exists() else {}
    stop = time.monotonic() + 60 * options.minutes
    work = Path(options.work or tempfile.mkdtemp(prefix="groupmamba-mutants-"))
    todo: list[Mutant] = []
    for mutant in mutants:
        if reason := EQUIVALENT.get((mutant.file, mutant.line.strip(), mutant.mutated.strip())):
            results[mutant.identity] = {**asdict(mutant), "verdict": "equivalent", "by": reason, "seconds": 0}
        elif options.libraries and not (Path(options.libraries) / f"{library_name(mutant)}.so.xz").exists():
            print(f"not built: {mutant.key}", flush=True)
        elif mutant.identity not in results or (options.again and results[mutant.identity]["verdict"] == "survived"):
            todo.append(mutant)
    waiting = iter(todo)
    lock = threading.Lock()

    def worker(root: Path) -> None:
        prepare(root, options, kinds)
        while time.monotonic() < stop:
            with lock:
                mutant = next(waiting, None)
            if mutant is None:
                return
            found = try_out(root, mutant, options)
            with lock:
                results[mutant.identity] = found
                report.write_text(json.dumps(results, indent=1))
            print(f"{found['verdict']}: {mutant.key} ({found['by']}, {found['seconds']} s)", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        roots = [work] if options.jobs == 1 else [work / str(i) for i in range(options.jobs)]
        for done in [pool.submit(worker, root) for root in roots]:
            done.result()
    report.write_text(json.dumps(results, indent=1))
    print(table([results[m.identity] | asdict(m) for m in mutants if m.identity in results]))
    survivors = [m for m in mutants if results.get(m.identity, {}).get("verdict") == "survived"]
    for mutant in survivors:
        print(f"\nsurvived: {mutant.file}:{mutant.number}\n-{mutant.line}\n+{mutant.mutated}")
    return 1 if survivors else 2 if any(m.identity not in results for m in mutants) else 0


@functools.cache
def check_unchanged(root: Path, test: str) -> None:
    """SystemExit where ``test`` fails on the unchanged tree too, and so says nothing."""
    mutated = {path: path.read_bytes() for path in (root / "groupmamba_ext").glob("*.so")}
    for path in mutated:
        shutil.copyfile(root / UNCHANGED / path.name, path)
    done = pytest(root, ["-q", "--tb=short", str(root / test)], SECONDS)
    for path, content in mutated.items():
        path.write_bytes(content)
    if done.returncode != 0:
        raise SystemExit(f"mutate: {test} fails on the unchanged tree\n{done.stdout}")


def judge(root: Path, mutant: Mutant, libraries: Path | None, more: list[str]) -> tuple[str, str]:
    if mutant.kind != "python":
        if libraries is None:
            if not build(root, mutant.kind == "cuda"):
                return "compiler", "does not compile"
        else:
            packed = libraries / f"{library_name(mutant)}.so.xz"
            if not packed.stat().st_size:
                return "compiler", "does not compile"
            (root / "groupmamba_ext" / "libgroupmamba.so").write_bytes(lzma.decompress(packed.read_bytes()))
    by = run_tests(root, mutant, more)
    return ("killed", by) if by else ("survived", "-")


def library_name(mutant: Mutant) -> str:
    return re.sub(r"\W+", "_", mutant.key)


def build_libraries(options: argparse.Namespace) -> int:
    """libgroupmamba.so of each CUDA mutant, packed, into a folder; an empty file where it does not compile."""
    root = Path(options.work or tempfile.mkdtemp(prefix="groupmamba-mutants-"))
    root.mkdir(parents=True, exist_ok=True)
    copy_of_tree(root)
    if not build(root, True):
        raise SystemExit("mutate: the unchanged tree does not compile")
    out = Path(options.libraries)
    out.mkdir(parents=True, exist_ok=True)
    for mutant in draw(ROOT, options.seed):
        packed = out / f"{library_name(mutant)}.so.xz"
        if mutant.kind != "cuda" or packed.exists():
            continue
        mutant.apply(root)
        compiled = build(root, True)
        mutant.undo(root)
        print(f"{'built' if compiled else 'does not compile'}: {mutant.key}", flush=True)
        content = (root / LIBRARY).read_bytes() if compiled else b""
        beside = packed.with_suffix(".part")
        beside.write_bytes(lzma.compress(content, preset=6) if compiled else content)
        beside.replace(packed)
    return 0


def table(results: list[dict]) -> str:
    lines = ["| mutant | verdict | by |", "|---|---|---|"]
    for r in results:
        row = f"| `{r['file']}:{r['number']}` `{r['what']}` | {r['verdict']} | {r['by']} |"
        lines.append(row.replace("||", "\\|\\|"))
    counts = {v: sum(r["verdict"] == v for r in results) for v in ("killed", "compiler", "equivalent", "survived")}
    return "\n".join([*lines, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mode", choices=("list", "run", "build", "table"))
    parser.add_argument("--kinds", default="python,cpu", help=f"of {', '.join(COUNTS)}, by commas")
    parser.add_argument("--seed", type=int, default=SEED, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--report", default=str(ROOT / "tools" / "mutants.json"), metavar="FILE")
    parser.add_argument("--work", metavar="DIR", help="a folder for the copy of the tree, kept for the next call")
    parser.add_argument("--libraries", metavar="DIR", help="of the CUDA mutants' libraries")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, each in a copy of its own")
    parser.add_argument("--pytest", default="", metavar="ARGS", help='more arguments of pytest, as in "-n 4"')
    parser.add_argument("--minutes", type=float, default=1e9, help="no mutant begins later")
    parser.add_argument("--again", action="store_true", help="run those that survived again, on a GPU say")
    options = parser.parse_args(argv)
    if options.mode == "list":
        for mutant in draw(ROOT, options.seed):
            print(f"{mutant.kind:6} {mutant.key}")
            difference = difflib.ndiff([mutant.line.strip()], [mutant.mutated.strip()])
            print("".join(f"       {line}\n" for line in difference if line[0] in "-+"), end="")
        return 0
    if options.mode == "table":
        results = json.loads(Path(options.report).read_text())
        print(table([results[m.identity] | asdict(m) for m in draw(ROOT, options.seed) if m.identity in results]))
        return 0
    if options.mode == "run" and options.libraries and options.kinds != "cuda":
        parser.error(f"--libraries are of --kinds cuda, not of {options.kinds}")
    if options.mode == "build":
        if not options.libraries:
            parser.error("build needs --libraries")
        return build_libraries(options)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
