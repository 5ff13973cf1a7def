# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the scan without a GPU: their threads as fibers of the CPU, against the float64 reference, and
under ThreadSanitizer, which finds a missing barrier. See tests/support/emulation/README.md."""

import functools
import os
import shutil
from pathlib import Path

import pytest
import torch

import groupmamba_ext as ext
from support import emulation
from support.common import check
from support.inputs import cross_inputs
from support.scan import MIXED, inputs

pytestmark = emulation.needs_compiler

PORTABLE = [  # dim, states, rank, h, w: lanes from 1 to 32, one tile and several, aligned and not
    (1, 1, 1, 3, 5), (3, 1, 1, 5, 7), (16, 1, None, 9, 11), (16, 1, 1, 29, 31), (64, 1, 2, 11, 13), (20, 3, 2, 11, 13),
    (32, 2, 2, 21, 22), (87, 2, 6, 7, 9), (128, 1, 8, 7, 17),
]  # fmt: skip
SM90 = [  # whole columns, ragged ones and runs of them; whole widths, narrow ones and others; one tile and several
    (16, 1, 1, 5, 7), (16, 1, 1, 28, 28), (16, 1, 1, 60, 10), (24, 1, 2, 9, 11), (32, 1, 2, 14, 16), (64, 1, 4, 28, 9),
    (72, 1, 6, 14, 14), (88, 1, 6, 9, 17), (128, 1, 14, 3, 40), (16, 1, 1, 29, 31),
]  # fmt: skip

CROSS = [  # without and with products for the steps, of one to four tiles of features; channels that no lane has
    (16, 1, 9, 11), (32, 2, 14, 16), (64, 4, 28, 9), (88, 6, 9, 17), (72, 7, 14, 14), (112, 28, 7, 7),
    (120, 22, 14, 14), (128, 30, 3, 40), (128, 8, 29, 5), (104, 9, 1, 1), (136, 9, 7, 8), (160, 4, 9, 11),
    (72, 15, 9, 11), (200, 17, 5, 9),
]  # fmt: skip

MANY_STATES = [  # 2, 4 or 8 states of a thread, 2 to 16 threads of a channel; one tile and several
    (16, 16, 1, 9, 11), (8, 8, 2, 9, 11), (20, 14, 2, 9, 13), (1, 5, 1, 3, 3), (2, 64, 1, 4, 9), (6, 48, None, 6, 9),
    (87, 16, 6, 6, 9), (112, 16, 7, 6, 5), (8, 64, 1, 5, 7), (64, 24, 4, 5, 7), (128, 12, 8, 5, 6),
]  # fmt: skip

if emulation.SANITIZED in os.environ:  # every access is looked at, twenty times as slow
    PORTABLE, SM90, MANY_STATES, CROSS = PORTABLE[2::3], SM90[0::3], MANY_STATES[0::3], CROSS[2::3]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return emulation.library(tmp_path_factory, "scan")


CODES = ("lr", "rl", "tb", "bt")


def compare_cross(library, tensors, directions=CODES):
    function = functools.partial(emulation.cross_scan, library)
    return check(function, ext.reference.cross_selective_scan, tensors, {"directions": directions})


def compare(library, kernel, tensors, **options):
    options = {"directions": MIXED[: tensors["u"].shape[3]], "norm_eps": 0.1, **options}
    return check(
        functools.partial(emulation.scan, library, kernel), ext.reference.grouped_selective_scan, tensors, options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim, n, rank, h, w", PORTABLE)
def test_portable(library, dtype, dim, n, rank, h, w):
    compare(library, "portable", inputs("cpu", dtype, batch=1, dim=dim, n=n, rank=rank, h=h, w=w))


@pytest.mark.parametrize("drop", [("z",), ("norm_weight", "norm_bias"), ("D", "dt_bias", "gate"), ("norm_bias",)])
def test_portable_without_options(library, drop):
    compare(library, "portable", inputs("cpu", dim=20, n=2, h=5, w=7, groups=2, drop=drop))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim, n, rank, h, w", SM90)
def test_sm90(library, dtype, dim, n, rank, h, w):
    compare(library, "sm90", inputs("cpu", dtype, batch=1, dim=dim, n=n, rank=rank, h=h, w=w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim, n, rank, h, w", MANY_STATES)
def test_many_states(library, dtype, dim, n, rank, h, w):
    batch = 3 if dim <= 8 else 1  # enough planes for the one multiprocessor
    compare(library, "many_states", inputs("cpu", dtype, batch=batch, dim=dim, n=n, rank=rank, h=h, w=w))


def test_portable_with_the_saved_states_of_many(library):
    compare(library, "portable", inputs("cpu", torch.bfloat16, batch=1, dim=64, n=6, h=11, w=13))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim, rank, h, w", CROSS)
def test_cross_sm90(library, dtype, dim, rank, h, w):
    compare_cross(library, cross_inputs("cpu", dtype, batch=2, dim=dim, rank=rank, h=h, w=w))


def test_cross_sm90_of_many_directions_and_slices(library):
    directions = ("tb", "lr", "bt", "rl", "rl", "lr", "tb")
    tensors = cross_inputs("cpu", torch.bfloat16, batch=1, dim=136, rank=16, h=7, w=5, count=len(directions))
    compare_cross(library, tensors, directions)


def test_cross_sm90_of_pixels_that_overlap(library):
    """As far apart as a slice is wide: its rows are no run of tokens."""
    tensors = cross_inputs("cpu", torch.bfloat16, batch=1, dim=136, rank=9, h=7, w=8)
    windows = torch.randn(7 * 8 * 72 + 64, dtype=torch.float64).to(torch.bfloat16)
    tensors["u"] = windows.as_strided((1, 7, 8, 136), (7 * 8 * 72, 8 * 72, 72, 1))
    parts = emulation.cross_scan(library, **tensors, directions=CODES)
    assert torch.equal(parts, emulation.cross_scan(library, **tensors | {"u": tensors["u"].clone()}, directions=CODES))


def test_sm90_goes_through_several_images(library):
    compare(library, "sm90", inputs("cpu", torch.bfloat16, batch=3, dim=64, groups=2, h=7, w=9))


def test_no_thread_reads_what_another_one_writes(tmp_path):
    chosen = "((test_portable or test_many_states) and dtype1) or ((test_sm90 or test_cross) and dtype0) or images"
    done = emulation.sanitized(tmp_path, "scan", __file__, chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "data race" not in done.stderr


def test_a_missing_barrier_is_found(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    tile = csrc / "cuda" / "scan" / "tile.cuh"
    whole = tile.read_text()
    assert whole.count("    __syncthreads();\n    for (int i = 0; i < coord.num_warps(); ++i)") == 1
    tile.write_text(
        whole.replace(
            "    __syncthreads();\n    for (int i = 0; i < coord.num_warps()",
            "    for (int i = 0; i < coord.num_warps()",
        )
    )
    done = emulation.sanitized(tmp_path, "scan", __file__, "test_portable and 128 and dtype1", csrc=csrc)
    assert done.returncode != 0 and "data race" in done.stderr and "block_scan" in done.stderr
