# SPDX-License-Identifier: Apache-2.0
"""A step feature of -inf makes a step of softplus(-inf) = 0: the token leaves the state as it is. Nothing of that may
reach another token or channel, whatever the widths that kernels pad groups to.

d(dt_weight) is left out: it is the sum of 0 times -inf over such tokens, NaN in the reference as well.
"""

import pytest
import torch

import groupmamba_ext as ext
from groupmamba.layers import variants
from support.common import check, relative_error
from support.inputs import cross_inputs
from support.layers import make
from support.scan import MIXED, inputs

COMMON = {"h": 6, "w": 9}
SHAPES = [  # channels of a group, rank, states
    (1, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 3), (13, 1, 1), (16, 1, 1), (17, 3, 2), (31, 2, 1), (87, 6, 1), (88, 6, 1),
    (106, 7, 1), (5, 65, 1), (17, 70, 2), (131, 2, 1), (131, 3, 2),
]  # fmt: skip
DROPS = [(), ("z",), ("norm_weight", "norm_bias", "z", "gate"), ("dt_bias", "D", "norm_bias")]


def mask(tensors):
    """Masks the first token, the last one and two more; returns the function that adds the step's weight, which must
    be positive, and is exact in every dtype."""
    weight = tensors.pop("dt_weight")
    weight = torch.randint(1, 9, weight.shape) / (4.0 * weight.shape[-1])
    weight = (weight * 64).round().clamp(min=1) / 64
    for row, column in ((0, 0), (2, 3), (3, 0), (-1, -1)):
        tensors["dt"][:, row, column] = -torch.inf
    return lambda function: lambda **t: function(**t, dt_weight=weight.to(t["u"]))


def compare(function, reference, tensors, options):
    with_weight = mask(tensors)
    return check(with_weight(function), with_weight(reference), tensors, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim, rank, n", SHAPES)
def test_grouped_scan(device, dtype, dim, rank, n):
    tensors = inputs(device, dtype, dim=dim, rank=rank, n=n, **COMMON)
    options = {"directions": MIXED, "norm_eps": 0.1 if dim <= 5 else 1e-5}
    compare(ext.grouped_selective_scan, ext.reference.grouped_selective_scan, tensors, options)


@pytest.mark.parametrize("drop", DROPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_scan_without_some_factors(device, dtype, drop):
    tensors = inputs(device, dtype, dim=13, rank=2, drop=drop, **COMMON)
    options = {"directions": MIXED}
    compare(ext.grouped_selective_scan, ext.reference.grouped_selective_scan, tensors, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim, rank, n", [(5, 1, 1), (13, 2, 3), (33, 3, 1), (131, 2, 1)])
def test_cross_scan(device, dtype, dim, rank, n):
    tensors = cross_inputs(device, dtype, dim=dim, rank=rank, n=n, **COMMON)
    compare(ext.cross_selective_scan, ext.reference.cross_selective_scan, tensors, {"directions": MIXED})


def test_a_masked_token_leaves_the_state_as_it_is(device):
    """The tokens of a row without a masked one are scanned as if it were not there."""
    tensors = inputs(device, groups=1, dim=5, h=1, w=8)
    tensors["dt_weight"] = tensors["dt_weight"].abs() + 0.1
    others = [0, 1, 2, 4, 5, 6, 7]
    short = {k: v[:, :, others] if k in ("u", "dt", "B", "C", "z") else v for k, v in tensors.items()}
    tensors["dt"][:, :, 3] = -torch.inf
    whole = ext.grouped_selective_scan(**tensors, directions=("lr",))
    expected = ext.grouped_selective_scan(**short, directions=("lr",))
    assert whole.isfinite().all()
    assert relative_error(whole[:, :, others], expected) < 1e-6


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("dim", [44, 64, 348])  # 11, 16 and 87 channels a group: with pads, without, with pads
def test_layer(monkeypatch, variant, dim):
    """Step features that float16 turns into -inf, in the layer's one op as in the ops one by one."""
    layer = make(dim, variant=variant).cuda().half()
    rank = layer.mamba.dt_rank
    with torch.no_grad():
        layer.mamba.conv_weight.zero_()
        layer.mamba.conv_bias.fill_(4)  # u is positive
        layer.mamba.x_proj_weight[:, :rank] = -6e4
        layer.mamba.dt_weight.abs_().add_(0.1)
    x = torch.randn(2, dim, 6, 9, device="cuda").half().requires_grad_()

    def results():
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, [x, layer.mamba.D, layer.mamba.A_log], torch.ones_like(y))

    fused = results()
    monkeypatch.setattr(variants, "can_fuse", lambda *_: False)
    for a, b in zip(fused, results(), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05 * b.float().abs().max().item() + 1e-3)
