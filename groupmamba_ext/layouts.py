# SPDX-License-Identifier: Apache-2.0
"""What Python repeats of csrc: sizes and strides of what the compiled ops allocate, and limits of their kernels.

The public functions and the fake kernels need them where no compiled op runs, also with symbolic sizes. Nothing else of
the package repeats a layout; tests compare what is here with what the library reports (`_load.library_layouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STATES = 256
MAX_GROUPS = 4096  # of a scan on CUDA, each tile of channels and each direction counted
FUSED_CHANNELS = 128  # a warp of the CUDA scan holds all channels of a token, 4 to a lane; more are scanned in tiles
FEED_FORWARD_CHANNELS = 192  # most of a feed-forward network that may be one kernel, in 16 bits
BATCH_NORM_CHANNELS = 2048  # most of batch_norm_relu
BIASED_CHANNELS = 512  # most of an image whose bias `token_norm` adds
NARROW_CONVS = ((32, 32, 3), (16, 32, 4))  # of narrow_conv: channels of x and of the result, taps along a side
PIXEL_UNIT = 8  # channels: images between the products of a layer have pixels a multiple of this apart
WORKSPACE_UNIT = 128  # elements: pieces of a workspace start at multiples of this
CPU_CHUNK = 64  # path tokens whose scan fits L2; the CPU kernels take any number
_LANE_CHANNELS = 4
_THREAD_TOKENS = 7
_TILE = _THREAD_TOKENS * 128  # tokens times lanes of a tile of the scan's backward
_MANY_STATES, _MANY_STATES_CHUNK = 5, 28  # from so many states on, so many tokens


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states, pooled images and partial sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Images and parameters ---------------------------------------------------------------------


def empty_like(like: Tensor) -> Tensor:
    """A contiguous tensor of the shape of ``like``."""
    return like.new_empty(like.shape)


def empty_image(like: Tensor) -> Tensor:
    """A result like the image (batch, H, W, G, D) or (batch, H, W, C), in its order of dimensions: group-major in,
    group-major out."""
    sizes = like.shape
    if (
        like.dim() == 5
        and sizes[3] > 1
        and like.stride(3) > like.stride(2)
        and (sizes[0] <= 1 or like.stride(3) > like.stride(0))
    ):
        return like.new_empty((sizes[3], sizes[0], sizes[1], sizes[2], sizes[4])).permute(1, 2, 3, 0, 4)
    return like.new_empty(sizes)


def empty_padded_image(like: Tensor) -> Tensor:
    """A result like the image (batch, H, W, C), with pixels a multiple of `PIXEL_UNIT` channels apart."""
    return like.new_empty((*like.shape[:3], padded(like.shape[3])))[..., : like.shape[3]]


def empty_gradient(parameter: Tensor) -> Tensor:
    """Of a layer's parameter: contiguous, or of channels-last strides where the parameter has them."""
    last = (
        not parameter.is_contiguous()
        and parameter.dim() == 4
        and parameter.is_contiguous(memory_format=torch.channels_last)
    )
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device, memory_format=order)


def empty_absent(image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of an optional input that was not given."""
    return image.new_empty((0,), dtype=dtype)


def padded(channels: int) -> int:
    """``channels`` up to a multiple of `PIXEL_UNIT`."""
    return -(-channels // PIXEL_UNIT) * PIXEL_UNIT


def padded_features(features: int, inner_pad: int) -> int:
    """Stored step features, B and C of a token in a layer whose groups have ``inner_pad`` padded channels."""
    return 4 if features <= 4 and inner_pad in (16, 32) else padded(features)


# Saved states of the scans -----------------------------------------------------------------


def chunk_tokens(dim: int, states: int, device_type: str) -> int:
    """Path tokens between two saved states of a scan of ``dim`` channels with ``states`` states each; on CUDA those of
    a tile of the backward."""
    if device_type == "cpu":
        return CPU_CHUNK
    if states >= _MANY_STATES:
        return _MANY_STATES_CHUNK
    lanes = 1
    while lanes * _LANE_CHANNELS < min(dim, FUSED_CHANNELS):
        lanes *= 2
    return _TILE // lanes


def saved_states(height: int, width: int, dim: int, device_type: str, chunk: int) -> int:
    """States that a forward saves of each plane for its backward, ``chunk`` tokens apart.

    On the CPU one a chunk of the path; on CUDA the larger of that and of the tiles along columns, which
    csrc/cuda/scan/plan.h describes.
    """
    along_path = -(-height * width // chunk)
    if device_type == "cpu" or along_path == 0:
        return along_path
    return max(along_path, _column_tiles(height, width, dim, chunk))


def _column_tiles(height: int, width: int, dim: int, chunk: int) -> int:
    columns = min(chunk // _THREAD_TOKENS // -(-height // _THREAD_TOKENS), width)
    whole = -(-width // columns) if columns else 0
    if columns == width or 10 * columns * height >= 8 * chunk:
        return whole
    pitch = padded(dim)
    best = rows = chunk
    while rows >= _THREAD_TOKENS and rows * 8 >= chunk:
        if rows == chunk or rows * pitch % 64 == 0:
            column = -(-height // rows) * rows
            if column < -(-height // best) * best:
                best = rows
            if 10 * height >= 9 * column:
                break
        rows //= 2
    column = -(-height // best) * best
    return whole if columns * column >= chunk else -(-(width * (column // best)) // (chunk // best))


def cross_slices(dim: int) -> list[int]:
    """Channels of the slices in which ``dim`` channels of a cross scan are scanned on CUDA."""
    count = -(-dim // FUSED_CHANNELS)
    width = dim if count == 1 else padded(-(-dim // count))
    return [min(width, dim - first) for first in range(0, dim, width)]


def cross_chunk(dim: int, states: int, device_type: str) -> int:
    """Path tokens between two saved states of a cross scan; on CUDA those of the first slice."""
    return chunk_tokens(dim if device_type == "cpu" else cross_slices(dim)[0], states, device_type)


def cross_saved_elements(u: Tensor, scans: int, states: int, chunk: int) -> int:
    """Elements of the states that a cross scan of ``u``, (batch, H, W, G, D), saves for its backward, ``chunk`` tokens
    apart; on CUDA in the first slice, and as many in every slice as in the one that has most."""
    batch, height, width, groups, dim = u.shape
    kind = u.device.type
    if kind == "cpu":
        elements = saved_states(height, width, dim, kind, chunk) * dim
    else:
        slices = cross_slices(dim)
        saved = max(saved_states(height, width, p, kind, chunk_tokens(p, states, kind)) for p in slices)
        room = slices[0] if slices[0] <= PIXEL_UNIT else padded(slices[0])
        elements = len(slices) * room * saved
    return batch * groups * scans * states * elements


def count_of(image: Tensor, count: Callable[[], int]) -> int:
    """``count()``, a number of elements by `saved_states`, for an op's fake kernel.

    The tiles of CUDA have no closed form: for an image of symbolic height or width, which a compiler would have to fix
    for it, a size that only the op itself tells.
    """
    symbolic = any(isinstance(size, torch.SymInt) for size in image.shape[1:3])
    if symbolic and image.device.type != "cpu":
        return torch.library.get_ctx().new_dynamic_size()
    return count()


# Workspaces --------------------------------------------------------------------------------


def workspace_elements(pieces: Iterable[int]) -> int:
    """Elements of a workspace that holds pieces of these sizes."""
    return sum(-(-n // WORKSPACE_UNIT) * WORKSPACE_UNIT for n in pieces)


class LayerSizes(NamedTuple):
    """Sizes of `grouped_mamba_layer`, without padding."""

    batch: int
    height: int
    width: int
    groups: int
    channels: int
    inner: int  # scanned channels of a group
    states: int
    rank: int
    hidden: int  # of the affinity, 0 without it
    merges: bool  # with out_proj


def layer_saved_images(s: LayerSizes) -> int:
    """Elements of what the layer's forward saves in the dtype of the images: images, and weights of products."""
    inner, dim, channels = padded(s.inner), padded(s.channels // s.groups), padded(s.channels)
    features = padded_features(s.rank + 2 * s.states, inner)
    widths = [features, dim, inner, inner, 2 * inner]
    mixed = dim if s.merges else inner
    weights = [2 * s.groups * inner * dim, s.groups * features * inner, channels * s.groups * mixed, channels]
    if s.merges:
        widths.append(dim)
        weights.append(s.groups * dim * inner)
    return workspace_elements([*(s.batch * s.height * s.width * s.groups * n for n in widths), *weights])


def layer_saved_floats(s: LayerSizes, chunk: int) -> int:
    """Elements of what the layer's forward saves in float32: the gate with what it came from, the states, and
    parameters of convolution, scan and norm: A, and where channels are padded the others."""
    inner = padded(s.inner)
    planes = s.batch * s.groups
    pieces = [planes * saved_states(s.height, s.width, inner, "cuda", chunk) * s.states * inner]
    rows = [s.states] if s.inner == inner else [s.states, 9, 1, s.rank, 1, 1, 1, 1]
    pieces += [s.groups * inner * row for row in rows]
    if s.hidden:
        gate = s.channels // s.groups if s.merges else inner
        pieces += [planes * gate, s.batch * s.channels, s.batch * s.hidden]
    return workspace_elements(pieces)


def feed_forward_saved(tokens: int, channels: int, hidden: int, dtype: torch.dtype) -> int:
    """Elements of what the feed-forward network's forward saves: none where it may be one kernel."""
    if dtype.itemsize == 2 and channels <= FEED_FORWARD_CHANNELS:
        return 0
    weight = padded(hidden) * padded(channels)
    return workspace_elements([tokens * padded(hidden), weight, padded(hidden), weight, padded(channels)])
