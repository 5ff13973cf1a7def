# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the depthwise convolution without a GPU: their threads as fibers of the CPU, against torch's own
convolution in float64, and under ThreadSanitizer. See tests/support/emulation/README.md."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from support import emulated_conv, emulation
from support.emulated_conv import ACTIVATIONS, compare, truth

pytestmark = [emulation.needs_compiler, pytest.mark.usefixtures("one_thread")]

# Batch, height, width, groups and channels. A block of the sm_90 kernels has 8, 4 or (backward) 2 times 8 channels, and
# 1, 2 or 4 tiles of 16 columns forward, 14 backward: one tile or several, in one block or several, whole and ragged.
SIZES = [
    (1, 1, 1, 1, 64), (3, 2, 7, 1, 64), (1, 14, 14, 1, 64), (2, 5, 16, 1, 64), (1, 17, 29, 1, 128),
    (2, 5, 28, 1, 32), (1, 17, 32, 1, 32), (1, 2, 61, 1, 32),
    (1, 14, 56, 1, 16), (1, 5, 64, 1, 16), (2, 1, 70, 1, 16), (1, 2, 130, 1, 16),
    (2, 5, 14, 1, 72), (1, 14, 15, 1, 88), (2, 2, 13, 1, 24), (1, 5, 33, 1, 24), (1, 5, 50, 1, 24), (1, 3, 17, 1, 120),
    (1, 3, 9, 1, 8), (2, 5, 14, 2, 64), (1, 4, 20, 3, 40), (2, 7, 14, 4, 16),
]  # fmt: skip
PORTABLE = [*SIZES[1::4], (1, 5, 7, 2, 87), (2, 3, 6, 1, 3), (1, 31, 4, 1, 1), (1, 2, 300, 1, 10)]
HEIGHTS = [1, 2, 3, 4, 5, 6, 7, 8, 17]
MASKS = ["101", "001", "110", "000", "01011"]
if emulation.SANITIZED in os.environ:  # every access is looked at, twenty times as slow
    SIZES, PORTABLE, HEIGHTS, MASKS = SIZES[1::5], PORTABLE[0::3], HEIGHTS[1::3], MASKS[-1:]

HALVES = [torch.bfloat16, torch.float16]
AROUND = 7.0  # what is around results


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return emulation.library(tmp_path_factory, "conv")


class Image:
    """A (batch, H, W, G, D) view, NaN at first, of a tensor with more tokens and channels, which are `around`."""

    def __init__(self, shape, dtype, around=torch.nan, *, pad=8, group_major=False):
        batch, h, w, groups, dim = shape
        token_major = batch, h * w + 2, groups, dim + pad
        stored = (groups, batch, h * w + 2, dim + pad) if group_major else token_major
        self.around, self.whole = around, torch.full(stored, around, dtype=dtype)
        ordered = self.whole.permute(1, 2, 0, 3) if group_major else self.whole
        self.view = ordered[:, 1:-1, :, :dim].unflatten(1, (h, w))
        self.view.fill_(torch.nan)

    def result(self) -> torch.Tensor:
        copy = self.view.clone()
        self.view.fill_(self.around)
        assert (self.whole == self.around).all(), "written outside the image"
        return copy


def check(
    library, kernel, dtype, size, activation="gelu", *, param=None, bias=True, mask=None, images=0, **layout
) -> dict[str, torch.Tensor]:
    """Forward and backward, the latter with the forward's result and the sum of dx where it gives them."""
    groups, dim = size[3:]
    kept = torch.ones(size[0]) if mask is None else torch.tensor([float(c) for c in mask])
    x, dy = Image(size, dtype, **layout).view, Image(size, dtype, **layout).view
    for t in (x, dy):
        t.copy_(torch.randn(size) * kept.view(-1, 1, 1, 1, 1))
    # float32 too has weights that 16 bits hold: the kernels by tensor cores round them.
    weight = (torch.randn(groups, dim, 3, 3) / 3).to(dtype).to(param or dtype)
    bias = torch.randn(groups, dim).to(param or dtype) if bias else None
    want = truth(x, dy, weight, bias, activation, kept)
    for t in (x, dy):
        t[kept == 0] = torch.nan  # nothing is read of images whose branch is dropped
    y, y_again, dx = (Image(size, dtype, AROUND, **layout) for _ in range(3))
    options = {"mask": None if mask is None else kept, "images": images}
    arguments = x, weight, bias, activation
    emulated_conv.forward(library, kernel, y.view, *arguments, **options)
    again = None if activation is None else y_again.view
    got = emulated_conv.backward(library, kernel, dx.view, dy, *arguments, y=again, sum_dx=True, **options)
    got |= {"y": y.result(), "dx": dx.result()}
    for name, (value, error) in want.items():
        compare(got[name], value, error, dtype, name)
    if activation is not None:
        got["y_again"] = y_again.result()
        compare(got["y_again"], *want["y"], dtype, "y of the backward")
    for name in ("y", "y_again", "dx"):
        assert name not in got or (got[name][kept == 0] == 0).all()
    return got


def test_plans_have_every_number_of_octets(library):
    for backward, possible in ((False, {4, 8}), (True, {2, 4, 8})):
        plans = [emulated_conv.plan(library, size, backward=backward) for size in SIZES]
        assert {octets for octets, _ in plans} == possible and max(blocks for _, blocks in plans) > 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_sm90(library, dtype, size):
    check(library, "sm90", dtype, size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("height", HEIGHTS)
def test_heights(library, height, activation):
    """Rows come some at a time, and two images of three are one block's."""
    check(library, "sm90", torch.bfloat16, (3, height, 9, 1, 64), activation, images=2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(library, dtype, activation):
    for dim, width in ((64, 15), (32, 30), (16, 59)):
        check(library, "sm90", dtype, (2, 6, width, 1, dim), activation)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_y_of_the_backward_is_the_forwards(library, activation):
    got = check(library, "sm90", torch.bfloat16, (2, 7, 15, 1, 64), activation)
    if activation == "silu":
        assert torch.equal(got["y_again"], got["y"])
    else:  # as max(x, 0) - |x| P(X < -|x|), and as x P(X < x)
        assert (got["y_again"] == got["y"]).double().mean() > 0.99


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("param", [torch.float32, None])
@pytest.mark.parametrize("kernel, dtype", [("sm90", torch.bfloat16), ("sm90", torch.float16), ("portable", torch.half)])
def test_parameters(library, kernel, dtype, param, bias):
    check(library, kernel, dtype, (1, 5, 15, 1, 72), param=param, bias=bias)


@pytest.mark.parametrize("kernel", emulated_conv.KERNELS)
@pytest.mark.parametrize("pad", [0, 8])
@pytest.mark.parametrize("group_major", [False, True])
def test_groups(library, kernel, pad, group_major):
    check(library, kernel, torch.bfloat16, (2, 4, 15, 3, 24), pad=pad, group_major=group_major)


@pytest.mark.parametrize("kernel, images", [("portable", 0), ("sm90", 1), ("sm90", 2), ("sm90", 3)])
@pytest.mark.parametrize("mask", MASKS)
def test_drop_path(library, kernel, images, mask):
    for activation, dim in (("gelu", 64), ("silu", 40)):
        check(library, kernel, torch.bfloat16, (len(mask), 5, 15, 1, dim), activation, mask=mask, images=images)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", PORTABLE)
def test_portable(library, dtype, size):
    for activation in ACTIVATIONS:
        check(library, "portable", dtype, size, activation, pad=8 if size[-1] % 8 == 0 else 3)


def test_no_thread_reads_what_another_one_writes(tmp_path):
    chosen = "(test_sm90 and dtype0) or test_heights or test_drop_path or (test_portable and dtype1)"
    done = emulation.sanitized(tmp_path, "conv", __file__, chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "data race" not in done.stderr


def test_faults_are_found(tmp_path):
    """A missing barrier, and stores of rows that the image does not have."""
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    for name, whole, changed in (
        ("fwd_sm90.cu", "            __syncthreads();\n            if (at.warp", "            if (at.warp"),
        ("tensor_cores.cuh", "if (row + i >= 0 && row + i < height)", ""),
    ):
        source = csrc / "cuda" / "depthwise_conv" / name
        assert source.read_text().count(whole) == 1
        source.write_text(source.read_text().replace(whole, changed))
    done = emulation.sanitized(tmp_path, "conv", __file__, "test_y_of_the_backward", csrc=csrc)
    assert done.returncode != 0 and "a TMA store wholly outside its tensor" in done.stdout, done.stdout
    assert "data race" in done.stderr and "stmatrix" in done.stderr
