# SPDX-License-Identifier: Apache-2.0
"""The stem's first convolution as one over blocks of pixels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groupmamba_ext.ops import pixels_to_channels as on_cuda
from support.common import relative_error

pytest.importorskip("timm", reason="needs the extra 'models'")
entry_conv = pytest.importorskip("groupmamba.models.entry_conv")

SIZES = [(1, 8, 8), (3, 8, 10), (3, 7, 9), (3, 1, 1), (3, 2, 5), (4, 33, 32), (5, 6, 7)]


@pytest.mark.parametrize("channels, height, width", SIZES)
@pytest.mark.parametrize("kernel", [3, 7])
def test_is_the_convolution(kernel, channels, height, width):
    torch.manual_seed(0)
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, channels, kernel, kernel, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, weight, None, 2, kernel // 2)
    blocks = entry_conv.pixels_to_channels(x, kernel, torch.float64)
    y = F.conv2d(blocks, entry_conv.taps_to_channels(weight))
    assert blocks.shape[1] % 8 == 0 and blocks.stride(1) == 1
    assert relative_error(y, expected) < 1e-14
    dy = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy), strict=True
    ):
        assert relative_error(a, b) < 1e-13


def on_blocks(x, conv):
    return entry_conv.conv_on_blocks(entry_conv.pixel_blocks(x, conv), conv.weight)


@pytest.mark.cuda
def test_where_it_is_taken():
    x = torch.zeros(1, 3, 8, 8, device="cuda")
    conv = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    assert entry_conv.pixel_blocks(x, conv) is None
    assert entry_conv.pixel_blocks(x.half(), conv).shape == (1, 16, 7, 7)
    with torch.autocast("cuda", torch.bfloat16):
        assert entry_conv.pixel_blocks(x, conv).dtype == torch.bfloat16
        assert entry_conv.pixel_blocks(x.repeat(1, 2, 1, 1), nn.Conv2d(6, 8, 7, 2, 3)) is None


@pytest.mark.cuda
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_cuda(autocast, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 32, 7, 2, 3, bias=False).cuda()
    x = torch.randn(2, 3, 37, 64, device="cuda").to(memory_format=memory_format).requires_grad_()
    expected = F.conv2d(x.double(), conv.weight.double(), None, 2, 3)
    dy = torch.randn_like(expected)
    truth = torch.autograd.grad(expected, (x, conv.weight), dy)
    if autocast:
        with torch.autocast("cuda", torch.bfloat16):
            y = on_blocks(x, conv)
    else:
        y = on_blocks(x.bfloat16(), conv.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 0.01
    for a, b in zip(torch.autograd.grad(y, (x, conv.weight), dy.bfloat16()), truth, strict=True):
        assert relative_error(a, b) < 0.01


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("into", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels, height, width", SIZES[:-1] + [(2, 5, 300), (3, 64, 64)])
@pytest.mark.parametrize("kernel", [3, 7, 11])
def test_the_kernel_gives_the_same_blocks(kernel, channels, height, width, into, dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(3, channels + 1, height + 1, width + 2, device="cuda", dtype=dtype)
    last = x[:, 1:, :-1, 2:].contiguous(memory_format=torch.channels_last)
    for view in (x[:, 1:, 1:, :-2], last, x[:1, :-1, 1:, 2:].expand(3, -1, -1, -1)):
        assert on_cuda.takes_pixels_to_channels(view, into)
        blocks = entry_conv.pixels_to_channels(view, kernel, into)
        with monkeypatch.context() as patch:
            patch.setattr(on_cuda, "takes_pixels_to_channels", lambda *a: False)
            expected = entry_conv.pixels_to_channels(view, kernel, into)
        assert blocks.dtype == into and blocks.stride() == expected.stride()
        torch.testing.assert_close(blocks, expected, rtol=0, atol=0)


@pytest.mark.cuda
def test_when_the_kernel_takes_an_image():
    x = torch.zeros(1, 3, 8, 8, device="cuda")
    takes = on_cuda.takes_pixels_to_channels
    assert takes(x, torch.bfloat16) and takes(x.half(), torch.float16)
    assert not takes(x, torch.float32) and not takes(x.double(), torch.bfloat16)
    assert not takes(x.repeat(1, 2, 1, 1), torch.bfloat16) and not takes(x[:0], torch.bfloat16)
    learnt = x.clone().requires_grad_()
    assert not takes(learnt, torch.bfloat16)
    with torch.no_grad():
        assert takes(learnt, torch.bfloat16)


@pytest.mark.cuda
def test_kernel_opcheck_and_refusals():
    x, op = torch.randn(2, 3, 5, 6, device="cuda"), torch.ops.groupmamba.pixels_to_channels
    torch.library.opcheck(op, (x, 7, True))
    with pytest.raises(RuntimeError, match="C must be at most 4, got 5"):
        op(torch.zeros(1, 5, 4, 4, device="cuda"), 7, True)
    with pytest.raises(RuntimeError, match="kernel_size must be 3, 7, 11, ..., got 5"):
        op(x, 5, True)
    with pytest.raises(RuntimeError, match=r"x must be \(batch, C, H, W\) with elements, got \(3, 5, 6\)"):
        op(x[0], 7, True)
    with pytest.raises(RuntimeError, match="groupmamba::pixels_to_channels is an op for inference"):
        op(x.requires_grad_(), 7, True).sum().backward()
