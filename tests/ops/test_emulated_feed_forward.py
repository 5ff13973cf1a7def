# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the feed-forward network's backward without a GPU: its threads as fibers of the CPU, against
float64, and under ThreadSanitizer. See tests/support/emulation/README.md."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from support import emulated_feed_forward, emulation
from support.emulated_conv import compare, truth

pytestmark = [emulation.needs_compiler, pytest.mark.usefixtures("one_thread")]

# Batch, height, width, channels and hidden channels: one tile of 14 columns or several, whole and ragged; hidden
# channels of a block that do not exist; channels that fill a product and that do not.
SIZES = [
    (2, 5, 14, 64, 64), (1, 1, 1, 8, 64), (1, 9, 31, 40, 72), (3, 2, 3, 64, 128), (1, 6, 56, 16, 64),
    (1, 13, 29, 24, 56),
]  # fmt: skip
HEIGHTS = range(1, 10)
if emulation.SANITIZED in os.environ:  # every access is looked at, twenty times as slow
    SIZES, HEIGHTS = SIZES[2:3], [3]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return emulation.library(tmp_path_factory, "feed_forward")


def eighths(*shape, most):
    """Multiples of 1/8 up to `most`: sums of their products are exact, so that the hidden image has one right value."""
    return torch.randint(-8 * most, 8 * most + 1, shape) / 8


def check(library, size, dtype, *, mask=None, images=0, param=torch.float32):
    torch.manual_seed(0)
    batch, height, width, channels, hidden = size
    scale = 1.0 if mask is None else 1.5
    kept = torch.ones(batch) if mask is None else torch.tensor([float(c) for c in mask])
    xn, dout = (eighths(batch, height, width, channels, most=1) for _ in range(2))
    fc1, fc2 = eighths(hidden, channels, most=1), eighths(channels, hidden, most=1)
    fc1_bias, conv_bias = eighths(hidden, most=1), torch.randn(hidden).to(param)
    conv = (torch.randn(hidden, 3, 3) / 3).to(dtype).to(param)  # float32 too has weights that 16 bits hold

    def image(t):
        return t.to(dtype).unsqueeze(3)

    want = truth(image(xn @ fc1.T + fc1_bias), image(scale * (dout @ fc2)), conv[None], conv_bias[None], "gelu", kept)
    for t in (xn, dout):
        t[kept == 0] = torch.nan  # nothing is read of images whose branch is dropped
    results = torch.full((2, batch * height * width * hidden + 128), torch.nan, dtype=dtype)
    dhidden, activated = (t[64:-64].view(batch, height, width, hidden) for t in results)
    got = emulated_feed_forward.backward(
        library, dhidden, activated, *(t.to(dtype) for t in (xn, dout, fc1, fc1_bias)), conv, conv_bias, fc2.to(dtype),
        mask=None if mask is None else kept, scale=scale, images=images,
    )  # fmt: skip
    assert results[:, :64].isnan().all() and results[:, -64:].isnan().all(), "written outside the image"
    got |= {"dx": dhidden.unsqueeze(3), "y": activated.unsqueeze(3)}
    for name, (value, error) in want.items():
        compare(got[name], value, error, dtype, name)
    assert (dhidden[kept == 0] == 0).all() and (activated[kept == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(library, size, dtype):
    check(library, size, dtype, param=torch.float32 if dtype == torch.bfloat16 else dtype)


@pytest.mark.parametrize("height", HEIGHTS)
def test_heights(library, height):
    """Rows come four at a time, and two images of three are one block's."""
    check(library, (3, height, 9, 16, 64), torch.bfloat16, images=2)


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("mask", ["101", "001", "110", "000", "01011"])
def test_drop_path(library, mask, images):
    check(library, (len(mask), 5, 15, 24, 64), torch.bfloat16, mask=mask, images=images)


def test_no_thread_reads_what_another_one_writes(tmp_path):
    done = emulation.sanitized(tmp_path, "feed_forward", __file__, "test_sizes or test_heights")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "data race" not in done.stderr


def test_a_race_is_found(tmp_path):
    """Rows of products that are written while others still read the ones before."""
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    source = csrc / "cuda" / "feed_forward" / "bwd_sm90a.cu"
    whole = "            products(s.height - first);\n            __syncthreads();\n"
    assert source.read_text().count(whole) == 1
    source.write_text(source.read_text().replace(whole, whole.replace("            __syncthreads();\n", "")))
    done = emulation.sanitized(tmp_path, "feed_forward", __file__, "test_heights", csrc=csrc)
    assert done.returncode != 0 and "data race" in done.stderr, done.stdout + done.stderr
