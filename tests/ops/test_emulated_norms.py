# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the LayerNorms without a GPU: their threads as fibers of the CPU, against float64, and under
ThreadSanitizer. See tests/support/emulation/README.md."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import emulated_norm, emulation
from support.emulated_norm import call, case_of, norm_image, partials_of, pointer, sums_of

pytestmark = [emulation.needs_compiler, pytest.mark.usefixtures("one_thread")]

# Batch, tokens, groups, channels of a group, stored ones: 1 to 32 lanes a token, three, four and eight vectors a
# thread, rows beyond the registers, groups in the middle of a word, with and without padding, strips that end early.
SIZES = [
    (2, 15, 1, 64, 64), (1, 70, 4, 16, 16), (1, 33, 2, 48, 48), (2, 9, 4, 24, 24), (1, 130, 1, 8, 8), (1, 5, 1, 5, 8),
    (1, 13, 4, 87, 88), (1, 6, 4, 87, 87), (2, 5, 1, 348, 352), (1, 7, 1, 448, 448), (1, 1, 4, 1, 1),
    (1, 3, 1, 600, 600), (1, 18, 2, 550, 552), (1, 4, 3, 1, 4), (3, 5, 2, 33, 36),
]  # fmt: skip
if emulation.SANITIZED in os.environ:  # every access is looked at, twenty times as slow
    SIZES = [*SIZES[1::4], (2, 5, 1, 348, 352)]  # the last: rows of a whole warp, whose number of lanes is known
TYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
EPS = 1e-5
AROUND = 7.0  # what is around results


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return emulation.library(tmp_path_factory, "norm")


class Image:
    """A (batch, tokens, groups, width) view of a tensor with more tokens, NaN at first in a result, `around` else."""

    def __init__(self, shape, dtype, around=torch.nan, *, group_major=False):
        batch, tokens, groups, width = shape
        stored = (groups, batch, tokens + 2, width) if group_major else (batch, tokens + 2, groups, width)
        self.around, self.whole = around, torch.full(stored, around, dtype=dtype)
        self.view = (self.whole.permute(1, 2, 0, 3) if group_major else self.whole)[:, 1:-1]
        self.view.fill_(torch.nan)

    def result(self, dim) -> torch.Tensor:
        """(batch, tokens, groups * dim); the padding must be zeros, and what is around as it was."""
        copy = self.view.clone()
        assert (copy[..., dim:] == 0).all(), "padding"
        self.view.fill_(self.around)
        assert (self.whole == self.around).all(), "written outside the image"
        return copy[..., :dim].flatten(2)


def source(shape, dim, dtype, *, group_major=False) -> Image:
    """An input: random channels, zeros in the padding of a group, NaN around."""
    image = Image(shape, dtype, group_major=group_major)
    values = torch.randn(shape).to(dtype)
    values[..., dim:] = 0
    image.view.copy_(values)
    return image


def channels(image: Image, dim) -> torch.Tensor:
    return image.view[..., :dim].flatten(2).double()


def close(actual, expected, dtype, slack=4.0):
    scale = expected.abs().amax().clamp(min=1.0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=float(slack * ROUNDING[dtype] * scale))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group_major", [False, True])
def test_pool_forward(library, dtype, size, group_major):
    torch.manual_seed(0)
    batch, tokens, groups, dim, width = size
    all_channels, lib = groups * dim, emulated_norm.load(library)
    x = source((batch, tokens, 1, all_channels), all_channels, dtype)
    xn = Image((batch, tokens, groups, width), dtype, AROUND, group_major=group_major)
    total = Image((batch, tokens, 1, all_channels), dtype, AROUND)
    weight, bias, sum_bias = torch.randn(3, all_channels).unbind()
    mask = torch.tensor([1.0, 0.0, 1.0][:batch])
    case = case_of(x.view, dim, EPS, xn.view)
    partials = partials_of(lib, case, all_channels, backward=False, modulated=False)
    images = [
        norm_image(grouped(x.view, groups, dim)),
        norm_image(xn.view),
        norm_image(grouped(total.view, groups, dim)),
    ]
    call(lib.emulated_pool_fwd, case, images, [weight, bias, sum_bias, None], pointer(mask), pointer(partials))

    value = channels(x, all_channels)
    expected = F.layer_norm(value, (all_channels,), weight.double(), bias.double(), EPS)
    close(xn.result(dim), expected, dtype)
    close(total.result(all_channels), value + mask.double().view(-1, 1, 1) * sum_bias.double(), dtype)
    close(sums_of(partials, batch), expected.sum(1), torch.float32, slack=64.0)


@pytest.mark.parametrize("size", [size for size in SIZES if size[2] == 1 and size[4] <= 512])
@pytest.mark.parametrize("dtype", TYPES)
def test_an_image_with_a_bias(library, dtype, size):
    """As behind a convolution, whose bias the norm adds."""
    torch.manual_seed(0)
    batch, tokens, _, dim, width = size
    lib = emulated_norm.load(library)
    x, dxn = source((batch, tokens, 1, dim), dim, dtype), source((batch, tokens, 1, width), dim, dtype)
    xn, dx = Image((batch, tokens, 1, width), dtype, AROUND), Image((batch, tokens, 1, dim), dtype, AROUND)
    weight, bias, x_bias = torch.randn(3, dim).unbind()
    case = case_of(x.view, dim, EPS, xn.view)
    forward = [norm_image(x.view), norm_image(xn.view), norm_image(None)]
    call(lib.emulated_pool_fwd, case, forward, [weight, bias, None, x_bias], pointer(None), pointer(None))
    partials = partials_of(lib, case, 3 * dim, backward=True, modulated=False)
    none = norm_image(None)
    call(
        lib.emulated_pool_bwd, case, [norm_image(dxn.view), none, norm_image(x.view), norm_image(dx.view), none],
        [weight, None, x_bias], pointer(None), pointer(None), pointer(None), False, pointer(partials),
    )  # fmt: skip

    leaves = [channels(x, dim), *(t.double() for t in (x_bias, weight, bias))]
    value, xb, w, b = (t.requires_grad_() for t in leaves)
    y = F.layer_norm(value + xb, (dim,), w, b, EPS)
    dvalue, dxb, dw, db = torch.autograd.grad(y, (value, xb, w, b), channels(dxn, dim))
    close(xn.result(dim), y.detach(), dtype)
    close(dx.result(dim), dvalue, dtype)
    for actual, of in zip(sums_of(partials, batch).sum(0).split(dim), (dw, db, dxb), strict=True):
        close(actual, of, torch.float32, slack=64.0)


def grouped(view, groups, dim):
    """An image whose groups are adjacent channels, as the kernels address one that is not padded by groups."""
    return view.flatten(2).unflatten(2, (groups, dim))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group_major", [False, True])
def test_pool_backward(library, dtype, size, group_major):
    torch.manual_seed(0)
    batch, tokens, groups, dim, width = size
    all_channels, lib = groups * dim, emulated_norm.load(library)
    x = source((batch, tokens, 1, all_channels), all_channels, dtype)
    dxn, more = (source((batch, tokens, groups, width), dim, dtype, group_major=group_major) for _ in range(2))
    dx_more, dx = source((batch, tokens, 1, all_channels), all_channels, dtype), Image(x.view.shape, dtype, AROUND)
    weight, bias = torch.randn(2, all_channels).unbind()
    dpooled = torch.randn(batch, all_channels)
    case = case_of(x.view, dim, EPS, dxn.view)
    sums_more = groups * case.group_width <= 512  # beyond, the kernels have no registers for them
    columns = (3 if sums_more else 2) * all_channels
    partials = partials_of(lib, case, columns, backward=True, modulated=False)
    images = [
        norm_image(dxn.view), norm_image(more.view),
        *(norm_image(grouped(t.view, groups, dim)) for t in (x, dx, dx_more)),
    ]  # fmt: skip
    call(
        lib.emulated_pool_bwd, case, images, [weight, bias, None],
        pointer(dpooled), pointer(None), pointer(None), sums_more, pointer(partials),
    )  # fmt: skip

    value = channels(x, all_channels).requires_grad_()
    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    y = F.layer_norm(value, (all_channels,), w, b, EPS)
    gradient = channels(dxn, dim) + channels(more, dim) + dpooled.double().unsqueeze(1) / tokens
    dvalue, dw, db = torch.autograd.grad(y, (value, w, b), gradient)
    close(dx.result(all_channels), dvalue + channels(dx_more, all_channels), dtype)
    sums = sums_of(partials, batch).sum(0).split(all_channels)
    expected = [dw, db, channels(dx_more, all_channels).sum((0, 1))]
    for actual, of in zip(sums, expected, strict=False):
        close(actual, of, torch.float32, slack=64.0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group_major", [False, True])
def test_modulated(library, dtype, size, group_major):
    torch.manual_seed(0)
    batch, tokens, groups, dim, width = size
    all_channels, lib, shape = groups * dim, emulated_norm.load(library), (batch, tokens, groups, width)
    o, x, dy = (source(shape, dim, dtype, group_major=group_major) for _ in range(3))
    y, again, d_o, dx = (Image(shape, dtype, AROUND, group_major=group_major) for _ in range(4))
    scale, gate = torch.tensor([1.5]), torch.rand(batch, all_channels) + 0.5
    weight, bias = torch.randn(2, all_channels).unbind()
    parameters = [scale, gate, weight, bias]
    case = case_of(x.view, dim, EPS, x.view)
    call(lib.emulated_modulated_fwd, case, [norm_image(t.view) for t in (o, x, y)], parameters, pointer(None))
    partials = partials_of(lib, case, 3 * all_channels + 1, backward=True, modulated=True)
    images = [norm_image(t.view) for t in (dy, o, x, d_o, dx)]
    call(lib.emulated_modulated_bwd, case, images, parameters, pointer(again.view), pointer(partials))

    leaves = [channels(o, dim), channels(x, dim), *(t.double() for t in parameters)]
    ov, xv, s, g, w, b = (t.requires_grad_() for t in leaves)
    expected = F.layer_norm(ov * s * xv * g.unsqueeze(1), (all_channels,), w, b, EPS)
    grads = torch.autograd.grad(expected, (ov, xv, s, g, w, b), channels(dy, dim))
    close(y.result(dim), expected.detach(), dtype)
    close(again.result(dim), expected.detach(), dtype)
    for image, of in ((d_o, grads[0]), (dx, grads[1])):
        close(image.result(dim), of, dtype, slack=8.0)
    rows = sums_of(partials, batch)
    dweight, dbias, dscale, dgate = rows.split([all_channels, all_channels, 1, all_channels], 1)
    for actual, of in ((dweight.sum(0), grads[4]), (dbias.sum(0), grads[5]), (dgate, grads[3])):
        close(actual, of, torch.float32, slack=256.0)
    close(dscale.sum(0), grads[2], torch.float32, slack=4096.0)  # a sum over everything that cancels


def test_no_races(tmp_path):
    done = emulation.sanitized(tmp_path, "norm", __file__, "bfloat16 or dtype2")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_a_race_is_found(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    changed = csrc / "cuda/layer_norm/pool.cu"
    text = changed.read_text()
    barrier = "    clear_inter_block_state(args);\n    __syncthreads();\n"  # between the tables and those who read them
    assert text.count(barrier) == 1
    changed.write_text(text.replace(barrier, "    clear_inter_block_state(args);\n"))
    done = emulation.sanitized(tmp_path, "norm", __file__, "pool_forward and dtype2", csrc=csrc)
    assert done.returncode != 0 and "data race" in done.stderr, done.stdout + done.stderr
