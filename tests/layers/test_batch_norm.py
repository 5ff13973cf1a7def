# SPDX-License-Identifier: Apache-2.0
"""The stem's BatchNorms with ReLU: the CUDA ops against float64, and the stem against calls of torch's modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groupmamba import why_not_fused
from groupmamba_ext.ops.batch_norm_fold import batch_norm_fold, takes_batch_norm_fold
from groupmamba_ext.ops.batch_norm_relu import batch_norm_relu, takes_batch_norm
from support.common import check, padded_channels, relative_error, unaligned
from support.inputs import batch_norm_inputs as inputs
from support.inputs import convolution

pytest.importorskip("timm", reason="needs the extra 'models'")
Stem = pytest.importorskip("groupmamba.models.blocks").Stem
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


def native(x, weight, bias):
    return batch_norm_relu(x, weight, bias, 1e-5)[0] if x.is_cuda else reference(x, weight, bias)


def reference(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5).relu()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, channels, h, w", SIZES)
def test_sizes(batch, channels, h, w, dtype):
    torch.manual_seed(0)
    tensors = inputs(batch, channels, h, w, dtype)
    assert takes_batch_norm(*tensors.values())
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
    assert takes_batch_norm_fold(image, weight, *norm)
    folded, bias = batch_norm_fold(image, weight, norm, 1e-5, blocks=blocks)
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
    assert not takes_batch_norm_fold(image.float(), weight, *norm)


NORMS = {
    "usual": lambda: nn.BatchNorm2d(16),
    "momentum": lambda: nn.BatchNorm2d(16, momentum=0.3),
    "cumulative": lambda: nn.BatchNorm2d(16, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(16, track_running_stats=False),
    "not affine": lambda: nn.BatchNorm2d(16, affine=False),
    "group": lambda: nn.GroupNorm(4, 16),
    "identity": nn.Identity,
}


def stem_and_twin(device, norm="usual", dtype=torch.float32):
    """A stem, and one that calls all of its modules."""
    torch.manual_seed(0)
    stem = Stem(3, 16, 24, paper=False)
    for i in (1, 4, 7):
        stem.conv[i] = NORMS[norm]()
        if getattr(stem.conv[i], "weight", None) is not None:
            nn.init.normal_(stem.conv[i].weight), nn.init.normal_(stem.conv[i].bias)
    twin = copy.deepcopy(stem)
    twin.conv.register_forward_hook(lambda *_: None)
    return [module.to(device, dtype, memory_format=torch.channels_last) for module in (stem, twin)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gradients", [True, False])
def test_stem_is_torchs_modules(monkeypatch, device, norm, gradients):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # Float64 tells any difference of the maths; on CUDA the ops take no more than float32.
    dtype, tolerance = (torch.float64, 1e-10) if device == "cpu" else (torch.float32, 1e-3)
    stem, twin = stem_and_twin(device, norm, dtype)
    assert bool(why_not_fused(stem)) == (norm in ("no statistics", "not affine", "group", "identity"))
    assert why_not_fused(twin)[""] == "conv has hooks"
    modes = [(True, True), (True, True), (False, False)]  # of the stem, of its norms
    modes += [(False, True), (True, False)]  # test-time adaptation, and norms that are frozen in training
    for training, norms_training in modes:
        for module in (stem, twin):
            module.train(training)
            for i in (1, 4, 7):
                module.conv[i].train(norms_training)
        x = torch.randn(3, 3, 24, 28, device=device, dtype=dtype, requires_grad=gradients)
        with torch.set_grad_enabled(gradients):
            y, expected = stem(x), twin(x)
        assert relative_error(y, expected) < tolerance
        if gradients:
            dy = torch.randn_like(y)
            ours = torch.autograd.grad(y, [x, *stem.parameters()], dy)
            theirs = torch.autograd.grad(expected, [x, *twin.parameters()], dy)
            for a, b in zip(ours, theirs, strict=True):
                scale = max(b.norm().item(), 1e-2)  # biases before a norm have a gradient of nothing but rounding
                assert (a - b).norm().item() < 10 * tolerance * scale
    for (name, a), b in zip(stem.state_dict().items(), twin.state_dict().values(), strict=True):
        assert relative_error(a, b) < tolerance, name
    if norm in ("usual", "momentum", "cumulative"):
        assert stem.conv[1].num_batches_tracked == 3 and stem.conv[1].running_mean.any()


def test_test_time_adaptation(device):
    """BatchNorms alone in training mode in an evaluating model use and update statistics, also without gradients."""
    from support.models import small

    model = small().to(device).eval()
    x = 3 + torch.randn(4, 3, 64, 64, device=device)
    plain = model(x)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        adapted = model(x)
    assert all(norm.num_batches_tracked == 1 and norm.running_mean.any() for norm in norms)
    torch.testing.assert_close(adapted, model(x), rtol=1e-3, atol=1e-4)
    assert (adapted - plain).norm() > 0.01 * plain.norm()


def test_single_pixel_raises(device):
    stem, _ = stem_and_twin(device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stem(torch.zeros(1, 3, 2, 2, device=device))


def test_converted_to_sync_batch_norm():
    stem = nn.SyncBatchNorm.convert_sync_batchnorm(stem_and_twin("cpu")[0]).eval()
    assert type(stem.conv[1]) is nn.SyncBatchNorm
    assert "conv.1 is torch.nn.modules.batchnorm.SyncBatchNorm" in why_not_fused(stem)[""]
    maps = []
    stem.proj.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    x = torch.randn(1, 3, 32, 32)
    stem(x.requires_grad_())
    assert (maps[0] >= 0).all() and maps[0].any()
    with torch.no_grad():
        stem(x)
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)
