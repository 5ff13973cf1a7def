# SPDX-License-Identifier: Apache-2.0
"""Results on CUDA do not depend on what lay in memory before: no kernel reads a byte that nothing wrote, and no pad is
multiplied by zero without having been written. Each case runs once, then in memory full of NaN: the same bits."""

import functools

import pytest
import torch

import groupmamba_ext as ext
from groupmamba.layers.drop_path import DropPathMask
from groupmamba_ext.ops.batch_norm_relu import batch_norm_relu
from groupmamba_ext.ops.narrow_conv import narrow_conv, narrow_conv_relu
from support.common import group_major, padded_channels, skip_without_sm90a
from support.common import run as run_op
from support.inputs import both, conv_inputs, cross_inputs, feed_forward, modulated_inputs, pool_inputs
from support.layers import image, make, run
from support.scan import IMAGES, MIXED
from support.scan import inputs as scan_inputs

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EIGHT = ("lr", "rl", "tb", "bt") * 2


def fill_free_memory_with_nan():
    """All that the caching allocator has free, and 320 MB more. The word is a NaN in each float dtype, and not the one
    by which blocks of a scan know that a state has not come yet."""

    def full(size):
        return torch.full((size // 4,), 0x7FC07FC0, dtype=torch.int32, device="cuda")

    held = [full(512)]
    if torch.cuda.memory_reserved() == 0:
        pytest.skip("torch's caching allocator is off")
    torch.cuda.empty_cache()
    # What is free between tensors that are in use: pieces of every size, as long as they need no new memory. Up to
    # 1 MB is one pool of the allocator, and more another.
    large, small = (2**k for k in range(25, 20, -1)), (2**k for k in range(20, 8, -1))
    for size in (*large, 2**20 + 512, *small):
        while True:
            reserved, piece = torch.cuda.memory_reserved(), full(size)
            if torch.cuda.memory_reserved() > reserved:
                break
            held.append(piece)
        del piece
        torch.cuda.empty_cache()
    held += [full(2**20) for _ in range(64)] + [full(2**26) for _ in range(4)]


def check(call):
    """``call`` returns tensors by name, of the same bits each time."""
    expected = call()
    fill_free_memory_with_nan()
    actual = call()
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), f"{name} is not finite"
        assert torch.equal(actual[name], tensor), f"{name} depends on what memory held before"


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_full_of_nan(dtype):
    used = [torch.zeros(n, device="cuda") for n in (1, 300, 5000, 2**19, 2**21)]
    del used[1::2]  # leaves gaps between tensors in use
    fill_free_memory_with_nan()
    counts = (1, 100, 129, 5000, 2**19, 3 * 2**20, 2**24)
    tensors = [torch.empty(count, dtype=dtype, device="cuda") for count in counts]  # before anything is written again
    assert [count for count, t in zip(counts, tensors, strict=True) if not t.isnan().all()] == []


@pytest.mark.parametrize(
    "dim, shape, options",
    [
        (64, (9, 14), {}),
        (64, (56, 56), {}),
        (348, (6, 7), {}),  # 87 channels a group, padded to 88
        (44, (7, 5), {"affinity": False}),  # 11, padded to 16
        (44, (7, 5), {"d_state": 3}),
        (36, (6, 7), {"expand": 1.5, "dt_rank": 5}),
        (21, (7, 5), {"directions": ("tb",)}),  # pixels of an odd width
        (36, (5, 6), {"directions": ("lr", "bt") * 18}),  # 1, padded to 8
        (40, (6, 7), {"directions": EIGHT, "d_state": 3, "expand": 1.5}),
        (640, (3, 4), {"expand": 0.5}),  # tokens wider than the norms' registers
    ],
)
@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(dtype, variant, dim, shape, options):
    layer = make(dim, variant=variant, **options).to("cuda", dtype)
    x = image(2, dim, *shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    ways = [{}, {"residual": True}]
    if variant == "released":
        ways.append({"residual": True, "drop_path": DropPathMask(torch.tensor([0.0, 1.0], device="cuda"), 1.5)})
    for way in ways:
        check(lambda way=way: run(functools.partial(layer, **way), x, layer))

        @torch.no_grad()
        def inference(way=way):
            return {"y": layer(x, **way)}

        check(inference)


@pytest.mark.parametrize(
    "batch, dim, hidden, shape", [(2, 44, 20, (3, 5)), (2, 348, 1392, (7, 7)), (100, 40, 72, (13, 12))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward(dtype, batch, dim, hidden, shape):
    modules = feed_forward(dim, hidden).to("cuda", dtype)
    x = image(batch, *shape, dim, device="cuda", dtype=dtype)
    mask = DropPathMask(torch.arange(batch, device="cuda") % 2.0, 1.5)
    for way in ({}, {"residual": True}, {"residual": True, "drop_path": mask}):
        check(lambda way=way: run(lambda t: modules["mlp"](t, modules["norm"], **way), x, modules))


def check_op(function, tensors, *, probe=None, **options):
    out = function(**tensors, **options)
    grad = torch.randn_like(out if probe is None else probe(out))
    check(lambda: {k: v.detach() for k, v in run_op(function, tensors, options, grad, probe).items()})


@pytest.mark.parametrize("layout", [None, group_major, padded_channels])
@pytest.mark.parametrize(
    "dim, rank, states, h, w",
    [
        (3, 1, 1, 5, 7),
        (13, 1, 1, 9, 11),
        (16, 1, 1, 56, 56),
        (87, 6, 1, 14, 14),
        (87, 6, 2, 7, 9),
        (16, None, 1, 9, 11),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scan(dtype, dim, rank, states, h, w, layout):
    tensors = scan_inputs("cuda", dtype, batch=1, h=h, w=w, dim=dim, n=states, rank=rank)
    if layout is not None:
        tensors = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    check_op(ext.grouped_selective_scan, tensors, directions=MIXED, norm_eps=0.1)


@pytest.mark.parametrize("dim, rank, states, h, w", [(3, 1, 1, 5, 7), (40, 2, 3, 9, 11), (132, 3, 1, 6, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_scan(dtype, dim, rank, states, h, w):
    check_op(ext.cross_selective_scan, cross_inputs("cuda", dtype, h=h, w=w, dim=dim, n=states, rank=rank))


@pytest.mark.parametrize("channels", [1, 16, 87])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv(dtype, channels):
    check_op(ext.depthwise_conv3x3, conv_inputs("cuda", dtype, groups=3, channels=channels), activation="silu")


@pytest.mark.parametrize("batch, h, w, groups, channels", [(140, 5, 14, None, 64), (36, 7, 50, 4, 16)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_of_many_images(dtype, activation, batch, h, w, groups, channels):
    """In 16 bits by tensor cores, of images that TMA loads and stores."""
    tensors = conv_inputs("cuda", dtype, batch=batch, h=h, w=w, groups=groups, channels=channels)
    check_op(ext.depthwise_conv3x3, tensors, activation=activation)


@pytest.mark.parametrize("groups, dim", [(1, 5), (36, 1), (4, 87), (4, 513)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, groups, dim):
    check_op(ext.layer_norm_pool, pool_inputs("cuda", dtype, channels=groups * dim), probe=both)
    check_op(ext.modulated_layer_norm, modulated_inputs("cuda", dtype, groups=groups, dim=dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm(dtype):
    x = image(2, 32, 19, 21, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias = image(2, 32, device="cuda", dtype=dtype).unbind()
    tensors = {"x": x, "weight": weight, "bias": bias}
    check_op(lambda **t: batch_norm_relu(**t, eps=1e-5)[0], tensors)


@pytest.mark.parametrize("channels, taps, padding", [(32, 3, 1), (16, 4, 0)])
def test_narrow_conv(channels, taps, padding):
    skip_without_sm90a()
    x = image(2, channels, 19, 21, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = image(32, channels, taps, taps, device="cuda", dtype=torch.bfloat16)
    tensors = {"weight": weight} if channels == 16 else {"x": x, "weight": weight}
    check_op(lambda x=x, **t: narrow_conv(x, **t, padding=padding), tensors)
    check(lambda: {"y": narrow_conv_relu(x, weight, weight[:, 0, 0, 0], padding)})
