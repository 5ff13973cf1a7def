# SPDX-License-Identifier: Apache-2.0
"""The stem's BatchNorm with ReLU: the CUDA op against float64, and the module against torch's two."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import check, padded_channels, unaligned
from groupmamba_ext import layer_ops

pytest.importorskip("timm", reason="needs the extra 'models'")
BatchNormReLU = pytest.importorskip("groupmamba.models.blocks").BatchNormReLU
taps_to_channels = pytest.importorskip("groupmamba.models.entry_conv").taps_to_channels

SIZES = [
    (2, 8, 1, 1),
    (1, 24, 1, 3),
    (2, 32, 5, 7),
    (3, 64, 33, 31),
    (1, 264, 9, 9),
    (2, 2048, 3, 2),
    (4, 32, 112, 112),
]


def inputs(batch=2, channels=32, h=5, w=7, dtype=torch.float32, device="cuda", param=None, mean=1.0):
    x = mean + 2 * torch.randn(batch, channels, h, w, dtype=torch.float64)
    param = param or dtype
    return {
        "x": x.to(device, dtype).to(memory_format=torch.channels_last),
        "weight": (1 + 0.2 * torch.randn(channels, dtype=torch.float64)).to(device, param),
        "bias": (0.2 * torch.randn(channels, dtype=torch.float64)).to(device, param),
    }


def native(x, weight, bias):
    return layer_ops.batch_norm_relu(x, weight, bias, 1e-5)[0] if x.is_cuda else reference(x, weight, bias)


def reference(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5).relu()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, channels, h, w", SIZES)
def test_sizes(batch, channels, h, w, dtype):
    torch.manual_seed(0)
    tensors = inputs(batch, channels, h, w, dtype)
    assert layer_ops.takes_batch_norm(*tensors.values())
    check(native, reference, tensors, {})


@pytest.mark.cuda
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_parameters_and_large_means(dtype, mean):
    torch.manual_seed(0)
    check(native, reference, inputs(3, 32, 20, 21, dtype, param=torch.float32, mean=mean), {})


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["nchw", "unaligned", "padded"])
def test_layouts(layout):
    torch.manual_seed(0)
    tensors = inputs(dtype=torch.bfloat16)
    tokens = tensors["x"].permute(0, 2, 3, 1)
    tensors["x"] = {
        "nchw": lambda: tensors["x"].contiguous(),
        "unaligned": lambda: unaligned(tokens).permute(0, 3, 1, 2),
        "padded": lambda: padded_channels(tokens).permute(0, 3, 1, 2),
    }[layout]()
    check(native, reference, tensors, {})


@pytest.mark.cuda
def test_bitwise_repeatable():
    tensors = inputs(8, 32, 40, 41, torch.bfloat16)
    dy = torch.randn_like(tensors["x"])

    def once():
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        y = native(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.cuda
def test_nan_passes():
    tensors = inputs()
    tensors["x"][1, 3, 2, 2] = float("nan")
    y = native(**tensors)
    assert y[:, 3].isnan().all() and y.isnan().sum() == y[:, 3].numel()


@pytest.mark.cuda
def test_opcheck():
    tensors = inputs()
    x = tensors["x"].permute(0, 2, 3, 1).contiguous().requires_grad_()
    weight, bias = tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    torch.library.opcheck(torch.ops.groupmamba.batch_norm_relu_fwd, (x, weight, bias, 1e-5))
    y, stats = torch.ops.groupmamba.batch_norm_relu_fwd(x, weight, bias, 1e-5)
    detached = [t.detach() for t in (torch.randn_like(y), x, weight, bias, stats)]
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.groupmamba.batch_norm_relu_bwd, (*detached, 1e-5), test_utils=utils)
    (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.cuda
def test_raw_op_refuses():
    op = torch.ops.groupmamba.batch_norm_relu_fwd
    x, one = torch.zeros(1, 2, 2, 12, device="cuda"), torch.ones(12, device="cuda")
    with pytest.raises(RuntimeError, match="C must be a multiple of 8 up to 2048, got 12"):
        op(x, one, one, 1e-5)
    with pytest.raises(RuntimeError, match=r"more than one pixel, got \(1, 1, 1, 8\)"):
        op(x[:, :1, :1, :8], one[:8], one[:8], 1e-5)
    with pytest.raises(RuntimeError, match=r"bias must have shape \(8\), got \(12\)"):
        op(x[..., :8], one[:8], one, 1e-5)


def convolution(out, channels, taps, dtype, param, memory_format):
    """An image's dtype as an empty image, a convolution's weight and a norm's tensors, on CUDA."""
    weight = torch.randn(out, channels, taps, taps, dtype=torch.float64)
    norm = [1 + 0.2 * torch.randn(out), torch.randn(out), torch.randn(out), torch.rand(out) + 0.1]
    image = torch.zeros(1, channels, 2, 2, device="cuda", dtype=dtype)
    weight = weight.to("cuda", param).to(memory_format=memory_format)
    return image, weight, [t.to("cuda", param) for t in norm]


@pytest.mark.cuda
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, param", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
@pytest.mark.parametrize(
    "out, channels, taps, blocks",
    [(32, 3, 7, True), (9, 4, 3, True), (5, 1, 11, True), (32, 32, 3, False), (7, 5, 4, False), (300, 64, 1, False)],
)
def test_fold(out, channels, taps, blocks, dtype, param, memory_format):
    torch.manual_seed(0)
    image, weight, norm = convolution(out, channels, taps, dtype, param, memory_format)
    assert layer_ops.takes_batch_norm_fold(image, weight, *norm)
    folded, bias = layer_ops.batch_norm_fold(image, weight, norm, 1e-5, blocks=blocks)
    assert folded.is_contiguous(memory_format=torch.channels_last) and folded.dtype == bias.dtype == dtype
    norm_weight, norm_bias, mean, variance = (t.double() for t in norm)
    scale = norm_weight / torch.sqrt(variance + 1e-5)
    expected = weight.double() * scale[:, None, None, None]
    expected = taps_to_channels(expected) if blocks else expected
    rounding = torch.finfo(dtype).eps / 2 + 1e-6
    torch.testing.assert_close(folded.double(), expected, rtol=rounding, atol=1e-7)
    torch.testing.assert_close(bias.double(), norm_bias - mean * scale, rtol=rounding, atol=1e-6)


@pytest.mark.cuda
def test_fold_opcheck_and_refusals():
    image, weight, norm = convolution(8, 3, 7, torch.bfloat16, torch.float32, torch.channels_last)
    op = torch.ops.groupmamba.batch_norm_fold
    for blocks in (False, True):
        torch.library.opcheck(op, (image, weight, *norm, 1e-5, blocks))
    with pytest.raises(RuntimeError, match="groupmamba::batch_norm_fold is an op for inference"):
        op(image, weight.requires_grad_(), *norm, 1e-5, True)[0].sum().backward()
    weight = weight.detach()
    with pytest.raises(RuntimeError, match="K must be 3, 7, 11, ... for blocks of pixels, got 4"):
        op(image, weight[..., :4, :4], *norm, 1e-5, True)
    with pytest.raises(RuntimeError, match=r"weight must be \(O, C, K, K\) with elements, got \(8, 3, 7, 4\)"):
        op(image, weight[..., :4], *norm, 1e-5, False)
    with pytest.raises(RuntimeError, match=r"mean must have shape \(8\), got \(7\)"):
        op(image, weight, *norm[:2], norm[2][:7], norm[3], 1e-5, False)
    assert not layer_ops.takes_batch_norm_fold(image.float(), weight, *norm)


def module_and_twin(device, channels=16, **options):
    torch.manual_seed(0)
    twin = nn.Sequential(nn.BatchNorm2d(channels, **options), nn.ReLU()).to(device)
    if twin[0].affine:
        nn.init.normal_(twin[0].weight), nn.init.normal_(twin[0].bias)
    module = BatchNormReLU(channels, **options).to(device)
    module.load_state_dict(twin[0].state_dict())
    return module, twin


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}]
)
@pytest.mark.parametrize("channels", [16, 12])
def test_module_is_torchs(device, channels, options):
    module, twin = module_and_twin(device, channels, **options)
    for training in (True, True, False):
        module.train(training), twin.train(training)
        x = torch.randn(3, channels, 6, 7, device=device).to(memory_format=torch.channels_last).requires_grad_()
        y, expected = module(x), twin(x)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
    for a, b in zip(module.state_dict().values(), twin[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_single_pixel_raises(device):
    module, _ = module_and_twin(device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.zeros(1, 16, 1, 1, device=device))


def test_converted_to_sync_batch_norm():
    """The norm that takes its place has no ReLU, so the stem's own must follow."""
    from groupmamba.models import groupmamba_tiny

    model = groupmamba_tiny()
    stem = nn.SyncBatchNorm.convert_sync_batchnorm(model).stem.eval()
    assert type(stem.conv[1]) is nn.SyncBatchNorm
    maps = []
    stem.proj.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    x = torch.randn(1, 3, 32, 32)
    stem(x.requires_grad_())
    assert (maps[0] >= 0).all() and maps[0].any()
    with torch.no_grad():
        stem(x)
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)
