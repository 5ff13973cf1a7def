# SPDX-License-Identifier: Apache-2.0
"""What csrc/host/cublas_lt_api.h says of cuBLASLt, against its header."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from groupmamba_ext import _load

ROOT = Path(__file__).resolve().parents[2]

CHECKS = r"""
#include <cublasLt.h>
#include <cstddef>
#include "host/cublas_lt_api.h"

using namespace gm::cublas_lt;
template <class... Args>
constexpr size_t count(cublasStatus_t (*)(Args...)) { return sizeof...(Args); }
template <class... Args>
constexpr size_t count(int (*)(Args...)) { return sizeof...(Args); }
template <class... Args>
constexpr size_t bytes(cublasStatus_t (*)(Args...)) { return (sizeof(Args) + ...); }
template <class... Args>
constexpr size_t bytes(int (*)(Args...)) { return (sizeof(Args) + ...); }
#define SAME(ours, theirs) \
    static_assert(count(decltype(Library::ours){}) == count(decltype(&theirs){}), #theirs); \
    static_assert(bytes(decltype(Library::ours){}) == bytes(decltype(&theirs){}), #theirs)
SAME(desc_create, cublasLtMatmulDescCreate);
SAME(desc_destroy, cublasLtMatmulDescDestroy);
SAME(desc_set, cublasLtMatmulDescSetAttribute);
SAME(layout_create, cublasLtMatrixLayoutCreate);
SAME(layout_destroy, cublasLtMatrixLayoutDestroy);
SAME(layout_set, cublasLtMatrixLayoutSetAttribute);
SAME(preference_create, cublasLtMatmulPreferenceCreate);
SAME(preference_destroy, cublasLtMatmulPreferenceDestroy);
SAME(preference_set, cublasLtMatmulPreferenceSetAttribute);
SAME(heuristic, cublasLtMatmulAlgoGetHeuristic);
SAME(matmul, cublasLtMatmul);
static_assert(sizeof(cublasStatus_t) == sizeof(int) && CUBLAS_STATUS_SUCCESS == 0);
static_assert(sizeof(Algo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(HeuristicResult, workspace_size) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
#define EQUAL(ours, theirs) static_assert(static_cast<long>(ours) == static_cast<long>(theirs), #theirs)
EQUAL(kCompute32F, CUBLAS_COMPUTE_32F);
EQUAL(kInvalidValue, CUBLAS_STATUS_INVALID_VALUE);
EQUAL(kNotSupported, CUBLAS_STATUS_NOT_SUPPORTED);
EQUAL(kOpN, CUBLAS_OP_N);
EQUAL(kOpT, CUBLAS_OP_T);
EQUAL(kTransA, CUBLASLT_MATMUL_DESC_TRANSA);
EQUAL(kTransB, CUBLASLT_MATMUL_DESC_TRANSB);
EQUAL(kEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
EQUAL(kBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
EQUAL(kEpilogueBias, CUBLASLT_EPILOGUE_BIAS);
EQUAL(kBatchCount, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
EQUAL(kBatchOffset, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
EQUAL(kMaxWorkspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
EQUAL(kReductionSchemes, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
EQUAL(kAlignA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
EQUAL(kAlignB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
EQUAL(kAlignC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
EQUAL(kAlignD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
"""


def include_folders() -> list[Path]:
    """That of a CUDA toolkit, or of the CUDA packages that torch brings, with cublasLt.h."""
    packages = sorted(Path(sysconfig.get_paths()["purelib"], "nvidia").glob("*/include"))
    toolkits = sorted(Path("/usr/local").glob("cuda*/include"))
    with_header = [folder for folder in (*packages, *toolkits) if (folder / "cublasLt.h").is_file()]
    if not with_header:  # CPU builds of torch bring none; CI has it from the packages of the CUDA build
        pytest.skip("no cublasLt.h here")
    return [with_header[0], *packages, *toolkits]


# An installed wheel is tested on machines without a compiler too; CI has one.
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_declarations_are_the_headers(tmp_path):
    source = tmp_path / "checks.cpp"
    options = [f"-I{ROOT / 'csrc'}", *(f"-I{folder}" for folder in include_folders())]

    def compiles(text):
        source.write_text(text)
        command = ["g++", "-std=c++17", "-fsyntax-only", *options, str(source)]
        return subprocess.run(command, capture_output=True, text=True)

    done = compiles(CHECKS)
    assert done.returncode == 0, done.stderr
    wrong = compiles(CHECKS + "EQUAL(kTransA, CUBLASLT_MATMUL_DESC_TRANSB);")
    assert wrong.returncode != 0 and "CUBLASLT_MATMUL_DESC_TRANSB" in wrong.stderr


@pytest.mark.parametrize("benchmark, deterministic, everywhere, times", [
    (False, False, False, 0), (True, False, False, 1), (True, True, False, 0), (True, False, True, 0),
])  # fmt: skip
def test_when_algorithms_are_timed(monkeypatch, benchmark, deterministic, everywhere, times):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: everywhere)
    assert _load._wants_choice_by_time() == times
