# SPDX-License-Identifier: Apache-2.0
"""grouped_selective_scan on sm_90 where blocks share planes: at batch 1 or 2 they do, given several tiles,
and where the groups of a token interleave and have 16 channels.

Tiles of a plane along rows and columns, forward / backward, stand behind the shapes; a segment has 32.
"""

import pytest
import torch

import groupmamba_ext as ext
from support.common import group_major, relative_error
from support.scan import IMAGES, MIXED, compare, inputs

pytestmark = pytest.mark.cuda

COLUMNS_FIRST = ("tb", "bt", "lr", "rl")
MANY = 128  # images whose 512 planes, group-major, have a block each
SHAPES = [  # dim, rank, batch, h, w: tiles of a plane along rows, along columns (of the forward / of the backward)
    (16, 1, 2, 56, 56),    # whole columns: 7 / 14, 7 / 14
    (16, 1, 1, 60, 50),    # ragged ones, and a last tile that is not full: 7 / 14, 9 / 17
    (16, 1, 2, 500, 5),    # runs of 56 rows: 6 / 12, 6 / 12
    (16, 1, 1, 120, 130),  # of 28: 35 / 70, 41 / 82
    (24, 2, 2, 29, 131),   # 34, 44
    (32, 2, 2, 20, 12),    # 3, 3
    (32, 2, 1, 300, 10),   # runs of 28: 27, 28
    (64, 6, 1, 60, 40),    # runs of 7: 43, 45
    (88, 6, 2, 14, 14),    # 7, 7
    (88, 6, 1, 100, 10),   # runs that are tiles: 36, 40
    (87, 6, 1, 33, 20),    # padded to 88: 24, 40
    (112, 7, 2, 7, 7),     # 2, 2: fewer tiles of a group than blocks
    (112, 7, 1, 45, 42),   # 68, 84
    (128, 14, 1, 1, 930),  # 34, 233: a path that turns only one way
]  # fmt: skip


def value_and_gradients(tensors: dict, grad: torch.Tensor, directions=MIXED, names=None) -> list[torch.Tensor]:
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    y = ext.grouped_selective_scan(**leaves, directions=directions)
    return [y.detach(), *torch.autograd.grad(y, [leaves[k] for k in names or leaves], grad)]


@pytest.mark.parametrize("layout", [None, group_major], ids=["token-major", "group-major"])
@pytest.mark.parametrize("directions", [MIXED, COLUMNS_FIRST], ids=["rows-first", "columns-first"])
@pytest.mark.parametrize("dim, rank, batch, h, w", SHAPES)
def test_values_and_gradients(dim, rank, batch, h, w, directions, layout):
    tensors = inputs("cuda", torch.bfloat16, batch=batch, h=h, w=w, dim=dim, rank=rank)
    if layout is not None:
        tensors = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    compare(tensors, directions=directions)


@pytest.mark.parametrize("dim, rank, h, w", [(16, 1, 60, 50), (112, 7, 45, 42), (16, 1, 170, 171)])
@pytest.mark.parametrize("groups", [1, 3, 7])
def test_groups_and_float16(dim, rank, h, w, groups):
    compare(inputs("cuda", torch.float16, batch=1, h=h, w=w, dim=dim, rank=rank, groups=groups), (MIXED * 2)[:groups])


@pytest.mark.parametrize("dim, rank, batch, h, w", [*SHAPES, (16, 1, 1, 170, 171)])
def test_as_if_a_block_had_the_plane(dim, rank, batch, h, w):
    """What enters a tile is computed in one order whoever does it: image by image, the bits are those of a large batch.
    Only sums over an image, the gate's gradient, depend on who adds."""
    few = inputs("cuda", torch.bfloat16, batch=batch, h=h, w=w, dim=dim, rank=rank)
    per_image = (*IMAGES, "gate")
    many = {k: torch.cat([v] * (MANY // batch)) if k in per_image else v for k, v in few.items()}
    many = {k: group_major(v) if k in IMAGES else v for k, v in many.items()}
    grad = torch.randn_like(few["u"])
    expected = value_and_gradients(many, torch.cat([grad] * (MANY // batch)), names=per_image)
    actual = value_and_gradients(few, grad, names=per_image)
    for name, a, b in zip(("y", *per_image), actual, expected, strict=True):
        if name == "gate":
            assert relative_error(a, b[:batch]) < 1e-5
        else:
            assert torch.equal(a, b[:batch]) and torch.equal(a, b[-batch:]), name
    with torch.no_grad():
        assert torch.equal(ext.grouped_selective_scan(**few), actual[0])  # saves no states


@pytest.mark.parametrize("dim, rank, batch, h, w", [(16, 1, MANY, 56, 56), (16, 1, 66, 60, 50), (16, 1, 66, 112, 28)])
def test_groups_that_interleave(dim, rank, batch, h, w):
    """Planes are shared then, by teams whose number need not divide the batch: to the bit as group-major, where 66
    images have a block for each plane on 132 multiprocessors."""
    tensors = inputs("cuda", torch.bfloat16, batch=batch, h=h, w=w, dim=dim, rank=rank)
    apart = {k: group_major(v) if k in IMAGES else v for k, v in tensors.items()}
    grad = torch.randn_like(tensors["u"])
    actual = value_and_gradients(tensors, grad, names=IMAGES)
    expected = value_and_gradients(apart, grad, names=IMAGES)
    for name, a, b in zip(("y", *IMAGES), actual, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dim, rank, batch, h, w", SHAPES)
def test_bitwise_repeatable(dim, rank, batch, h, w):
    tensors = inputs("cuda", torch.bfloat16, batch=batch, h=h, w=w, dim=dim, rank=rank)
    grad = torch.randn_like(tensors["u"])
    first = value_and_gradients(tensors, grad)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, value_and_gradients(tensors, grad), strict=True))


@pytest.mark.parametrize("dim, rank, h, w", [(16, 1, 60, 50), (112, 7, 45, 42), (16, 1, 170, 171)])
def test_graph_replays(dim, rank, h, w):
    """A replay starts from words that are absent again, whatever the one before has left."""
    tensors = inputs("cuda", torch.bfloat16, batch=1, h=h, w=w, dim=dim, rank=rank)
    with torch.no_grad():
        ext.grouped_selective_scan(**tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ext.grouped_selective_scan(**tensors)
        for _ in range(3):
            for name in IMAGES:
                tensors[name].copy_(torch.randn_like(tensors[name]))
            graph.replay()
            assert torch.equal(y, ext.grouped_selective_scan(**tensors))


@pytest.mark.parametrize("dim, rank, h, w", [(16, 1, 60, 50), (112, 7, 45, 42), (16, 1, 170, 171)])
def test_nan_is_passed_on(dim, rank, h, w):
    """Not a number that all later tiles of its group get; nobody waits for it forever, and no other group sees it."""
    tensors = inputs("cuda", torch.bfloat16, batch=1, h=h, w=w, dim=dim, rank=rank)
    nan = torch.full((), -1, dtype=torch.int16, device="cuda").view(torch.bfloat16)  # all ones
    clean = ext.grouped_selective_scan(**tensors)
    tensors["u"][0, 0, 3, 0] = nan
    tensors["dt"][0, 0, 3, 0] = nan
    y = ext.grouped_selective_scan(**tensors)
    flat = y[0, :, :, 0].flatten(0, 1)
    assert flat[3:].isnan().all() and not flat[:3].isnan().any()
    assert torch.equal(y[..., 1:, :], clean[..., 1:, :])
