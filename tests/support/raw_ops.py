# SPDX-License-Identifier: Apache-2.0
"""Arguments of every compiled op, for tests that call `torch.ops.groupmamba` without the public functions."""

import torch

from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba_ext import _load
from groupmamba_ext.layouts import chunk_tokens, cross_chunk
from support.inputs import CROSS_ORDER, conv_inputs, cross_inputs, modulated_inputs, pool_inputs
from support.layers import image, layer_arguments, make
from support.scan import ORDER, inputs

CODES = [0, 1, 2, 3]
SCANS = ("grouped_selective_scan", "cross_selective_scan")
NORMS = ("layer_norm_pool", "modulated_layer_norm", "token_norm", "batch_norm_relu")
LAYERS = ("grouped_mamba_layer", "feed_forward")
PAIRS = (*SCANS, "depthwise_conv3x3", *NORMS, "narrow_conv", *LAYERS)
INFERENCE = ("batch_norm_fold", "pixels_to_channels", "narrow_conv_relu")
NAMES = (*(f"{name}_{way}" for name in PAIRS for way in ("fwd", "bwd")), *LAYERS, *INFERENCE)


def op(name):
    _load.load_ops()
    return getattr(torch.ops.groupmamba, name)


def detached(arguments):
    return [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]


def scan_arguments(device, dim=8):
    tensors = inputs(device, h=3, w=4, dim=dim)
    return [*(tensors[k] for k in ORDER), CODES, True, 1e-5, chunk_tokens(dim, tensors["A"].shape[-1], device)]


def cross_arguments(device, dim=8):
    tensors = cross_inputs(device, groups=2, h=3, w=4, dim=dim)
    return [*(tensors[k] for k in CROSS_ORDER), CODES, True, cross_chunk(dim, tensors["A"].shape[-1], device)]


def norm_arguments(device):
    t = modulated_inputs(device)
    return [t["o"], t["x"], t["scale"], t["gate"], t["weight"], t["bias"], 1e-5]


def batch_norm_arguments(device):
    t = pool_inputs(device, channels=16)
    return [t["x"], t["weight"], t["bias"], 1e-5]


def fold_arguments(device):
    norm = torch.rand(4, 8, device=device)
    return [torch.zeros(1, 4, 4, 3, device=device), torch.randn(8, 3, 3, 3, device=device), *norm, 1e-5, False]


def feed_forward_arguments(device, hidden=20):
    mlp, norm = ConvFeedForward(16, hidden).to(device), torch.nn.LayerNorm(16).to(device)
    parameters = (t for m in (norm, mlp.fc1, mlp.dwconv, mlp.fc2) for t in (m.weight, m.bias))
    mask = torch.tensor([0.0, 1.0], device=device)
    return detached([torch.randn(2, 3, 5, 16, device=device), *parameters, 1e-6, True, mask, 1.5])


def saved(name, forward, device, count):
    """What the forward returned behind its image; on the CPU, where it has no kernel, some tensors in its place."""
    return op(name)(*forward)[1:] if device == "cuda" else [torch.zeros(8) for _ in range(count)]


def arguments(name, device):
    """Of one op, for small inputs on ``device``; a backward's dy is 1."""
    kind, _, way = name.rpartition("_") if name.endswith(("_fwd", "_bwd")) else (name, "", "fwd")
    backward = way == "bwd"
    if kind in SCANS:
        made = scan_arguments(device) if kind.startswith("grouped") else cross_arguments(device)
        if not backward:
            return [*made, True]
        count = sum(not isinstance(a, (list, bool, float, int)) for a in made)
        states = op(f"{kind}_fwd")(*made, True)[1]
        return [torch.ones_like(made[0]), *made[:count], states, *made[count:]]
    if kind == "depthwise_conv3x3":
        t = conv_inputs(device, groups=2, channels=8)
        made = [t["x"], t["weight"], t["bias"], 1]
        return [torch.ones_like(t["x"]), *made] if backward else made
    if kind == "layer_norm_pool":
        t = pool_inputs(device)
        made = [t["x"], t["weight"], t["bias"], 1e-5]
        return [torch.ones_like(t["x"]), torch.ones(2, 64, device=device), *made] if backward else made
    if kind == "modulated_layer_norm":
        made = norm_arguments(device)
        return [torch.ones_like(made[1]), *made] if backward else made
    if kind == "token_norm":
        t = pool_inputs(device)
        made = [t["x"], t["bias"].clone(), t["weight"], t["bias"], 1e-5]
        return [torch.ones_like(t["x"]), *made] if backward else made
    if kind == "batch_norm_relu":
        *tensors, eps = batch_norm_arguments(device)
        if not backward:
            return [*tensors, eps]
        return [torch.ones_like(tensors[0]), *tensors, *saved(f"{kind}_fwd", [*tensors, eps], device, 1), eps]
    if kind == "batch_norm_fold":
        return fold_arguments(device)
    if kind.startswith("narrow_conv"):
        x, weight = (
            torch.ones(2, 3, 5, 32, device=device, dtype=torch.bfloat16),
            torch.ones(32, 32, 3, 3, device=device),
        )
        if backward:
            return [torch.ones_like(x), x, weight, 1, True, True]
        return [x, weight, *([weight[0, :, 0, 0].clone()] if kind.endswith("relu") else []), 1]
    if kind == "pixels_to_channels":
        return [torch.randn(2, 3, 5, 6, device=device), 7, False]
    if kind == "feed_forward":
        made, tensors, count = feed_forward_arguments(device), 9, 1
    else:
        layer = make(16, variant="released").to(device)
        x = image(2, 16, 3, 5, device=device, dtype=torch.float32)
        made, tensors, count = detached(layer_arguments(layer, x, residual=True)), 21, 2
    if not backward:
        return made
    kept = saved(f"{kind}_fwd", made, device, count)
    return [torch.ones_like(made[0]), *made[:tensors], *kept, *made[tensors:]]
