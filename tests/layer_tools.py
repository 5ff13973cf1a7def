# SPDX-License-Identifier: Apache-2.0
"""What the tests of the layers share."""

import torch

from groupmamba import GroupedMamba2d

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
