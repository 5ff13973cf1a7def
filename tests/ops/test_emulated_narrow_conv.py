# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the convolutions between few channels without a GPU: their threads as fibers of the CPU, against
torch's own convolution in float64, and under ThreadSanitizer. See tests/support/emulation/README.md."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import emulated_narrow_conv as emulated
from support import emulation

pytestmark = [emulation.needs_compiler, pytest.mark.usefixtures("one_thread")]

SHAPES = [(32, 3, 1), (16, 4, 0)]  # channels, taps, padding
# Batch, height and width: one pixel, one tile of columns or two of either width, whole and ragged.
SIZES = [(1, 4, 4), (2, 5, 7), (1, 6, 70), (3, 4, 13), (1, 4, 115), (1, 5, 131)]
STRIPS = [1, 2, 3, 12]  # of 12 rows, twice as many as a ring has places for
BLOCKS = range(1, 17)  # of the weight's gradient: they begin and end anywhere, also where steps only load
if emulation.SANITIZED in os.environ:  # every access is looked at, twenty times as slow
    SIZES, STRIPS, BLOCKS = SIZES[1:2], STRIPS[:1], [4]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return emulation.library(tmp_path_factory, "narrow_conv")


def case(shape, size, dtype):
    torch.manual_seed(0)
    channels, taps, pad = shape
    batch, height, width = size
    x = torch.randn(batch, height, width, channels).to(dtype)
    weight = torch.randn(32, channels, taps, taps) * (channels * taps * taps) ** -0.5
    more = 2 * pad - taps + 1
    return x, weight, pad, torch.randn(batch, height + more, width + more, 32).to(dtype)


def results(x, weight, pad, dy, bias=None):
    """In float64, of the weight as the kernels round it: y, dx and dweight, channels last."""
    wide = x.double().permute(0, 3, 1, 2).requires_grad_()
    w = weight.to(x.dtype).double().requires_grad_()
    y = F.conv2d(wide, w, None if bias is None else bias.double(), padding=pad)
    dx, dweight = torch.autograd.grad(y, (wide, w), dy.double().permute(0, 3, 1, 2))
    return y.detach().permute(0, 2, 3, 1), dx.permute(0, 2, 3, 1), dweight


def close(got, expected, dtype):
    """Rounded once; the sums, in float32, are off by some of its roundings of their size."""
    torch.testing.assert_close(
        got.double(), expected, rtol=1.01 * ROUNDING[dtype], atol=1e-5 * expected.abs().max().item()
    )


def nan_like(t):
    """Longer at either end than t, to see what is written there."""
    whole = torch.full((t.numel() + 128,), torch.nan, dtype=t.dtype)
    return whole, whole[64:-64].view(t.shape)


def check(library, shape, size, dtype, *, strips=0, blocks=0):
    x, weight, pad, dy = case(shape, size, dtype)
    y, dx, dweight = results(x, weight, pad, dy)
    whole, got = nan_like(y.to(dtype))
    emulated.forward(library, got, x, weight, pad, strips=strips)
    close(got, y, dtype)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written outside the image"
    if shape[0] == 32:
        got = torch.full_like(x, torch.nan)
        emulated.backward(library, got, dy, weight, pad, strips=strips)
        close(got, dx, dtype)
    sums = emulated.weight_gradient(library, x, dy, weight, pad, blocks=blocks)
    torch.testing.assert_close(sums, dweight, rtol=1e-5, atol=1e-5 * dweight.abs().max().item())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(library, shape, size, dtype):
    check(library, shape, size, dtype)


@pytest.mark.parametrize("strips", STRIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_strips_of_rows(library, shape, strips):
    channels, taps, pad = shape
    check(library, shape, (1, 12 - 2 * pad + taps - 1, 40), torch.bfloat16, strips=strips)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_that_begin_anywhere(library, shape, blocks):
    x, weight, pad, dy = case(shape, (3, 8, 10), torch.bfloat16)
    _, _, dweight = results(x, weight, pad, dy)
    sums = emulated.weight_gradient(library, x, dy, weight, pad, blocks=blocks)
    torch.testing.assert_close(sums, dweight, rtol=1e-5, atol=1e-5 * dweight.abs().max().item())


@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_and_relu(library, shape, param):
    x, weight, pad, dy = case(shape, (2, 6, 9), torch.bfloat16)
    weight, bias = weight.to(param), torch.randn(32).to(param)
    y, *_ = results(x, weight, pad, dy, bias)
    got = torch.full_like(dy, torch.nan)
    emulated.forward(library, got, x, weight, pad, bias=bias, relu=True)
    close(got, y.relu(), torch.bfloat16)
    x[0, 2, 3] = torch.nan
    emulated.forward(library, got, x, weight, pad, bias=bias, relu=True)
    assert got[0].isnan().any() and not got[1].isnan().any()


def test_no_thread_reads_what_another_one_writes(tmp_path):
    done = emulation.sanitized(tmp_path, "narrow_conv", __file__, "test_sizes or test_strips or test_blocks")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "data race" not in done.stderr


@pytest.mark.parametrize(
    "source, whole, changed",
    [
        # pixels that come before those in their place are done with
        ("weight_sm90a.cu", "if (turn >= kStages) mbarrier_wait(empty", "if (false) mbarrier_wait(empty"),
        # a place given back twice, where a block ends with steps that only load: found by synccheck on an H200
        ("weight_sm90a.cu", "if (turn > first_product) release(turn - 1);  //", "release(turn - 1);  //"),
    ],
)  # fmt: skip
def test_faults_are_found(tmp_path, source, whole, changed):
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    path = csrc / "cuda" / "narrow_conv" / source
    assert path.read_text().count(whole) == 1
    path.write_text(path.read_text().replace(whole, changed))
    faulty = emulation.build(tmp_path, "narrow_conv", csrc=csrc)
    with pytest.raises(AssertionError):
        for blocks in range(1, 17):
            check(faulty, SHAPES[1], (6, 24, 10), torch.bfloat16, strips=1, blocks=blocks)


def test_a_race_is_found(tmp_path):
    """A place in the ring given back before the products have read it."""
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    source = csrc / "cuda" / "narrow_conv" / "conv_sm90a.cu"
    wait = "        wgmma_wait<0>(sums);\n"
    give = "        if (lane == 0) mbarrier_arrive(empty + l % kStages * 8);\n"
    assert source.read_text().count(wait + give) == 1
    source.write_text(source.read_text().replace(wait + give, give + wait))
    done = emulation.sanitized(tmp_path, "narrow_conv", __file__, "test_strips", csrc=csrc)
    assert done.returncode != 0 and "data race" in done.stderr, done.stdout + done.stderr
