# SPDX-License-Identifier: Apache-2.0
"""The layer as two CUDA ops (`groupmamba_ext.layer_ops`) against the same layer composed of the public ops."""

import pytest
import torch

from common import FLOOR, relative_error
from groupmamba.layers import grouped_mamba
from groupmamba_ext import layer_ops
from groupmamba_ext.ops import DIRECTIONS, chunk_tokens
from layer_tools import image, make, run

pytestmark = pytest.mark.cuda


def three_ways(monkeypatch, dtype, dim, shape, **options):
    """Fused and composed on CUDA, and in float64 on the CPU: output, input and parameter gradients by name."""
    layer = make(dim, **options)
    x = image(2, dim, *shape)
    truth = run(layer.double(), x.double())
    layer.to("cuda", dtype)
    x = x.to("cuda", dtype).to(memory_format=torch.channels_last)
    with monkeypatch.context() as patch:
        calls = []
        native = grouped_mamba.grouped_mamba_layer
        patch.setattr(grouped_mamba, "grouped_mamba_layer", lambda *a, **k: calls.append(1) or native(*a, **k))
        fused = run(layer, x)
        assert calls, "the layer did not take its ops"
        patch.setattr(grouped_mamba, "can_fuse", lambda *_: False)
        composed = run(layer, x)
        assert len(calls) == 1
    return fused, composed, truth


@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize(
    "dim, shape, options",
    [
        (64, (9, 14), {}),
        (44, (7, 5), {}),  # 11 channels a group, padded to 16
        (348, (14, 14), {}),  # 87, padded to 88
        (424, (3, 4), {}),  # 106, padded to 112
        (64, (8, 8), {"affinity": False}),
        (32, (6, 7), {"d_state": 3}),
        (32, (6, 7), {"expand": 2.0}),
        (36, (6, 7), {"expand": 1.5, "dt_rank": 5}),
        (64, (1, 1), {}),
        (64, (1, 40), {"directions": ("bt", "rl", "tb", "lr")}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_composed_layer(monkeypatch, dtype, dim, shape, options, variant):
    fused, composed, truth = three_ways(monkeypatch, dtype, dim, shape, variant=variant, **options)
    for name, expected in truth.items():
        # d(skip_scale) is one number, a sum over the image that cancels.
        terms = (composed["dx"].double().norm() * image(2, dim, *shape).norm()).item() if expected.numel() == 1 else 0.0
        own = relative_error(composed[name], expected, terms)
        error = relative_error(fused[name], expected, terms)
        assert error <= max(2 * own, FLOOR[dtype]), f"{name}: {error:.2e}, composed {own:.2e}"


def arguments(layer, x):
    """Of grouped_mamba_fwd, for a released or fused layer."""
    affinity, mamba = layer.affinity, layer.mamba
    fc = (affinity.fc1.weight, affinity.fc1.bias, affinity.fc2.weight, affinity.fc2.bias) if affinity else (None,) * 4
    codes = [DIRECTIONS.index(d) for d in layer.directions]
    chunk = chunk_tokens(layer_ops._padded(mamba.inner_dim), "cuda")
    tokens = x.permute(0, 2, 3, 1).contiguous().detach().requires_grad_()
    scalars = (codes, layer.norm.eps, 1e-5, chunk, layer.variant == "fused", True)
    return (tokens, layer.norm.weight, layer.norm.bias, *fc, *mamba.core_parameters(), *scalars)


@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("dim, affinity", [(32, True), (44, True), (32, False)])
def test_opcheck(variant, dim, affinity):
    ops = torch.ops.groupmamba
    layer = make(dim, variant=variant, affinity=affinity).to("cuda")
    inputs = arguments(layer, image(2, dim, 5, 6, device="cuda", dtype=torch.float32))
    torch.library.opcheck(ops.grouped_mamba_fwd, inputs)
    y, xn, gate, *_ = ops.grouped_mamba_fwd(*inputs)
    y, xn, gate = (t.detach().requires_grad_() for t in (y, xn, gate))
    released = variant == "released"
    merge = (
        y, xn, gate if affinity and released else None, layer.mamba.out_proj_weight, layer.skip_scale,
        layer.norm.weight, layer.norm.bias, layer.proj.weight, layer.proj.bias, layer.norm.eps,
    )  # fmt: skip
    torch.library.opcheck(ops.grouped_merge_fwd, merge)


def test_bitwise_repeatable():
    layer = make(348).to("cuda")
    x = image(3, 348, 7, 7, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        first, second = (run(layer, x) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_replays_in_a_graph():
    layer = make(64).to("cuda")
    x = image(2, 64, 14, 14, device="cuda", dtype=torch.float32).to(memory_format=torch.channels_last)
    expected = layer(x).detach()
    static = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)


def test_double_backward_raises():
    layer = make(32).to("cuda")
    x = image(1, 32, 4, 4, device="cuda", dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_wrong_parameters_are_named():
    layer = make(32).to("cuda")
    inputs = list(arguments(layer, image(1, 32, 4, 4, device="cuda", dtype=torch.float32)))
    inputs[8] = inputs[8][..., :2]
    with pytest.raises(RuntimeError, match="conv_weight"):
        torch.ops.groupmamba.grouped_mamba_fwd(*inputs)
