# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the feed-forward network without a GPU: their threads as fibers of the CPU, against float64, and
under ThreadSanitizer. See tests/support/emulation/README.md."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
# Forward: one, two and three blocks of 64 channels, tiles of 14 and of 7 rows.
FORWARD = [(2, 5, 14, 64, 64), (1, 15, 9, 24, 72), (1, 8, 15, 128, 64), (1, 1, 1, 72, 136), (1, 9, 3, 192, 64)]
if emulation.SANITIZED in os.environ:  # every access is looked at, twenty times as slow
    SIZES, HEIGHTS, FORWARD = SIZES[2:3], [3], FORWARD[:1]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", FORWARD)
def test_forward(library, size, dtype):
    check_forward(library, size, dtype, residual=True)


@pytest.mark.parametrize("mask", ["101", "000", None])
@pytest.mark.parametrize("residual", [True, False])
def test_forward_with_drop_path(library, residual, mask):
    if residual or mask is None:  # a branch is dropped from a residual stream alone
        check_forward(library, (3, 4, 15, 40, 64), torch.bfloat16, residual=residual, mask=mask)


def check_forward(library, size, dtype, *, residual, mask=None):
    """Rounded where the kernel rounds: normed, hidden and activated image. One of these may be rounded to the other
    side, which moves a result by what one term of its sum is rounded by."""
    torch.manual_seed(0)
    batch, height, width, channels, hidden = size
    scale = 1.0 if mask is None else 1.5
    kept = torch.ones(batch) if mask is None else torch.tensor([float(c) for c in mask])

    def parameters(*shape, size):
        return (torch.randn(shape) * size).to(dtype), (0.3 * torch.randn(shape[0])).to(dtype)

    x = torch.randn(batch, height, width, channels).to(dtype)
    norm = (1 + 0.3 * torch.randn(channels)).to(dtype), (0.3 * torch.randn(channels)).to(dtype)
    fc1, fc2 = parameters(hidden, channels, size=channels**-0.5), parameters(channels, hidden, size=hidden**-0.5)
    conv = parameters(hidden, 3, 3, size=1 / 3)
    whole = torch.full((x.numel() + 128,), torch.nan, dtype=dtype)
    out = whole[64:-64].view(x.shape)
    emulated_feed_forward.forward(
        library, out, x, norm, fc1, conv, fc2, residual=residual, mask=None if mask is None else kept, scale=scale
    )
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written outside the image"

    def rounded(t):
        return t.to(dtype).double()

    wide = [[t.double() for t in pair] for pair in (norm, fc1, conv, fc2)]
    (gain, shift), (w1, b1), (taps, b2), (w3, b3) = wide
    normed = rounded(F.layer_norm(x.double(), (channels,), gain, shift, 1e-6))
    image = rounded(normed @ w1.T + b1).permute(0, 3, 1, 2)
    activated = rounded(F.gelu(F.conv2d(image, taps[:, None], b2, padding=1, groups=hidden))).permute(0, 2, 3, 1)
    branch = (activated @ w3.T + b3) * scale * kept.double().view(-1, 1, 1, 1)
    expected = branch + x.double() if residual else branch
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=1.1 * rounding, atol=1.5 * rounding)
    if residual:
        assert torch.equal(out[kept == 0], x[kept == 0])


def test_no_thread_reads_what_another_one_writes(tmp_path):
    done = emulation.sanitized(tmp_path, "feed_forward", __file__, "test_sizes or test_heights or test_forward")
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
