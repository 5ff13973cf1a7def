# SPDX-License-Identifier: Apache-2.0
"""The parts of a model: downsampling, the stem, blocks, pooling; the whole models are in test_models.py."""

import copy

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'models'")

from groupmamba.models import blocks  # noqa: E402
from support.common import relative_error  # noqa: E402
from support.models import small  # noqa: E402


@pytest.mark.cuda
@pytest.mark.parametrize("make, shape", [
    (lambda: blocks.Downsample(64, 128), (2, 9, 14, 64)),
    (lambda: blocks.Downsample(24, 520), (2, 5, 4, 24)),  # more channels than the norm adds a bias to itself
    (lambda: blocks.Downsample(44, 52), (2, 9, 14, 44)),  # in 16 bits a convolution of 48 and 56 channels
    (lambda: blocks.Downsample(44, 64), (2, 9, 14, 44)),
    (lambda: blocks.Downsample(64, 348), (2, 9, 14, 64)),
    (lambda: blocks.Stem(3, 32, 64, paper=False), (2, 3, 36, 52)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_adds_the_bias_of_the_convolution(monkeypatch, dtype, make, shape):
    """The same as the convolution with its bias, which it computes for whoever watches it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    module = make().cuda().train()
    torch.nn.init.normal_(module.proj.bias)
    x = torch.randn(shape, device="cuda")
    if x.shape[1] == 3:
        x = x.contiguous(memory_format=torch.channels_last)
    biases, forward = [], blocks.TokenNorm.forward
    spy = lambda norm, x, x_bias=None: biases.append(x_bias) or forward(norm, x, x_bias)  # noqa: E731
    monkeypatch.setattr(blocks.TokenNorm, "forward", spy)

    def results():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(x)
        gradients = torch.autograd.grad(y, list(module.parameters()), torch.linspace(-1, 1, y.numel()).to(y).view_as(y))
        return [y.detach(), *gradients]

    fused = results()
    seen = []
    handle = module.proj.register_forward_hook(lambda _m, args, out: seen.append((args[0], out.detach())))
    composed = results()
    handle.remove()
    assert biases[0] is (module.proj.bias if module.proj.out_channels <= 512 else None) and biases[1] is None
    ((image, out),) = seen
    plain = torch.nn.functional.conv2d(image.float(), module.proj.weight, None, 2, 1).detach()
    assert relative_error(out, (plain + module.proj.bias[:, None, None]).double()) < 1e-2
    names = ["y", *(name for name, _ in module.named_parameters())]
    for name, a, b in zip(names, fused, composed, strict=True):
        error = relative_error(a, b.double())
        assert error < (2e-5 if dtype == torch.float32 else 2e-2), f"{name}: {error:.2e}"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels, out", [(44, 52), (64, 44)])
def test_downsampling_of_a_16_bit_model(dtype, channels, out):
    torch.manual_seed(0)
    exact = blocks.Downsample(channels, out).double()
    module = copy.deepcopy(exact).to("cuda", dtype)
    exact.load_state_dict({name: t.double() for name, t in module.state_dict().items()})
    x = torch.randn(2, 9, 14, channels, device="cuda", dtype=dtype, requires_grad=True)
    y = module(x)
    image = x.detach().double().cpu().requires_grad_()
    expected, dy = exact(image), torch.randn(y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, [x, *module.parameters()], dy.to(y))
    truth = torch.autograd.grad(expected, [image, *exact.parameters()], dy)
    for a, b in zip((y, *found), (expected, *truth), strict=True):
        assert relative_error(a, b) < (2e-2 if dtype == torch.bfloat16 else 4e-3)
    with pytest.raises(RuntimeError, match=f"to have {channels} channels, but got {channels + 1}"):
        module(torch.randn(2, 9, 14, channels + 1, device="cuda", dtype=dtype))
    with pytest.raises(RuntimeError, match="type"):
        module(x.float())


def test_the_gradient_of_pooling_lies_as_the_image():
    """Else the last block's backward copies it."""
    model = small()
    image = torch.randn(2, 2, 3, model.num_features).requires_grad_()
    tokens = image * 1.0
    seen = []
    tokens.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))
    model.forward_head(tokens.permute(0, 3, 1, 2)).sum().backward()
    assert seen == [True]


@pytest.mark.parametrize("channels, out", [(44, 52), (44, 48), (48, 44), (1, 7)])
def test_a_convolution_of_padded_channels(channels, out):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 7, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, channels, 3, 3, dtype=torch.float64)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    padded = blocks._padded_conv(x, weight, (2, 2), (1, 1))
    plain = torch.nn.functional.conv2d(x, weight, None, 2, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(padded, plain)
    assert padded.stride(2) % 8 == 0, "its pixels are where the norm's kernels read vectors"
    dy = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(padded, inputs, dy), torch.autograd.grad(plain, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_block_leaves_branches_out():
    block = blocks.GroupMambaBlock(16, 2.0, 1.0)
    x = torch.randn(3, 4, 5, 16)
    assert torch.equal(block.train()(x), x)
    expected = blocks.GroupMambaBlock(16, 2.0, 0.0)
    expected.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x), expected(x))
    block = blocks.GroupMambaBlock(16, 2.0, 0.5).train()
    block.mlp.fc2.weight.data.zero_(), block.mlp.fc2.bias.data.zero_()  # leaves the layer's branch alone
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 16).expand(64, -1, -1, -1)
    changes = (block(x) - x).flatten(1)
    kept = changes.any(1)
    assert 16 < int(kept.sum()) < 48  # 32 expected; three deviations are 12
    torch.testing.assert_close(changes[kept], 2 * (block.eval()(x) - x).flatten(1)[kept])
