# SPDX-License-Identifier: Apache-2.0
"""Every op, the layer and the feed-forward network in shapes of many tokens, where work is split; all their results."""

import torch

import groupmamba_ext as ext
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.token_norm import TokenNorm
from support.inputs import conv_inputs, cross_inputs, modulated_inputs, pool_inputs
from support.layers import make
from support.scan import inputs as scan_inputs

BATCH = 4
PER_IMAGE = ("u", "dt", "B", "C", "z", "gate", "x", "o")  # have a batch dimension
SIZE = {"batch": BATCH, "h": 17, "w": 23}
OPS = (
    "grouped scan", "grouped scan, odd", "grouped scan, wide", "cross scan", "convolution", "convolution, many images",
    "norm and mean", "modulated norm",
)  # fmt: skip
MODULES = ("released layer", "fused layer", "paper layer", "feed-forward")


class FeedForward(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.mlp = TokenNorm(dim, eps=1e-6), ConvFeedForward(dim, 2 * dim)

    def forward(self, x):
        return self.mlp(x.permute(0, 2, 3, 1), self.norm, residual=True)


def make_case(name, device, dtype, size=None):
    """A function of a dictionary of tensors, and the dictionary."""
    size = size or SIZE
    torch.manual_seed(0)

    def op(function, tensors, **options):
        return lambda t: function(**t, **options), tensors

    def module(dim, net):
        net = net.to(device, dtype)
        x = torch.randn(size["batch"], dim, size["h"], size["w"]).to(device, dtype)
        return lambda t: net(t["x"]), {"x": x, **dict(net.named_parameters())}

    scan, directions = ext.grouped_selective_scan, ("rl", "tb")
    if name == "grouped scan":
        return op(scan, scan_inputs(device, dtype, dim=16, **size))
    if name == "grouped scan, odd":
        return op(scan, scan_inputs(device, dtype, dim=21, n=3, rank=2, **size))
    if name == "grouped scan, wide":
        return op(scan, scan_inputs(device, dtype, dim=140, groups=2, **size), directions=directions)
    if name == "cross scan":
        return op(ext.cross_selective_scan, cross_inputs(device, dtype, dim=21, **size))
    if name == "convolution":
        return op(ext.depthwise_conv3x3, conv_inputs(device, dtype, channels=37, **size), activation="gelu")
    if name == "convolution, many images":  # by tensor cores, where there are any
        tensors = conv_inputs(device, dtype, batch=140, h=5, w=14, channels=64)
        return op(ext.depthwise_conv3x3, tensors, activation="gelu")
    if name == "norm and mean":
        return op(ext.layer_norm_pool, pool_inputs(device, dtype, channels=87, **size))
    if name == "modulated norm":
        return op(ext.modulated_layer_norm, modulated_inputs(device, dtype, dim=21, **size))
    if name == "feed-forward":
        return module(64, FeedForward(64))
    dim, variant = {"released layer": (64, "released"), "fused layer": (44, "fused"), "paper layer": (32, "paper")}[
        name
    ]
    return module(dim, make(dim, variant=variant))


def results(case):
    """Outputs and gradients, by name."""
    function, tensors = case
    leaves = {n: t if isinstance(t, torch.nn.Parameter) else None if t is None else t.detach().requires_grad_()
              for n, t in tensors.items()}  # fmt: skip
    out = function(leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    given = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).sin().to(o.dtype) for o in outputs]
    asked = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(outputs, list(asked.values()), given)
    return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | dict(zip(asked, grads, strict=True))


def same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
