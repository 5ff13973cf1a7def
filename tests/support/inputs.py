# SPDX-License-Identifier: Apache-2.0
"""Inputs of ops, for more than one file of tests."""

import torch

from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.token_norm import TokenNorm

CROSS_ORDER = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")
# batch, dim, hidden, height and width that one kernel takes on 9.0 in 16 bits: each of its three widths, tiles that end
# at the image's edges and beyond them, hidden channels that fill no block
ONE_KERNEL = [(16, 64, 512, (28, 31)), (100, 40, 72, (13, 12)), (16, 128, 264, (21, 27)), (48, 192, 200, (13, 14))]
# The same where the backward alone is one kernel.
ONE_BACKWARD = [(40, 64, 256, (9, 14)), (40, 24, 200, (5, 13)), (70, 40, 128, (6, 25)), (132, 8, 64, (1, 12))]


def conv_inputs(device, dtype=torch.float32, *, batch=2, h=5, w=7, groups=None, channels=16, param=None, bias=True):
    param = dtype if param is None else param
    image = (batch, h, w, channels) if groups is None else (batch, h, w, groups, channels)
    owner = image[3:]
    return {
        "x": torch.randn(image, dtype=torch.float64).to(device, dtype),
        "weight": (torch.randn(*owner, 3, 3, dtype=torch.float64) / 3).to(device, param),
        "bias": torch.randn(owner, dtype=torch.float64).to(device, param) if bias else None,
    }


def pool_inputs(device, dtype=torch.float32, *, batch=2, h=5, w=7, channels=64, param=None):
    param = dtype if param is None else param
    return {
        "x": (1 + 2 * torch.randn(batch, h, w, channels, dtype=torch.float64)).to(device, dtype),
        "weight": (1 + 0.2 * torch.randn(channels, dtype=torch.float64)).to(device, param),
        "bias": (0.2 * torch.randn(channels, dtype=torch.float64)).to(device, param),
    }


def modulated_inputs(device, dtype=torch.float32, *, batch=2, h=5, w=7, groups=4, dim=16, param=None, gate=True):
    param = dtype if param is None else param
    channels = groups * dim
    tensors = pool_inputs(device, dtype, batch=batch, h=h, w=w, channels=channels, param=param)
    return {
        "o": torch.randn(batch, h, w, groups, dim, dtype=torch.float64).to(device, dtype),
        "x": tensors["x"],
        "scale": torch.tensor([1.3], dtype=torch.float64).to(device, param),
        "weight": tensors["weight"],
        "bias": tensors["bias"],
        "gate": torch.rand(batch, channels, dtype=torch.float64).to(device, param) if gate else None,
    }


def both(out):
    """One tensor of both results, so that both gradients flow."""
    xn, pooled = out
    return torch.cat([xn.flatten(), pooled.to(xn.dtype).flatten()])


def cross_inputs(device, dtype=torch.float32, *, batch=2, h=5, w=7, groups=None, count=4, dim=16, n=1, rank=1, drop=()):
    """``groups`` None: u without a dimension for them. ``count``: directions."""
    outer = () if groups is None else (groups,)
    param = torch.float64 if dtype == torch.float64 else torch.float32

    def image(*last):
        return torch.randn(batch, h, w, *outer, *last, dtype=torch.float64).to(device, dtype)

    def parameter(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(*outer, count, *shape, dtype=torch.float64)).to(device, param)

    tensors = {
        "u": image(dim),
        "dt": image(count, dim if rank is None else rank),
        "A": -(0.2 + torch.rand(*outer, count, dim, n, dtype=torch.float64) * 2).to(device, param),
        "B": image(count, n),
        "C": image(count, n),
        "D": parameter(dim, mean=1.0, scale=0.2),
        "dt_weight": None if rank is None else parameter(dim, rank, scale=rank**-0.5),
        "dt_bias": parameter(dim, mean=-2.0),
    }
    return {k: None if k in drop else v for k, v in tensors.items()}


def batch_norm_inputs(batch=2, channels=32, h=5, w=7, dtype=torch.float32, device="cuda", param=None, mean=1.0):
    x = mean + 2 * torch.randn(batch, channels, h, w, dtype=torch.float64)
    param = param or dtype
    return {
        "x": x.to(device, dtype).to(memory_format=torch.channels_last),
        "weight": (1 + 0.2 * torch.randn(channels, dtype=torch.float64)).to(device, param),
        "bias": (0.2 * torch.randn(channels, dtype=torch.float64)).to(device, param),
    }


def convolution(out, channels, taps, dtype, param, memory_format):
    """An image's dtype as an empty image, a convolution's weight and a norm's tensors, on CUDA."""
    weight = torch.randn(out, channels, taps, taps, dtype=torch.float64)
    norm = [1 + 0.2 * torch.randn(out), torch.randn(out), torch.randn(out), torch.rand(out) + 0.1]
    image = torch.zeros(1, channels, 2, 2, device="cuda", dtype=dtype)
    weight = weight.to("cuda", param).to(memory_format=memory_format)
    return image, weight, [t.to("cuda", param) for t in norm]


def feed_forward(dim, hidden):
    torch.manual_seed(0)
    network, norm = ConvFeedForward(dim, hidden), TokenNorm(dim, eps=1e-6)
    with torch.no_grad():
        for p in (*network.parameters(), *norm.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    return torch.nn.ModuleDict({"mlp": network, "norm": norm})
