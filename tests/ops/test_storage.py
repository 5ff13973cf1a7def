# SPDX-License-Identifier: Apache-2.0
"""How results are stored in 16 bits: rounded to nearest, ties to even, NaN kept, bit for bit as torch converts.

Each op is made to compute a float32 number of the test's choice exactly: a bias, where the weight before it is 0, or a
single product.
"""

import pytest
import torch

import groupmamba_ext as ext

DTYPES = [torch.bfloat16, torch.float16]
# Bits of float32: halfway between two bfloat16, next to that, largest finite ones, subnormal ones, infinities.
SPECIAL = [
    0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF808000, 0xBF818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF,
    0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x38801000,
]  # fmt: skip
NANS = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0xFFC00001, 0x7FFF8000]
CHANNELS = 61


def floats(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)


def numbers(count):
    """``count`` float32: the special ones, then random ones, of which half lie halfway between two bfloat16."""
    values = torch.randn(count)
    ties = ((values.view(torch.int32) & ~0xFFFF) | 0x8000).view(torch.float32)
    values[::2] = ties[::2]
    values[: len(SPECIAL)] = floats(SPECIAL)
    return values


def stored(op, dtype, values, device):
    """``values``, (CHANNELS,), on their way through an op with images of ``dtype``: (tokens, CHANNELS)."""
    image = torch.ones(2, 3, 4, 1, CHANNELS, dtype=dtype, device=device)
    values, zeros = values.to(device), torch.zeros(CHANNELS, device=device)
    if op == "depthwise_conv3x3":
        return ext.depthwise_conv3x3(image, torch.zeros(1, CHANNELS, 3, 3, device=device), values[None])
    if op == "layer_norm_pool":
        return ext.layer_norm_pool(image.squeeze(3), zeros, values)[0]
    if op == "modulated_layer_norm":
        return ext.modulated_layer_norm(image, image.squeeze(3), torch.ones(1, device=device), zeros, values)
    A, feature = -torch.ones(1, CHANNELS, 1, device=device), torch.zeros(2, 3, 4, 1, 1, dtype=dtype, device=device)
    if op == "grouped_selective_scan":  # D u
        return ext.grouped_selective_scan(image, image, A, feature, feature, values[None], directions=("lr",))
    norm = {"norm_weight": zeros[None], "norm_bias": values[None]}
    return ext.grouped_selective_scan(image, image, A, feature, feature, **norm, directions=("lr",))


OPS = ["depthwise_conv3x3", "layer_norm_pool", "modulated_layer_norm", "grouped_selective_scan", "scan with a norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_rounding(device, op, dtype):
    values = numbers(CHANNELS)
    if op == "scan with a norm":  # 0 is added: -0 becomes 0
        values = values + 0.0
    result = stored(op, dtype, values, device).cpu().flatten(0, -2)
    expected = values.to(dtype)
    zero = expected == 0  # of either sign: 0 may be added to -0
    for row in result:
        assert torch.equal(row[~zero].view(torch.int16), expected[~zero].view(torch.int16))
        assert not row[zero].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_nan_stays(device, op, dtype):
    values = numbers(CHANNELS)
    values[20 : 20 + len(NANS)] = floats(NANS)
    result = stored(op, dtype, values, device).cpu().flatten(0, -2)
    for row in result:
        assert torch.equal(row.isnan(), values.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_gradients(device, dtype):
    """The gradient of the convolution's image for a gradient of 1 and a kernel with a centre alone is that weight."""
    values = numbers(CHANNELS)
    values = values[values.isfinite() & (values != 0)]
    values = torch.cat([values, floats(NANS)])
    weight = torch.zeros(len(values), 3, 3, device=device)
    weight[:, 1, 1] = values
    x = torch.ones(3, 1, 1, len(values), dtype=dtype, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(ext.depthwise_conv3x3(x, weight), x, torch.ones_like(x))
    number = ~values.isnan()
    for row in dx.cpu().flatten(0, -2):
        assert torch.equal(row.isnan(), values.isnan())
        assert torch.equal(row[number].view(torch.int16), values[number].to(dtype).view(torch.int16))
