# SPDX-License-Identifier: Apache-2.0
"""Cases of every public op for the tests of derivatives, transforms and traces, and a small model."""

import pytest
import torch

import groupmamba_ext as ext
from groupmamba_ext.layouts import chunk_tokens, cross_chunk
from support.scan import ORDER, inputs

MIXED = ("lr", "rl", "tb", "bt")
CROSS = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")


def _normal(device, dtype):
    return lambda *shape: torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def _scan(device, dtype):
    return inputs(device, dtype, h=3, w=4, dim=8), {"directions": MIXED}


def _cross(device, dtype):
    tensors = {k: v for k, v in inputs(device, dtype, h=3, w=4, dim=8).items() if k in CROSS}
    return {**tensors, "u": tensors["u"][..., 0, :].contiguous()}, {"directions": MIXED}


def _conv(device, dtype):
    r = _normal(device, dtype)
    return {"x": r(2, 4, 5, 8), "weight": r(8, 3, 3), "bias": r(8)}, {"activation": "silu"}


def _pool(device, dtype):
    r = _normal(device, dtype)
    return {"x": r(2, 3, 4, 8), "weight": r(8), "bias": r(8)}, {}


def _modulated(device, dtype):
    r = _normal(device, dtype)
    x = {"o": r(2, 3, 4, 8), "x": r(2, 3, 4, 8), "scale": r(1), "weight": r(8), "bias": r(8), "gate": r(2, 8)}
    return x, {}


CASES = {
    "grouped_selective_scan": _scan,
    "cross_selective_scan": _cross,
    "depthwise_conv3x3": _conv,
    "layer_norm_pool": _pool,
    "modulated_layer_norm": _modulated,
}


def case(op, device, dtype=torch.float32):
    """The public function, its reference, tensors by name, and options; the tensors go in by position."""
    tensors, options = CASES[op](device, dtype)
    names = list(tensors)

    def by_position(f):
        return lambda *args, **options: f(**dict(zip(names, args, strict=True)), **options)

    return by_position(getattr(ext, op)), by_position(getattr(ext.reference, op)), tensors, options


def loss_of(function, options):
    """A number of all results, with a different weight for each element."""

    def loss(*tensors):
        results = function(*tensors, **options)
        results = (results,) if isinstance(results, torch.Tensor) else results
        weights = (torch.linspace(-1, 1, r.numel(), dtype=r.dtype, device=r.device).view(r.shape) for r in results)
        return sum((w * r * (1 + r)).sum() for w, r in zip(weights, results, strict=True))

    return loss


def _raw_scan(*tensors, directions):
    chunk = chunk_tokens(tensors[0].shape[-1], tensors[ORDER.index("A")].shape[-1], tensors[0].device.type)
    return torch.ops.groupmamba.grouped_selective_scan_fwd(*tensors, [0, 1, 2, 3], True, 1e-5, chunk, True)[0]


def _raw_cross(u, dt, A, B, C, D, dt_weight, dt_bias, *, directions):
    chunk = cross_chunk(u.shape[-1], A.shape[-1], u.device.type)
    images = [t.unsqueeze(3) for t in (u, dt)]
    B, C = B.unsqueeze(3), C.unsqueeze(3)
    A, D, dt_weight, dt_bias = (t.unsqueeze(0) for t in (A, D, dt_weight, dt_bias))
    op = torch.ops.groupmamba.cross_selective_scan_fwd
    return op(*images, A, B, C, D, dt_weight, dt_bias, [0, 1, 2, 3], True, chunk, True)[0].squeeze(3)


def _raw_conv(x, weight, bias, *, activation):
    op = torch.ops.groupmamba.depthwise_conv3x3_fwd
    return op(x.unsqueeze(3), weight.unsqueeze(0), bias.unsqueeze(0), 1).squeeze(3)


def _raw_pool(x, weight, bias):
    return torch.ops.groupmamba.layer_norm_pool_fwd(x, weight, bias, 1e-5)


def _raw_modulated(o, x, scale, weight, bias, gate):
    return torch.ops.groupmamba.modulated_layer_norm_fwd(o.unsqueeze(3), x, scale, gate, weight, bias, 1e-5)


RAW = {
    "grouped_selective_scan": _raw_scan,
    "cross_selective_scan": _raw_cross,
    "depthwise_conv3x3": _raw_conv,
    "layer_norm_pool": _raw_pool,
    "modulated_layer_norm": _raw_modulated,
}
assert tuple(inputs("cpu")) == ORDER  # as the raw op takes them


def stacked(t, count, dim):
    """``count`` different samples like ``t`` along a new dimension."""
    return torch.stack([t * (1 + i / 7) for i in range(count)], dim)


def leaves_equal(actual, expected, tolerance=1e-6):
    """The tensors of two nested results agree, by the norm of each; below 1 it may be of terms that cancel."""
    actual, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"result {i}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        assert torch.isfinite(a).all()
        error, size = (a - b).norm().item(), b.norm().item()
        assert error <= tolerance * max(size, 1.0), f"result {i}: off by {error:.2e} of {size:.2e}"


def small(**options):
    """A quick model, in evaluation mode; skips a test where timm is missing, not its file."""
    pytest.importorskip("timm", reason="needs the extra 'models'")
    from support import models as model_tools

    return model_tools.small(**options)
