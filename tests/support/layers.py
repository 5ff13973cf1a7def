# SPDX-License-Identifier: Apache-2.0
"""What the tests of the layers share."""

import torch

from groupmamba import GroupedMamba2d
from groupmamba.layers.drop_path import DropPathMask
from groupmamba_ext.directions import Directions
from groupmamba_ext.ops.grouped_mamba_layer import LayerOptions, LayerParameters, scan_path
from support.common import FLOOR, relative_error

VARIANTS = ("released", "fused", "paper")
SCANS = ("grouped", "cross")


def make(dim=16, *, seed=0, cls=GroupedMamba2d, **options):
    """A layer whose parameters are far from symmetric or zero: every term of the maths shows in the output."""
    torch.manual_seed(seed)
    layer = cls(dim, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("affinity.fc1.bias"):
                parameter.add_(1)  # keeps hidden units on the side of the ReLU that has gradients
    return layer


def image(*shape, seed=1, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def run(call, x, layer=None):
    """Output, input gradient and parameter gradients for a fixed output gradient, of a layer or a ``call`` of it."""
    layer = call if layer is None else layer
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = call(x)
    y.backward(image(*y.shape, seed=2, dtype=y.dtype, device=y.device))
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


def layer_arguments(layer, x, residual=False):
    """Of grouped_mamba_layer and grouped_mamba_layer_fwd, for a released or fused layer."""
    affinity, mamba = layer.affinity, layer.mamba
    fc = (affinity.fc1.weight, affinity.fc1.bias, affinity.fc2.weight, affinity.fc2.bias) if affinity else (None,) * 4
    norm, proj = (layer.norm.weight, layer.norm.bias), (layer.proj.weight, layer.proj.bias)
    parameters = LayerParameters(*norm, *fc, *mamba.core_parameters(), mamba.out_proj_weight, layer.skip_scale, *proj)
    codes, chunk = scan_path(Directions.of(layer.directions, None), mamba.inner_dim, mamba.d_state)
    mask = torch.tensor([1.0, 0.0], device=x.device) if residual and layer.variant == "released" else None
    options = LayerOptions(list(codes), layer.norm.eps, 1e-5, chunk, residual, mask, 1.0 if mask is None else 1.5)
    tokens = x.permute(0, 2, 3, 1).contiguous().detach().requires_grad_()
    return tokens, *parameters, *options


def check_training_op(op, inputs):
    """opcheck of an op that returns an image and buffers. Between the buffers' pieces are bytes that nothing writes or
    reads, so under AOT dispatch it is the image and all gradients that are compared."""
    torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def results(call):
        out = call(*inputs)
        gradients = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out))
        return [out.detach(), *gradients]

    expected = results(lambda *args: op(*args)[0])
    for dynamic in (False, True):
        torch._dynamo.reset()
        traced = torch.compile(lambda *args: op(*args)[0], backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for a, b in zip(results(traced), expected, strict=True):
            torch.testing.assert_close(a, b)


def stochastic_depth(function, parameters, x, dy, scale, dtype, device):
    """Of every second image: output, input and parameter gradients."""
    t = x.to(device, dtype).requires_grad_()
    dy = dy.to(device, dtype)
    drop_path = DropPathMask(torch.arange(1.0, len(x) + 1, device=device) % 2, scale)
    y = function(t, residual=True, drop_path=drop_path)
    dx, *gradients = torch.autograd.grad(y, [t, *parameters], dy)
    assert torch.equal(y[1::2], t[1::2]) and torch.equal(dx[1::2], dy[1::2])
    return [y.detach(), dx, *(g.clone() for g in gradients)]


def check_over_draws(dtype, draws):
    """Errors of fused results are at most twice those of composed ones, both as the root of the mean square over draws
    of inputs: the error of one gradient in one draw, a few roundings, may come out small by chance.

    Args:
        draws: for each draw by name (truth, fused, composed, terms); ``terms`` as `relative_error` takes it.
    """
    errors = {}
    for draw in draws:
        for name, (truth, fused, composed, terms) in draw.items():
            pair = relative_error(fused, truth, terms), relative_error(composed, truth, terms)
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        error, own = ((sum(e**2 for e in column) / len(pairs)) ** 0.5 for column in zip(*pairs, strict=True))
        assert error <= max(2 * own, FLOOR[dtype]), f"{name}: {error:.2e}, composed {own:.2e}"


DRAWS = 4


def check_stochastic_depth(monkeypatch, module, function, size, dtype, patches, batch=4):
    inputs = [[torch.randn(batch, *size, dtype=torch.float64) for _ in range(2)] for _ in range(DRAWS)]

    def results(dtype, device, scale=1.25):
        module.to(device, dtype)
        parameters = list(module.parameters())
        return [stochastic_depth(function, parameters, x, dy, scale, dtype, device) for x, dy in inputs]

    truth = results(torch.float64, "cpu")
    fused = results(dtype, "cuda")
    for place, name in patches:
        monkeypatch.setattr(place, name, lambda *_: False)
    composed = results(dtype, "cuda")

    def named(x, truth, fused, composed):
        # d(skip_scale) is one number, a sum over the image that cancels.
        chance = (composed[1].double().norm() * x.norm()).item()
        terms = [chance if expected.numel() == 1 else 0.0 for expected in truth]
        return dict(enumerate(zip(truth, fused, composed, terms, strict=True)))

    draws = zip(inputs, truth, fused, composed, strict=True)
    check_over_draws(dtype, [named(x, *three) for (x, _dy), *three in draws])
