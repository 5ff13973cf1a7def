# SPDX-License-Identifier: Apache-2.0
"""tools/sanitize.py and tools/mutate.py: what they read, count and say, with a sanitizer and tests that are made up."""

import ast
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

import _mutants
import mutate
import sanitize

ROOT = Path(__file__).resolve().parents[2]

# The form of compute-sanitizer's output: a record is a line with one blank behind the mark, and those with more.
FOUND = """========= COMPUTE-SANITIZER
case 0: scan
========= Invalid __global__ write of size 4 bytes
=========     at void gm::scan_fwd_kernel<float, 4>(gm::ScanArgs)+0x1230 in fwd.cu:120
=========     by thread (31,0,0) in block (2,0,0)
=========     Address 0x7f0000000000 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x2c] in libcuda.so.1
=========
========= Uninitialized __global__ memory read of size 8 bytes
=========     at void cutlass::Kernel2<cutlass_80_tensorop>(Params)+0x310
=========     by thread (0,0,0) in block (0,0,0)
=========
ran cases 0 to 3 of 3
========= ERROR SUMMARY: 2 errors
"""
CLEAN = """========= COMPUTE-SANITIZER
case 0: scan
ran cases 0 to 3 of 3
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""


def test_reports_on_own_kernels_are_told_from_others():
    ours, others = sanitize.reports(FOUND)
    assert len(ours) == 1 and others == 1
    assert ours[0].startswith("Invalid __global__ write") and "fwd.cu:120" in ours[0]
    assert sanitize.reports(CLEAN) == ([], 0)


FAKE = """#!{python}
import sys, time
arguments = sys.argv[1:]
tool, first = arguments[arguments.index("--tool") + 1], int(arguments[arguments.index("--first") + 1])
last = int(arguments[arguments.index("--end") + 1])
seconds = float(arguments[arguments.index("--seconds") + 1])
print("========= COMPUTE-SANITIZER")
end = first
while end < last and (end == first or end - first < seconds):
    print(f"case {{end}}: name" + (", left out" if tool == "racecheck" and end == 2 else ""), flush=True)
    if tool == "racecheck" and end == 3:
        time.sleep(60)
    if tool == "synccheck" and end == 4:
        raise SystemExit("CUDA error: an illegal memory access was encountered")
    if tool == "initcheck" and end == 1:
        print("========= Uninitialized __global__ memory read of size 4 bytes")
        print("=========     at void gm::norm_kernel(gm::Args)+0x10")
    if tool == "initcheck" and end == 4:
        print("========= Uninitialized __global__ memory read of size 4 bytes")
        print("=========     at void at::some_kernel(at::Args)+0x10")
    end += 1
print(f"ran cases {{first}} to {{end}} of 5")
if tool == "racecheck" and (first, end) == (2, 3):  # no case that used the GPU
    print("========= Error: process was not attached to")
    raise SystemExit(1)
print("========= ERROR SUMMARY: 1 error" if tool == "initcheck" else "========= ERROR SUMMARY: 0 errors")
sys.exit(9 if tool == "initcheck" and first <= 1 < end else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compute-sanitizer that runs 5 cases, one "second" each."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitize, "case_count", lambda: 5)
    report = tmp_path / "report.json"

    def run(tool, *more):
        arguments = ["gpu", "--tools", tool, "--report", str(report), "--seconds", "2", "--limit", "30", *more]
        status = sanitize.main(arguments)
        return status, [(s["first"], s["end"], s["verdict"]) for s in json.loads(report.read_text())["slices"]]

    return run


def test_slices_cover_all_cases(fake, capsys):
    assert fake("memcheck") == (0, [(0, 2, "clean"), (2, 4, "clean"), (4, 5, "clean")])
    assert "| memcheck | 3 | 5 of 5 |" in capsys.readouterr().out
    assert fake("memcheck")[0] == 0  # nothing is left


def test_slices_at_a_time(fake, capsys):
    assert fake("memcheck", "--jobs", "2") == (0, [(0, 2, "clean"), (2, 3, "clean"), (3, 5, "clean")])
    assert "| memcheck | 3 | 5 of 5 |" in capsys.readouterr().out
    assert fake("memcheck", "--jobs", "2")[0] == 0  # nothing is left


def test_what_is_left_is_said():
    slices = [sanitize.Slice("memcheck", *ends, 1.0, "clean") for ends in ((0, 2), (6, 7))]
    assert sanitize.gaps(slices, 9, 1) == [(2, 6), (7, 9)]
    assert sanitize.gaps(slices, 9, 3) == [(2, 4), (4, 6), (7, 9)]
    assert (
        "| memcheck | 2 | 3 of 9 | 1 s | 0 | clean; cases 2 to 5 are left; cases 7 to 8 are left |"
        in sanitize.table(slices, 9)
    )


def test_what_a_tool_can_not_judge_is_left_out(fake, capsys):
    """And counted: the third case of racecheck. The fourth takes too long."""
    status, slices = fake("racecheck", "--limit", "3", "--seconds", "1")
    assert status == 1 and slices[2] == (2, 3, "clean")  # where nothing is left of a slice, too
    assert "| racecheck | 5 | 4 of 5 |" in capsys.readouterr().out
    assert sanitize.table([sanitize.Slice("initcheck", 0, 9, 1.0, "clean", left_out=2)], 9).endswith(
        "| initcheck | 1 | 7 of 9 | 1 s | 0 | clean; 2 left out |"
    )


def test_cases_are_counted():
    assert sanitize.case_count() >= 200


def test_what_is_found_is_said(fake, capsys):
    status, slices = fake("initcheck")
    assert status == 1 and slices == [(0, 2, "found"), (2, 4, "clean"), (4, 5, "clean")]
    out = capsys.readouterr().out
    assert "gm::norm_kernel" in out and "found in 0 to 1" in out


def test_reports_on_kernels_of_others_may_hide_our_own(fake, monkeypatch):
    """Where the sanitizer printed as many as it may."""
    monkeypatch.setattr(sanitize, "REPORT_LIMIT", 1)
    assert fake("initcheck")[1] == [(0, 2, "found"), (2, 4, "clean"), (4, 5, "failed")]


def test_a_slice_that_takes_too_long_is_cut_down_to_one_case(fake):
    status, slices = fake("racecheck", "--limit", "4")
    assert status == 1
    assert slices == [(0, 2, "clean"), (2, 3, "clean"), (3, 4, "timeout"), (4, 5, "clean")]


def test_a_process_that_dies_is_no_clean_slice(fake):
    status, slices = fake("synccheck")
    assert status == 1 and slices[-1] == (4, 5, "failed")


def test_it_stops_in_time_and_goes_on(fake):
    assert fake("memcheck", "--minutes", "0.5001") == (2, [(0, 2, "clean")])
    assert fake("memcheck") == (0, [(0, 2, "clean"), (2, 4, "clean"), (4, 5, "clean")])


def test_mutants_are_enough_and_repeatable():
    mutants = _mutants.draw(ROOT)
    assert mutants == _mutants.draw(ROOT) != _mutants.draw(ROOT, 1)
    assert len({m.identity for m in mutants}) == len({m.key for m in mutants}) == len(mutants) >= 60
    assert sum(m.kind == "cuda" for m in mutants) >= 15
    folders = {str(Path(m.file).parent) for m in mutants}
    assert {"groupmamba_ext/ops", "python/groupmamba/layers", "csrc/cpu"} <= folders
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text()
        assert text.splitlines()[mutant.number - 1] == mutant.line != mutant.mutated
        if mutant.kind == "python":
            lines = text.splitlines()
            lines[mutant.number - 1] = mutant.mutated
            ast.parse("\n".join(lines))


def test_a_change_of_the_tree_draws_few_others(tmp_path):
    """Lines that move keep theirs; a file more, and a place more in every file, change a quarter at most."""
    before = _mutants.draw(ROOT)
    for name in {name for kind in _mutants.COUNTS for name in _mutants.files(ROOT, kind)}:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(("#" if name.endswith(".py") else "//") + " moved\n" + (ROOT / name).read_text())
    moved = _mutants.draw(tmp_path)
    assert [m.identity for m in moved] == [m.identity for m in before]
    assert all(m.number == n.number + 1 for m, n in zip(moved, before, strict=True))

    for kind in _mutants.COUNTS:
        for name in _mutants.files(ROOT, kind):
            more = "more = more + 1\n" if name.endswith(".py") else "more = more + 1;\n"
            (tmp_path / name).write_text((tmp_path / name).read_text() + more)
    (tmp_path / "csrc" / "cuda" / "new.cu").write_text("int f(int x) { return x + 1; }\n")
    changed = {m.identity for m in _mutants.draw(tmp_path)} - {m.identity for m in before}
    assert len(changed) <= len(before) / 4


def test_mutants_meet_every_test_of_ops_and_layers():
    files = {path.name for folder in ("ops", "layers") for path in (ROOT / "tests" / folder).glob("test_*.py")}
    # The one calls what others call; the others compile the CUDA kernels of their own tree, not the mutant's library.
    emulated = {name for name in files if name.startswith("test_emulated_")}
    assert files - set(mutate.EVERY) == {"test_selftest.py", *emulated}
    assert emulated == {name for _, name in mutate.WITHOUT_GPU if name.startswith("test_emulated_")}


def test_places_are_code():
    """No comment, string, signature, import, assertion, template or pointer."""
    python = '''"""1 + 1"""
from a import b  # 2 + 2
def f(x: int = 3, *y, z=4 - 1) -> int:
    """5 * 5"""
    raise ValueError(f"{x} + 6")
    return x + 7
'''
    found = [(line, new) for line, _, _, new in _mutants.python_places(python)]
    assert found == [(6, "-"), (6, "8")]
    cpp = """// 1 + 1
#include <a>
template <int N = 2>
/* 3 + 3
   4 * 4 */
static_assert(N > 5);
const float* p = q;
std::vector<int> v;
x = "6 + 6";
y = a * b - 7.5f;
if (a < b && !c) return;
"""
    found = [(line, new) for line, _, _, new in _mutants.cpp_places(cpp)]
    assert found == [(10, "/"), (10, "+"), (10, "15.0f"), (11, "<="), (11, "||"), (11, "")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_verdicts(tmp_path, monkeypatch, capsys, jobs):
    """A mutant that a test notices, one that none does, and a test that always fails."""
    tree = tmp_path / "tree"
    for name, text in {
        "groupmamba_ext/ops/a.py": "def f(x):\n    return x + 1\n",
        "groupmamba_ext/libgroupmamba.so": "",
        "tests/test_a.py": "import sys; sys.path.insert(0, 'groupmamba_ext/ops')\nimport a, pytest\n\n"
        "@pytest.mark.parametrize('x', [1], ids=['x: 1'])\ndef test_f(x):\n    assert a.f(x) == 2\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    monkeypatch.setattr(mutate, "ROOT", tree)
    monkeypatch.setattr(_mutants, "COUNTS", {"python": 2})
    monkeypatch.setattr(mutate, "EVERY", ("test_a.py",))
    monkeypatch.setattr(mutate, "first_tests", lambda name: [])
    monkeypatch.setattr(mutate, "EQUIVALENT", {})
    report = tmp_path / "mutants.json"
    arguments = ["run", "--kinds", "python", "--report", str(report), "--jobs", str(jobs), "--pytest", "-k 'not none'"]
    assert mutate.main([*arguments, "--work", str(tmp_path / "work")]) == 0
    results = json.loads(report.read_text())
    assert {r["mutated"].strip() for r in results.values()} == {"return x - 1", "return x + 2"}
    assert {(r["verdict"], r["by"]) for r in results.values()} == {("killed", "tests/test_a.py::test_f[x: 1]")}
    copies = list((tmp_path / "work").rglob("ops/a.py"))
    assert len(copies) == jobs
    assert all(copy.read_text() == (tree / "groupmamba_ext/ops/a.py").read_text() for copy in copies)

    (tree / "tests/test_a.py").write_text("def test_nothing():\n    pass\n")
    report.unlink()
    assert mutate.main([*arguments, "--work", str(tmp_path / "work")]) == 1
    assert {r["verdict"] for r in json.loads(report.read_text()).values()} == {"survived"}
    assert "+    return x - 1" in capsys.readouterr().out

    (tree / "tests/test_a.py").write_text("def test_broken():\n    assert False\n")
    report.unlink()
    with pytest.raises(SystemExit, match="test_broken fails on the unchanged tree"):
        mutate.main([*arguments, "--work", str(tmp_path / "work")])


def test_libraries_of_cuda_mutants(tmp_path, monkeypatch, capsys):
    """One that is not built yet is left; one that does not compile has an empty file; one that does is put in place."""
    tree, libraries = tmp_path / "tree", tmp_path / "libraries"
    for name, text in {
        "csrc/cuda/a.cu": "int f(int x) { return x + 1; }\n",
        "groupmamba_ext/libgroupmamba.so": "whole",
        "tests/test_a.py": "import pytest\n\n@pytest.mark.cuda\ndef test_f():\n"
        "    assert open('groupmamba_ext/libgroupmamba.so').read() == 'whole'\n",
        "pytest.ini": "[pytest]\nmarkers = cuda\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    libraries.mkdir()
    monkeypatch.setattr(mutate, "ROOT", tree)
    monkeypatch.setattr(_mutants, "COUNTS", {"cuda": 1})
    monkeypatch.setattr(mutate, "EVERY", ("test_a.py",))
    monkeypatch.setattr(mutate, "first_tests", lambda name: [])
    report = tmp_path / "mutants.json"
    arguments = ["run", "--kinds", "cuda", "--libraries", str(libraries), "--report", str(report)]

    def verdicts():
        return [(r["verdict"], r["by"]) for r in json.loads(report.read_text()).values()]

    assert mutate.main([*arguments, "--work", str(tmp_path / "work")]) == 2
    assert verdicts() == [] and "not built: csrc/cuda/a.cu" in capsys.readouterr().out
    (mutant,) = _mutants.draw(tree, _mutants.SEED)
    packed = libraries / f"{mutate.library_name(mutant)}.so.xz"
    packed.touch()
    assert mutate.main([*arguments, "--work", str(tmp_path / "work")]) == 0
    assert verdicts() == [("compiler", "does not compile")]
    report.unlink()
    packed.write_bytes(lzma.compress(b"changed"))
    assert mutate.main([*arguments, "--work", str(tmp_path / "work")]) == 0
    assert verdicts() == [("killed", "tests/test_a.py::test_f")]
    with pytest.raises(SystemExit):
        mutate.main(["run", "--kinds", "cpu", "--libraries", str(libraries)])


def test_an_endless_loop_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "SECONDS", 1)
    monkeypatch.setattr(mutate, "EVERY", ("test_loop.py",))
    monkeypatch.setattr(mutate, "first_tests", lambda name: [])
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_loop.py").write_text("def test_loop():\n    while True:\n        pass\n")
    mutant = _mutants.Mutant("python", "a.py", 1, "", "", "")
    assert mutate.run_tests(tmp_path, mutant, []) == "endless"


def test_help():
    for name in ("sanitize", "mutate"):
        done = subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py", "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout
