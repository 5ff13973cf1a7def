# SPDX-License-Identifier: Apache-2.0
"""The CUDA ops of whole layers (`groupmamba_ext.ops`) against the same layers composed of the public ops."""

import copy
import functools

import pytest
import torch

import groupmamba_ext as ext
from groupmamba.layers import variants
from support.common import FLOOR, relative_error
from support.layers import (
    DRAWS,
    check_over_draws,
    check_stochastic_depth,
    check_training_op,
    image,
    layer_arguments,
    make,
    run,
)

pytestmark = pytest.mark.cuda

EIGHT = ("lr", "rl", "tb", "bt", "bt", "tb", "rl", "lr")


def three_ways(monkeypatch, dtype, dim, shape, seed, **options):
    """Fused and composed on CUDA, and in float64 on the CPU: output, input and parameter gradients by name."""
    layer = make(dim, seed=seed, **options)
    x = image(2, dim, *shape, seed=seed + 1)
    truth = run(layer.double(), x.double())
    layer.to("cuda", dtype)
    x = x.to("cuda", dtype).to(memory_format=torch.channels_last)
    with monkeypatch.context() as patch:
        calls = []
        native = variants.grouped_mamba_layer
        patch.setattr(variants, "grouped_mamba_layer", lambda *a, **k: calls.append(1) or native(*a, **k))
        fused = run(layer, x)
        assert calls, "the layer did not take its ops"
        patch.setattr(variants, "can_fuse", lambda *_: False)
        composed = run(layer, x)
        assert len(calls) == 1
    return fused, composed, truth


@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize(
    "dim, shape, options",
    [
        (64, (9, 14), {}),
        (128, (9, 14), {}),
        (44, (7, 5), {}),  # 11 channels a group, padded to 16
        (348, (14, 14), {}),  # 87, padded to 88
        (424, (3, 4), {}),  # 106, padded to 112
        (64, (8, 8), {"affinity": False}),
        (32, (6, 7), {"d_state": 3}),
        (32, (6, 7), {"expand": 2.0}),
        (36, (6, 7), {"expand": 1.5, "dt_rank": 5}),
        (64, (1, 1), {}),
        (64, (1, 40), {"directions": ("bt", "rl", "tb", "lr")}),
        (640, (3, 4), {"expand": 0.5}),  # tokens wider than the norms' registers
        (64, (9, 14), {"directions": ("bt",)}),
        (21, (7, 5), {"directions": ("tb",)}),  # pixels of an odd width
        (128, (9, 14), {"directions": ("tb", "rl")}),
        (27, (7, 5), {"directions": ("rl", "bt", "rl")}),  # 9 channels a group, padded to 16, of odd pixels
        (64, (9, 14), {"directions": EIGHT}),
        (352, (7, 7), {"directions": EIGHT}),  # 44, padded to 48
        (40, (6, 7), {"directions": EIGHT, "d_state": 3, "expand": 1.5}),
        (36, (5, 6), {"directions": ("lr", "bt") * 18}),  # 1, padded to 8
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_composed_layer(monkeypatch, dtype, dim, shape, options, variant):
    draws = []
    for seed in range(DRAWS):
        fused, composed, truth = three_ways(monkeypatch, dtype, dim, shape, seed, variant=variant, **options)
        # d(skip_scale) is one number, a sum over the image that cancels.
        chance = (composed["dx"].double().norm() * image(2, dim, *shape, seed=seed + 1).norm()).item()
        terms = {name: chance if expected.numel() == 1 else 0.0 for name, expected in truth.items()}
        draws.append({name: (truth[name], fused[name], composed[name], terms[name]) for name in truth})
    check_over_draws(dtype, draws)


@pytest.mark.parametrize("dim, directions", [(36, ("lr", "bt") * 18), (44, None)])
def test_gradients_overflow_no_earlier_than_composed_ones(monkeypatch, dim, directions):
    """Loss scales that float16 gradients bear: what the op stores in the pads of groups must not overflow first, since
    the zeros of a weight make NaN of it. The norm of one channel multiplies by 316, which its own gradient survives."""
    layer = make(dim, seed=2, directions=directions).to("cuda", torch.float16)
    x = image(2, dim, 5, 6, seed=3, device="cuda", dtype=torch.float16).requires_grad_()
    dy = image(2, dim, 5, 6, seed=2, device="cuda", dtype=torch.float16)

    def largest_scale():
        for power in range(-4, 14):
            gradients = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy * 2.0**power)
            if not all(g.isfinite().all() for g in gradients):
                return power - 1
        return 13

    fused = largest_scale()
    monkeypatch.setattr(variants, "can_fuse", lambda *_: False)
    assert fused >= largest_scale() - 1 >= 0


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "dim, directions",
    [*((dim, None) for dim in (64, 96, 128, 192, 348, 448)), *((dim, EIGHT) for dim in (64, 128, 352)), (64, ("tb",))],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_images_are_as_each_half_of_them(dtype, dim, directions, residual):
    """Many tokens have product kernels of their own, here of a number that fills no block; few go to cuBLAS. A wide
    group's convolution is by tensor cores for many images alone, in bfloat16, which rounds its weights: then both are
    compared with float64, as this layer makes 0.3% of such a rounding 3% of dx."""
    layer, x = make(dim, directions=directions).to("cuda"), image(132, dim, 9, 14, device="cuda", dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    dy = torch.randn_like(x)

    def results(x, dy, layer=layer):
        x = x.detach().requires_grad_()
        with torch.autocast("cuda", dtype, enabled=x.is_cuda):
            y = layer(x, residual=residual)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        dx, *gradients = torch.autograd.grad(y, (x, *parameters), dy)
        return {"y": y.detach(), "dx": dx}, dict(zip(names, gradients, strict=True))

    explained = ext.explain(results, x, dy)
    whole, whole_gradients = explained.result
    (first, first_gradients), (second, second_gradients) = map(results, x.split(66), dy.split(66))
    halves = {name: torch.cat([first[name], second[name]]) for name in whole}
    halves |= {f"d{name}": first_gradients[name] + second_gradients[name] for name in whole_gradients}
    whole |= {f"d{name}": gradient for name, gradient in whole_gradients.items()}
    truth = None
    if "depthwise_conv3x3 backward: tensor cores" in explained.notes:
        exact, gradients = results(x.double().cpu(), dy.double().cpu(), copy.deepcopy(layer).double().cpu())
        truth = exact | {f"d{name}": gradient for name, gradient in gradients.items()}
    for name, actual in whole.items():
        if actual.numel() == 1:  # a sum over the image that cancels
            continue
        if truth is None:
            error = relative_error(actual, halves[name])
            assert error <= 2 * FLOOR[dtype], f"{name}: {error:.2e}"
        else:
            error, own = (relative_error(t, truth[name]) for t in (actual, halves[name]))
            assert error <= max(2 * own, 2 * FLOOR[dtype]), f"{name}: {error:.2e}, halves {own:.2e}"


@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize(
    "dim, shape, options",
    [
        (64, (56, 56), {}),
        (348, (21, 40), {}),
        (1280, (30, 30), {"expand": 0.25}),
        (64, (56, 56), {"directions": EIGHT}),
        (64, (56, 56), {"directions": ("bt",)}),
        (87, (21, 40), {"directions": ("tb", "rl", "bt")}),
    ],
)
def test_planes_shared_in_memory_used_before(monkeypatch, variant, dim, shape, options):
    """At batch 1 a scan's blocks share planes and wait for what they send one another: where that lies, the layer's
    first kernel marks as absent what older work left there, all over (1,280 channels: by rows read from memory)."""
    layer = make(dim, variant=variant, **options).cuda()
    options = {"device": "cuda", "dtype": torch.float32, "memory_format": torch.channels_last}
    images = [image(1, dim, *shape, seed=seed, **options) for seed in (1, 2)]
    x, out, stream, graph = images[0].clone(), None, torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), torch.cuda.stream(stream):
        first = [layer(t) for t in images]  # where the other image's words lay, in eager calls as in a graph
        for _ in range(4):
            assert all(torch.equal(layer(t), f) for t, f in zip(images, first, strict=True))
        with torch.cuda.graph(graph, stream=stream):
            out = layer(x)
        for _ in range(4):
            for t, f in zip(images, first, strict=True):
                x.copy_(t)
                graph.replay()
                assert torch.equal(out, f)
        monkeypatch.setattr(variants, "can_fuse", lambda *_: False)
        assert all(relative_error(f, layer(t)) < 0.03 for t, f in zip(images, first, strict=True))


@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize(
    "dim, affinity, residual, directions",
    [
        (32, True, True, None),
        (44, True, False, None),
        (44, False, True, None),
        (21, True, True, ("tb",)),
        (72, True, True, EIGHT),
    ],
)
def test_opcheck(variant, dim, affinity, residual, directions):
    layer = make(dim, variant=variant, affinity=affinity, directions=directions).to("cuda")
    inputs = layer_arguments(layer, image(2, dim, 5, 6, device="cuda", dtype=torch.float32), residual)
    check_training_op(torch.ops.groupmamba.grouped_mamba_layer_fwd, inputs)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(torch.ops.groupmamba.grouped_mamba_layer, detached)
    with pytest.raises(RuntimeError, match="keeps nothing for a backward"):
        torch.ops.groupmamba.grouped_mamba_layer(*inputs).sum().backward()


@pytest.mark.parametrize(
    "dim, options",
    [
        (64, {}),
        (44, {}),
        (44, {"affinity": False}),
        (32, {"expand": 2.0}),
        (72, {"directions": EIGHT}),
        (27, {"directions": ("rl", "bt", "rl")}),
    ],
)
@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_equals_training(dtype, variant, dim, options):
    """The form that keeps nothing lets images take each other's places: same bits, and less memory."""
    layer = make(dim, variant=variant, **options).to("cuda", dtype)
    x = image(2, dim, 24, 33, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    results = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            y = layer(x, residual=True)
            results.append((y.detach().clone(), torch.cuda.max_memory_allocated() - before))
            del y
    (training, most), (inference, least) = results
    assert torch.equal(training, inference)
    assert least < most
    for p in layer.parameters():
        p.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize("dim", [64, 44, 348])
@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_x_plus_the_layer(dtype, variant, dim):
    layer = make(dim, variant=variant).to("cuda", dtype)
    x = image(2, dim, 6, 9, device="cuda", dtype=dtype)

    def ways(double=False):
        module, start = (layer.double(), x.double()) if double else (layer.to(dtype), x)
        for residual in (True, False):
            t = start.detach().requires_grad_()
            y = module(t, residual=residual)
            y = y if residual else t + y
            module.zero_grad()
            y.square().sum().backward()
            yield {"y": y.detach(), "dx": t.grad, "dbias": module.proj.bias.grad.clone()}

    (inside, outside), (truth, _) = ways(), ways(double=True)
    for name, expected in truth.items():
        own = relative_error(outside[name], expected)
        assert relative_error(inside[name], expected) <= max(2 * own, FLOOR[dtype]), name


def test_pixels_of_any_distance():
    """Slices of wider images, as inputs and as gradients, whose neighbours must not leak in."""
    layer = make(44).to("cuda")
    x = image(2, 44, 6, 5, device="cuda", dtype=torch.float32).permute(0, 2, 3, 1)
    dy = torch.randn_like(x)

    def gradients(x, dy):
        x = x.detach().permute(0, 3, 1, 2).requires_grad_()
        layer.zero_grad()
        y = layer(x, residual=True)
        y.backward(dy.permute(0, 3, 1, 2))
        return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]

    expected = gradients(x, dy)
    for width, first in ((48, 0), (48, 4), (64, 8), (45, 1)):
        wide = [torch.full((*x.shape[:3], width), 1e4, device="cuda") for _ in range(2)]
        for whole, part in zip(wide, (x, dy), strict=True):
            whole[..., first : first + 44] = part
        for a, b in zip(gradients(*(t[..., first : first + 44] for t in wide)), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [64, 44])  # without and with pads
def test_channels_last_parameters(dim):
    """`model.to(memory_format=torch.channels_last)` changes the strides of the convolution's weight, and no result."""
    layer = make(dim).to("cuda")
    x = image(2, dim, 6, 5, device="cuda", dtype=torch.float32)
    expected = run(layer, x)
    layer.to(memory_format=torch.channels_last)
    assert not layer.mamba.conv_weight.is_contiguous()
    for name, value in run(layer, x).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dim, shape, options", [
    (64, (9, 14), {}), (348, (7, 7), {}), (44, (7, 5), {"affinity": False}), (640, (3, 4), {"expand": 0.5}),
    (64, (9, 14), {"directions": EIGHT}), (21, (7, 5), {"directions": ("tb",)}),
])  # fmt: skip
@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_depth(monkeypatch, dtype, variant, dim, shape, options):
    layer = make(dim, variant=variant, **options)
    function = functools.partial(layer, tokens=True)
    check_stochastic_depth(monkeypatch, layer, function, (*shape, dim), dtype, [(variants, "can_fuse")])


def test_bitwise_repeatable():
    layer = make(348).to("cuda")
    x = image(3, 348, 7, 7, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        first, second = (run(layer, x) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dim", [64, 348])
@pytest.mark.parametrize("variant", ["released", "fused"])
def test_replays_in_a_graph(variant, dim):
    """Forward and backward, the block's feed-forward too: in a capture some kernels run beside the others."""
    pytest.importorskip("timm", reason="needs the extra 'models'")
    from groupmamba.models.blocks import GroupMambaBlock

    block = GroupMambaBlock(dim, 4.0, 0.0, variant=variant).to("cuda")
    leaves = list(block.parameters())
    x, static = (torch.zeros(3, 14, 14, dim, device="cuda") for _ in range(2))
    x.normal_(generator=torch.Generator("cuda").manual_seed(0))

    def step(t):
        with torch.autocast("cuda", torch.bfloat16):
            y = block(t)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        inference = block(x)
    expected = step(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph, inference_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static)
    with torch.cuda.graph(inference_graph), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        y = block(static)
    static.copy_(x)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        inference_graph.replay()
        assert torch.equal(y, inference)


def test_double_backward_raises():
    layer = make(32).to("cuda")
    x = image(1, 32, 4, 4, device="cuda", dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_wrong_parameters_are_named():
    layer = make(32).to("cuda")
    inputs = list(layer_arguments(layer, image(1, 32, 4, 4, device="cuda", dtype=torch.float32)))
    inputs[8] = inputs[8][..., :2]
    with pytest.raises(RuntimeError, match="conv_weight"):
        torch.ops.groupmamba.grouped_mamba_layer_fwd(*inputs)
