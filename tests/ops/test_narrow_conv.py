# SPDX-License-Identifier: Apache-2.0
"""The stem's dense convolutions: the CUDA op against float64, and when it is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import groupmamba_ext as ext
from groupmamba_ext import _load
from groupmamba_ext.ops.narrow_conv import narrow_conv, narrow_conv_relu, takes_narrow_conv
from support.common import padded_channels, relative_error, skip_without_sm90a, unaligned

HALF = (torch.bfloat16, torch.float16)
SHAPES = [(32, 3, 1), (16, 4, 0), (32, 3, 0), (32, 3, 2), (16, 4, 3)]  # channels, taps, padding
SIZES = [(2, 4, 4), (1, 5, 200), (3, 113, 112), (2, 30, 129), (2, 9, 350), (5, 64, 31), (1, 224, 256), (40, 17, 60)]


@pytest.fixture(autouse=True)
def kernels():
    skip_without_sm90a()


def case(batch, height, width, channels, taps, dtype, param=torch.float32, device="cuda"):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, device=device, dtype=dtype)
    weight = torch.randn(32, channels, taps, taps, device=device).mul_((channels * taps * taps) ** -0.5)
    return x.contiguous(memory_format=torch.channels_last), weight.to(param)


def truth(x, weight, padding, dy=None, bias=None):
    """In float64, of the weight as the kernels round it."""
    x, weight = x.detach().double(), weight.detach().to(x.dtype).double()
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = F.conv2d(x, weight, bias, padding=padding)
    return y if dy is None else (y, *torch.autograd.grad(y, leaves, dy.double()))


def forward_and_back(x, weight, padding, dy, back):
    x, weight = x.detach().requires_grad_(back), weight.detach().requires_grad_()
    assert takes_narrow_conv(x, weight, padding) or weight.dtype != x.dtype
    y = narrow_conv(x, weight, padding)
    return (y, *torch.autograd.grad(y, (x, weight) if back else (weight,), dy))


def close(actual, expected, dtype):
    """To the rounding of the result: sums are in float32."""
    rounding = torch.finfo(dtype).eps
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert relative_error(actual, expected) < (rounding if dtype in HALF else 3e-5)
    # no element is off by more than rounds to it, and what float32 loses of the size of the sums
    size = expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=rounding if dtype in HALF else 1e-4, atol=2e-5 * size)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("channels, taps, padding", SHAPES)
@pytest.mark.parametrize("batch, height, width", SIZES)
def test_sizes(batch, height, width, channels, taps, padding, dtype):
    x, weight = case(batch, height, width, channels, taps, dtype)
    back = channels == 32
    dy = torch.randn(batch, 32, height + 2 * padding - taps + 1, width + 2 * padding - taps + 1, device="cuda").to(
        dtype
    )
    with torch.autocast("cuda", dtype):
        y, *gradients = forward_and_back(x, weight, padding, dy, back)
    expected, dx, dweight = truth(x, weight, padding, dy)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, expected, dtype)
    close(gradients[-1], dweight, torch.float32)
    if back:
        close(gradients[0], dx, dtype)
    bias = torch.randn(32, device="cuda")
    close(narrow_conv_relu(x, weight, bias, padding), truth(x, weight, padding, bias=bias.double()).relu(), dtype)
    close(
        narrow_conv_relu(x, weight.to(dtype), bias.to(dtype), padding),
        truth(x, weight, padding, bias=bias.to(dtype).double()).relu(),
        dtype,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("channels, taps, padding", SHAPES[:2])
def test_one_pixel_of_a_result(channels, taps, padding, dtype):
    side = taps - 2 * padding
    x, weight = case(1, side, side, channels, taps, dtype, param=dtype)
    dy = torch.randn(1, 32, 1, 1, device="cuda", dtype=dtype)
    y, *_, dweight = forward_and_back(x, weight, padding, dy, channels == 32)
    expected, _, truth_dweight = truth(x, weight, padding, dy)
    close(y, expected, dtype)
    close(dweight, truth_dweight, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["nchw", "unaligned", "padded", "expanded"])
def test_layouts(layout):
    x, weight = case(2, 19, 40, 32, 3, torch.bfloat16, param=torch.bfloat16)
    dy = torch.randn_like(x)
    expected = forward_and_back(x, weight, 1, dy, True)
    changed = {
        "nchw": lambda t: t.contiguous(),
        "unaligned": lambda t: unaligned(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        "padded": lambda t: padded_channels(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        "expanded": lambda t: t,
    }[layout]
    if layout == "expanded":
        x, dy = (t[:1].expand_as(t) for t in (x, dy))
        expected = forward_and_back(x.clone(), weight, 1, dy.clone(), True)
    weights = (
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(2, 3).clone().transpose(2, 3),
    )
    for of in weights:
        for a, b in zip(forward_and_back(changed(x), of, 1, changed(dy), True), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("channels, taps, padding", SHAPES[:2])
def test_bitwise_repeatable(channels, taps, padding):
    """Also from another place in the batch, but for the weight's gradient, which is a sum over it."""
    x, weight = case(9, 60, 112, channels, taps, torch.bfloat16, param=torch.bfloat16)
    dy = torch.randn_like(narrow_conv(x, weight, padding))
    first = forward_and_back(x, weight, padding, dy, channels == 32)
    for _ in range(3):
        assert all(
            torch.equal(a, b)
            for a, b in zip(forward_and_back(x, weight, padding, dy, channels == 32), first, strict=True)
        )
    alone = forward_and_back(x[3:4], weight, padding, dy[3:4], channels == 32)
    for a, b in zip(alone[:-1], first[:-1], strict=True):
        assert torch.equal(a, b[3:4])


@pytest.mark.cuda
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_neighbours_alone(value):
    x, weight = case(3, 20, 30, 32, 3, torch.bfloat16, param=torch.bfloat16)
    x[1, 4, 7, 9] = value
    y = narrow_conv(x, weight, 1)
    finite = torch.ones(3, 1, 20, 30, dtype=torch.bool, device="cuda")
    finite[1, :, 6:9, 8:11] = False
    assert torch.equal(y.isfinite(), finite.expand_as(y))
    y = narrow_conv_relu(x, weight, weight[:, 0, 0, 0], 1)
    assert y.isnan().sum() == (9 * 32 if value != value else 0)
    leaf = weight.requires_grad_()
    (dweight,) = torch.autograd.grad(narrow_conv(x, leaf, 1), leaf, torch.randn_like(y))
    wrong = torch.zeros(32, 32, 3, 3, dtype=torch.bool, device="cuda")
    wrong[:, 4] = True
    assert torch.equal(~dweight.isfinite(), wrong)


@pytest.mark.cuda
def test_gradients_that_nobody_needs():
    x, weight = case(2, 9, 12, 32, 3, torch.float16, param=torch.float16)
    for needs in ((True, False), (False, True)):
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x, weight), needs, strict=True)]
        y = narrow_conv(*leaves, 1)
        (y * y).sum().backward()
        assert [t.grad is not None for t in leaves] == list(needs)
    assert not narrow_conv(x, weight, 1).requires_grad


@pytest.mark.cuda
@pytest.mark.parametrize("channels, taps, padding", SHAPES[:2])
def test_opcheck(channels, taps, padding):
    x, weight = case(2, 9, 12, channels, taps, torch.bfloat16)
    x = x.permute(0, 2, 3, 1).requires_grad_(channels == 32)
    torch.library.opcheck(torch.ops.groupmamba.narrow_conv_fwd, (x, weight.requires_grad_(), padding))
    x, weight = x.detach(), weight.detach()
    dy = torch.randn_like(torch.ops.groupmamba.narrow_conv_fwd(x, weight, padding))
    utils = ("test_schema", "test_faketensor")
    for needs in ((channels == 32, True), (False, False)):
        arguments = (dy, x, weight, padding, *needs)
        torch.library.opcheck(torch.ops.groupmamba.narrow_conv_bwd, arguments, test_utils=utils)
    relu = torch.ops.groupmamba.narrow_conv_relu
    torch.library.opcheck(relu, (x, weight, weight[:, 0, 0, 0].contiguous(), padding))
    with pytest.raises(RuntimeError, match="groupmamba::narrow_conv_relu is an op for inference"):
        relu(x, weight.requires_grad_(), weight[:, 0, 0, 0], padding).sum().backward()


@pytest.mark.cuda
def test_second_derivatives_are_refused():
    x, weight = (t.requires_grad_() for t in case(1, 5, 6, 32, 3, torch.bfloat16, param=torch.bfloat16))
    (dx,) = torch.autograd.grad(narrow_conv(x, weight, 1).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.cuda
def test_flops_are_those_of_the_convolution():
    x, weight = (t.requires_grad_() for t in case(2, 9, 12, 32, 3, torch.bfloat16, param=torch.bfloat16))
    counts = []
    for function in (narrow_conv, lambda x, weight, padding: F.conv2d(x, weight, padding=padding)):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, 1).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 2 * 9 * 12 * 32 * 32 * 9


@pytest.mark.cuda
def test_flops_of_the_form_for_inference():
    x, weight = case(2, 9, 12, 32, 3, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        narrow_conv_relu(x, weight, weight[:, 0, 0, 0], 1)
    assert counter.get_total_flops() == 2 * 2 * 9 * 12 * 32 * 32 * 9


@pytest.mark.cuda
def test_raw_op_refuses():
    fwd, bwd = torch.ops.groupmamba.narrow_conv_fwd, torch.ops.groupmamba.narrow_conv_bwd
    x, weight = torch.zeros(1, 4, 5, 32, device="cuda").half(), torch.zeros(32, 32, 3, 3, device="cuda")
    with pytest.raises(RuntimeError, match="takes images of float16 and bfloat16, got float32"):
        fwd(x.float(), weight, 1)
    with pytest.raises(RuntimeError, match="takes C, O and K of 32, 32, 3 or 16, 32, 4, got 32, 16, 3"):
        fwd(x, weight[:16], 1)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(32, 32, 3, 3\), got \(32, 32, 3, 2\)"):
        fwd(x, weight[..., :2], 1)
    with pytest.raises(RuntimeError, match="padding must be at least 0 and below K, got 3"):
        fwd(x, weight, 3)
    with pytest.raises(RuntimeError, match="padding must be at least 0 and below K, got -1"):
        fwd(x, weight, -1)
    with pytest.raises(RuntimeError, match=r"x is smaller than the kernel: \(1, 4, 2, 32\)"):
        fwd(x[:, :, :2], weight, 0)
    with pytest.raises(RuntimeError, match=r"x must be \(batch, H, W, C\) with elements, got \(0, 4, 5, 32\)"):
        fwd(x[:0], weight, 1)
    with pytest.raises(RuntimeError, match=r"dy must have shape \(1, 4, 5, 32\), got \(1, 4, 4, 32\)"):
        bwd(x[:, :, :4], x, weight, 1, True, True)
    with pytest.raises(RuntimeError, match="dx takes C, O and K of 32, 32, 3"):
        bwd(x[:, :1, :2], x[..., :16], torch.zeros(32, 16, 4, 4, device="cuda"), 0, True, True)


@pytest.mark.cuda
def test_when_it_is_taken(monkeypatch):
    x, weight = case(2, 9, 12, 32, 3, torch.bfloat16)
    assert not takes_narrow_conv(x, weight, 1)  # torch raises on two dtypes outside autocast
    assert takes_narrow_conv(x, weight.bfloat16(), 1)
    with torch.autocast("cuda", torch.bfloat16):
        assert takes_narrow_conv(x, weight, 1) and takes_narrow_conv(x, weight.bfloat16(), 0)
        assert not takes_narrow_conv(x.half(), weight, 1) and not takes_narrow_conv(x.float(), weight, 1)
        assert not takes_narrow_conv(x, weight.half(), 1)
        assert not takes_narrow_conv(x, weight, 3) and not takes_narrow_conv(x[:, :, :2], weight, 0)
        assert not takes_narrow_conv(x[:0], weight, 1) and not takes_narrow_conv(x, weight[:16], 1)
        assert not takes_narrow_conv(x[:, :16], weight[:, :16], 1) and not takes_narrow_conv(x[0], weight, 1)
        assert not takes_narrow_conv(x, weight[..., :2], 1) and not takes_narrow_conv(x.cpu(), weight.cpu(), 1)
        blocks, entry = case(2, 9, 12, 16, 4, torch.bfloat16)
        assert takes_narrow_conv(blocks, entry, 0)
        assert not takes_narrow_conv(blocks.requires_grad_(), entry, 0)
        with ext.backend("reference"):
            assert not takes_narrow_conv(x, weight, 1)
        notes = lambda *a: ext.explain(takes_narrow_conv, *a).notes  # noqa: E731
        assert notes(x, weight, 1)[-1] == "narrow_conv of 32 channels by 3 x 3 taps: tensor cores"
        assert "there are kernels for 32 to 32" in notes(x, weight[:16], 1)[-1]
        assert "they must be float16 or bfloat16" in notes(x.float(), weight, 1)[-1]
        monkeypatch.setattr(_load, "_built_for_sm90a", False)
        assert not takes_narrow_conv(x, weight, 1)
        assert "not of compute capability 9.0" in notes(x, weight, 1)[-1]
