# SPDX-License-Identifier: Apache-2.0
"""`groupmamba_ext.layouts` against what the library reports of its own layouts."""

import itertools
import random

import pytest
import torch

from groupmamba_ext import _load, layouts
from support.layers import image, layer_arguments, make
from support.raw_ops import op

WIDTHS = (1, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 87, 88, 96, 106, 112, 120, 127, 128)
PLANES = [
    (0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (2, 3), (3, 500), (500, 3), (7, 7), (8, 8), (13, 29), (14, 14),
    (28, 28), (31, 37), (56, 56), (57, 56), (80, 120), (112, 200), (1, 4096), (4096, 1), (513, 3), (900, 1200),
]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return _load.library_layouts()


def test_limits(library):
    assert library.limits() == {
        "states": layouts.MAX_STATES,
        "groups": layouts.MAX_GROUPS,
        "scanned_channels": layouts.FUSED_CHANNELS,
        "batch_norm_channels": layouts.BATCH_NORM_CHANNELS,
        "biased_channels": layouts.BIASED_CHANNELS,
        "pixel_unit": layouts.PIXEL_UNIT,
        "workspace_unit": layouts.WORKSPACE_UNIT,
    }


def test_narrow_convolutions(library):
    sizes = itertools.product((8, 16, 24, 32, 64), (8, 16, 32, 64), (1, 3, 4, 7))
    assert {size for size in sizes if library.takes_narrow_conv(*size)} == set(layouts.NARROW_CONVS)


def test_chunks_and_saved_states(library):
    for dim, states in itertools.product(WIDTHS, (1, 4, 5, 16)):
        chunk = layouts.chunk_tokens(dim, states, "cuda")
        assert chunk == library.chunk_tokens(dim, states), (dim, states)
        for height, width in PLANES:
            expected = library.saved_states(height, width, dim, states)
            assert layouts.saved_states(height, width, dim, "cuda", chunk) == expected, (height, width, dim, states)


def test_saved_states_of_random_planes(library):
    draw = random.Random(0)
    for _ in range(3000):
        height, width, dim = draw.randint(1, 400), draw.randint(1, 400), draw.randint(1, 128)
        states = draw.choice((1, 3, 8))
        expected = library.saved_states(height, width, dim, states)
        chunk = layouts.chunk_tokens(dim, states, "cuda")
        assert layouts.saved_states(height, width, dim, "cuda", chunk) == expected, (height, width, dim, states)


def test_slices_of_the_cross_scan(library):
    for dim in range(1, 1200):
        slices = layouts.cross_slices(dim)
        assert slices[0] == library.slice_width(dim) and set(slices[:-1]) <= {slices[0]} and sum(slices) == dim
        for states in (1, 16):
            assert layouts.cross_chunk(dim, states, "cuda") == library.chunk_tokens(slices[0], states)


@pytest.mark.parametrize("scans, states", [(1, 1), (4, 3)])
@pytest.mark.parametrize("dim", [5, 128, 130, 300])
def test_saved_states_of_the_cross_scan(library, dim, scans, states):
    u = torch.empty(2, 13, 29, 3, dim, device="meta")
    width = library.slice_width(dim)
    slices = [min(width, dim - first) for first in range(0, dim, width)]
    saved = max(library.saved_states(13, 29, p, states) for p in slices)
    room = width if width <= 8 else -(-width // 8) * 8
    expected = 2 * 3 * scans * states * len(slices) * room * saved
    chunk = layouts.cross_chunk(dim, states, "meta")
    assert layouts.cross_saved_elements(u, scans, states, chunk) == expected


def test_padding(library):
    for features, inner in itertools.product(range(1, 40), (8, 16, 24, 32, 40, 64, 128)):
        assert layouts.padded_features(features, inner) == library.padded_features(features, inner)
    for channels in range(1, 300):  # where no inner width has products of 4 features
        assert layouts.padded(channels) == library.padded_features(channels, 128)


def strided(sizes, order, gap=0):
    """A tensor of these sizes whose dimensions lie in memory in this order, slowest first."""
    storage = torch.empty([sizes[d] + gap * (d == order[-1]) for d in order])
    view = storage.permute([order.index(d) for d in range(len(sizes))])
    return view.narrow(order[-1], 0, sizes[order[-1]])


@pytest.mark.parametrize("sizes", [(2, 3, 5, 4, 8), (1, 3, 5, 4, 8), (2, 3, 5, 1, 8), (2, 1, 1, 4, 8), (0, 3, 5, 4, 8)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 0, 1, 2, 4), (0, 3, 1, 2, 4), (0, 2, 1, 3, 4)])
@pytest.mark.parametrize("gap", [0, 3])
def test_results_in_the_order_of_an_image(library, sizes, order, gap):
    image = strided(sizes, order, gap)
    assert list(layouts.empty_image(image).stride()) == library.image_result_strides(sizes, image.stride())


def test_results_like_an_image_without_groups(library):
    image = torch.empty(2, 3, 5, 8)
    for view in (image, image.transpose(1, 2), torch.empty(2, 3, 5, 11)[..., :8]):
        expected = library.image_result_strides(view.shape, view.stride())
        assert list(layouts.empty_image(view).stride()) == expected


PARAMETERS = [
    (7,), (6, 5), (4, 6, 5), (8, 4, 3, 3), (8, 1, 3, 3), (8, 4, 1, 1), (1, 4, 3, 3), (8, 0, 3, 3), (4, 6, 5, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize("sizes", PARAMETERS)
def test_gradients_of_parameters(library, sizes):
    dense = torch.empty(sizes)
    views = [dense, torch.empty((*sizes[:-1], sizes[-1] + 2))[..., : sizes[-1]]]
    if len(sizes) > 1:
        views.append(torch.empty((sizes[1], sizes[0], *sizes[2:])).transpose(0, 1))
    if len(sizes) == 4:
        views.append(dense.contiguous(memory_format=torch.channels_last))
    for view in views:
        gradient = layouts.empty_gradient(view)
        assert gradient.shape == view.shape
        assert list(gradient.stride()) == library.gradient_strides(sizes, view.stride()), view.stride()


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("hidden", [0, 1, 7])
def test_what_the_layer_saves(library, merges, hidden):
    draw = random.Random(1)
    for _ in range(300):
        groups, dim, inner = draw.randint(1, 8), draw.randint(1, 130), draw.randint(1, 128)
        sizes = layouts.LayerSizes(
            draw.randint(1, 5), draw.randint(1, 80), draw.randint(1, 80), groups, groups * dim, inner,
            draw.randint(1, 5), draw.randint(1, 9), hidden, merges,
        )  # fmt: skip
        images, floats = library.layer_saved(**sizes._asdict())
        assert layouts.layer_saved_images(sizes) == images, sizes
        chunk = layouts.chunk_tokens(layouts.padded(inner), sizes.states, "cuda")
        assert layouts.layer_saved_floats(sizes, chunk) == floats, sizes


@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("affinity", [True, False])
def test_what_the_layers_fake_kernel_returns(library, variant, affinity):
    """Sizes that it reads off the parameters, against those of the layer."""
    layer = make(24, variant=variant, affinity=affinity, d_state=2, expand=1.5, directions=("lr", "bt", "rl"))
    arguments = layer_arguments(layer, image(2, 24, 5, 7, dtype=torch.float32))
    fakes = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments]
    out, saved, saved_float = op("grouped_mamba_layer_fwd")(*fakes)
    images, floats = library.layer_saved(
        batch=2, height=5, width=7, groups=3, channels=24, inner=12, states=2, rank=layer.mamba.dt_rank,
        hidden=layer.affinity.fc1.out_features if affinity else 0, merges=variant == "released",
    )  # fmt: skip
    assert out.shape == (2, 5, 7, 24)
    assert (saved.numel(), saved.dtype) == (images, torch.float32)
    assert (saved_float.numel(), saved_float.dtype) == (floats, torch.float32)


def test_what_the_feed_forward_network_saves(library):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for sizes in itertools.product((1, 49, 784, 3136), (1, 64, 192, 193, 448), (1, 20, 512, 1792), dtypes):
        *sizes, dtype = sizes
        assert layouts.feed_forward_saved(*sizes, dtype) == library.feed_forward_saved(*sizes, dtype.itemsize == 2)


def test_refused_sizes(library):
    for call in (
        lambda: library.chunk_tokens(129, 1),
        lambda: library.chunk_tokens(16, 0),
        lambda: library.saved_states(-1, 4, 8, 1),
        lambda: library.slice_width(0),
        lambda: library.gradient_strides([2, 3], [3]),
    ):
        with pytest.raises(ValueError, match="must be in"):
            call()
