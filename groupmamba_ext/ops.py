# SPDX-License-Identifier: Apache-2.0
"""The public ops: argument checks, autocast and the choice of implementation; the maths is in `reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from groupmamba_ext import _explain, reference
from groupmamba_ext._checks import Arguments, choice, last_size
from groupmamba_ext.backend import use_native
from groupmamba_ext.dispatch import call, may_want_gradient

DIRECTIONS = reference.DIRECTIONS
ACTIVATIONS = (None, "silu", "gelu")
MAX_STATES = 256
MAX_GROUPS = 4096  # of a scan on CUDA, each tile of channels and each direction counted: csrc/cuda/scan/args.h
# A warp of the CUDA scan holds all channels of a token, 4 to a lane; wider groups are scanned in tiles.
FUSED_CHANNELS = 128

_IMAGE = "(batch, H, W, G, D)"
_CAST_BY_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts image tensors to the autocast dtype where autocast is on; float64 is left alone, as torch does, and so is
    what the checks behind this refuse."""
    first = tensors[0]
    kind = first.device.type if isinstance(first, Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    low = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(low) if isinstance(t, Tensor) and t.dtype in _CAST_BY_AUTOCAST and t.layout is torch.strided else t
        for t in tensors
    )


def check_groups(op: str, image: Tensor, count: int, what: str) -> None:
    """ValueError where kernels on CUDA would have to scan more than `MAX_GROUPS` groups at once."""
    if image.device.type == "cuda" and count > MAX_GROUPS:
        raise ValueError(f"{op}: u must have at most {MAX_GROUPS} {what} on CUDA, got {count}")


def chunk_tokens(dim: int, device_type: str) -> int:
    """Path tokens between two saved states.

    On CUDA, what 128 threads of the backward hold at 7 tokens and 4 channels each; on the CPU, a block that fits L2.
    """
    if device_type == "cpu":
        return 64
    lanes = 1
    while lanes * 4 < min(dim, FUSED_CHANNELS):
        lanes *= 2
    return 7 * 128 // lanes


def saved_states(height: int, width: int, dim: int, device_type: str, chunk: int) -> int:
    """States that a forward saves of each plane for its backward, ``chunk`` tokens apart.

    On the CPU one a chunk of the path; on CUDA the larger of that and of the tiles along columns, see
    csrc/cuda/scan/plan.h.
    """
    along_path = -(-height * width // chunk)
    if device_type == "cpu" or along_path == 0:
        return along_path
    return max(along_path, _column_tiles(height, width, dim, chunk))


def elements_of(image: Tensor, count: Callable[[], int]) -> int:
    """``count()``, a number of elements by `saved_states`, for an op's fake kernel.

    The tiles of CUDA have no closed form: for an image of symbolic height or width, which a compiler would have to fix
    for it, a size that only the op itself tells.
    """
    symbolic = any(isinstance(size, torch.SymInt) for size in image.shape[1:3])
    if symbolic and image.device.type != "cpu":
        return torch.library.get_ctx().new_dynamic_size()
    return count()


def _column_tiles(height: int, width: int, dim: int, chunk: int) -> int:
    """csrc/cuda/scan/plan.h's cut_columns."""
    columns = min(chunk // 7 // -(-height // 7), width)
    whole = -(-width // columns) if columns else 0
    if columns == width or 10 * columns * height >= 8 * chunk:
        return whole
    pitch = -(-dim // 8) * 8
    best = rows = chunk
    while rows >= 7 and rows * 8 >= chunk:
        if rows == chunk or rows * pitch % 64 == 0:
            padded = -(-height // rows) * rows
            if padded < -(-height // best) * best:
                best = rows
            if 10 * height >= 9 * padded:
                break
        rows //= 2
    padded = -(-height // best) * best
    return whole if columns * padded >= chunk else -(-(width * (padded // best)) // (chunk // best))


def grouped_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    softplus: bool = True,
) -> Tensor:
    r"""Scans every channel group of an image by its own selective state-space model along its own direction.

    For group g, with t the position on its path over the image:

    .. code-block:: text

        step_t = softplus(dt_weight dt_t + dt_bias)
        h_t = exp(step_t A) h_{t-1} + step_t B_t u_t
        y_t = C_t . h_t + D u_t
        out = LayerNorm(y_t; norm_weight, norm_bias) * silu(z_t) * gate          (each factor only if given)

    in one pass over the image: flips, step projection, scan, norm and gates write nothing in between. Backward
    recomputes the states from saved chunk boundaries. GroupMamba (arXiv 2407.13772), grouped Mamba operator and
    channel affinity modulation.

    Args:
        u: input, (batch, H, W, G, D); any strides, no copy where channels are adjacent and rows follow one another.
            (16-bit images on sm_90 with N = 1, ``z`` and a norm are copied too where D or the strides of
            pixels, groups or images are no multiples of 8, and so are ``z``, the result and their gradients.)
        dt: low-rank step features (batch, H, W, G, R) with ``dt_weight``, else the step before bias and softplus,
            (batch, H, W, G, D).
        A: (G, D, N), negative. N up to 256.
        B, C: (batch, H, W, G, N).
        D: skip, (G, D).
        dt_weight: (G, D, R).
        dt_bias: (G, D).
        z: gate branch, like ``u``.
        norm_weight, norm_bias: (G, D); LayerNorm over D with ``norm_eps``. ``norm_bias`` needs ``norm_weight``.
        gate: channel affinity, (batch, G, D).
        directions: one of ``"lr"`` (row-major), ``"rl"`` (its reverse), ``"tb"`` (column-major), ``"bt"`` (its
            reverse) for each group. The default is the paper's order; the released code's is (lr, tb, rl, bt).
        softplus: apply softplus to the step.

    Returns:
        (batch, H, W, G, D), dtype of ``u`` and its order of dimensions in memory (group-major in, group-major out).

    u, dt, B, C and z share one dtype: float32, float16, bfloat16, or float64 (on CUDA through the reference). The
    other tensors have that dtype or float32. Under autocast the former are cast to its dtype. Arithmetic is float32
    (float64 for float64). Gradients have their input's dtype; results are bitwise repeatable.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
        RuntimeError: on a second derivative, or where the compiled library is missing.
    """
    op = "grouped_selective_scan"
    args = Arguments(op, "u", u, (5,), _IMAGE)
    u, dt, B, C, z = _autocast(u, dt, B, C, z)
    args.image = u
    batch, height, width, groups, dim = u.shape
    codes = args.directions(directions, groups, DIRECTIONS)
    args.boolean("softplus", softplus)
    args.eps("norm_eps", norm_eps)
    states = last_size(op, "A", A, 3, "(G, D, N)")
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"{op}: A must be (G, D, N) with N from 1 to {MAX_STATES}, got shape {tuple(A.shape)}")
    if dim < 1 or groups < 1:
        raise ValueError(f"{op}: u must have at least one group and one channel, got shape {tuple(u.shape)}")
    tokens = (batch, height, width, groups)
    if dt_weight is None:
        args.like_image("dt", dt, (*tokens, dim), "(batch, H, W, G, D) without dt_weight")
    else:
        rank = last_size(op, "dt_weight", dt_weight, 3, "(G, D, R)")
        args.parameter("dt_weight", dt_weight, (groups, dim, rank), "(G, D, R)")
        args.like_image("dt", dt, (*tokens, rank), "(batch, H, W, G, R)")
        if rank < 1:
            raise ValueError(f"{op}: dt_weight must be (G, D, R) with R at least 1, got {tuple(dt_weight.shape)}")
    args.parameter("A", A, (groups, dim, states), "(G, D, N)")
    args.like_image("B", B, (*tokens, states), "(batch, H, W, G, N)")
    args.like_image("C", C, (*tokens, states), "(batch, H, W, G, N)")
    for name, value in (("D", D), ("dt_bias", dt_bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        args.parameter(name, value, (groups, dim), "(G, D)", optional=True)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias needs norm_weight, got norm_weight=None")
    if z is not None:
        args.like_image("z", z, u.shape, _IMAGE)
    args.parameter("gate", gate, (batch, groups, dim), "(batch, G, D)", optional=True)

    if not use_native(u, op):
        return reference.grouped_selective_scan(
            u, dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, z=z, norm_weight=norm_weight,
            norm_bias=norm_bias, norm_eps=norm_eps, gate=gate, directions=directions, softplus=softplus,
        )  # fmt: skip
    check_groups(op, u, groups * (-(-dim // FUSED_CHANNELS)), "groups, or tiles of 128 channels,")
    if u.device.type == "cuda" and dim > FUSED_CHANNELS:
        return _tiled_scan(
            u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, norm_eps, gate, codes, softplus
        )
    return _native_scan(
        u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, codes, softplus, norm_eps
    )


def _native_scan(u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate, codes, softplus, norm_eps):
    tensors = (u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, gate)
    save_states = may_want_gradient(tensors)
    chunk = chunk_tokens(u.shape[-1], u.device.type)
    y, _ = call("grouped_selective_scan", *tensors, codes, softplus, float(norm_eps), chunk, save_states)
    return y


def _tiled_scan(
    u, dt, A, B, C, D, dt_weight, dt_bias, z, norm_weight, norm_bias, norm_eps, gate, codes, softplus
) -> Tensor:
    """Groups wider than a warp holds: equal tiles of channels scanned as groups of their own, then norm and gates.

    In float32, so that nothing is rounded before the norm.
    """
    batch, height, width, groups, dim = u.shape
    tiles = -(-dim // FUSED_CHANNELS)
    if _explain.asked():
        _explain.note(
            f"grouped_selective_scan: {tiles} scans a group in float32, norm and gates by torch: a group has {dim} "
            f"channels, a warp holds {FUSED_CHANNELS}"
        )
    tile = -(-dim // tiles)
    pad = tiles * tile - dim

    def split(t: Tensor | None) -> Tensor | None:  # (..., G, D) -> (..., G * tiles, tile)
        return None if t is None else F.pad(t.float(), (0, pad)).reshape(*t.shape[:-2], groups * tiles, tile)

    def split_rows(t: Tensor) -> Tensor:  # (G, D, K) -> (G * tiles, tile, K)
        # Channels that do not exist take the rows of the last one: their steps are finite where its steps are. A
        # dt_weight of 0 would make NaN of a feature of -inf, which masks a token.
        t = t.float()
        if pad > 0:
            t = torch.cat([t, t[:, -1:].detach().expand(groups, pad, t.shape[-1])], 1)
        return t.reshape(groups * tiles, tile, t.shape[-1])

    def repeat(t: Tensor) -> Tensor:  # (batch, H, W, G, K) -> (batch, H, W, G * tiles, K)
        t = t.float().unsqueeze(4).expand(*t.shape[:4], tiles, t.shape[4])
        return t.reshape(batch, height, width, groups * tiles, t.shape[-1])

    y = _native_scan(
        split(u), split(dt) if dt_weight is None else repeat(dt), split_rows(A), repeat(B), repeat(C), split(D),
        None if dt_weight is None else split_rows(dt_weight), split(dt_bias), None, None, None, None,
        tuple(code for code in codes for _ in range(tiles)), softplus, norm_eps,
    )  # fmt: skip
    y = y.reshape(batch, height, width, groups, tiles * tile)[..., :dim]
    if norm_weight is not None:
        y = F.layer_norm(y, (dim,), eps=norm_eps) * norm_weight
        if norm_bias is not None:
            y = y + norm_bias
    if z is not None:
        y = y * F.silu(z.float())
    if gate is not None:
        y = y * gate[:, None, None]
    return y.to(u.dtype)


def depthwise_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """3x3 depthwise convolution of a channels-last image with zero padding, bias and activation in one pass.

    Args:
        x: (batch, H, W, C), or (batch, H, W, G, D) for grouped storage; float32, float16, bfloat16 or float64.
        weight: (C, 3, 3) or (C, 1, 3, 3); (G, D, 3, 3) for grouped ``x``. dtype of ``x`` or float32.
        bias: (C,), or (G, D).
        activation: ``None``, ``"silu"`` or ``"gelu"`` (the erf form).

    Returns:
        Like ``x``, in its order of dimensions in memory. Cross-correlation, as :class:`torch.nn.Conv2d` with
        ``groups=C, padding=1``.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
    """
    op = "depthwise_conv3x3"
    args = Arguments(op, "x", x, (4, 5), "(batch, H, W, C) or (batch, H, W, G, D)")
    (x,) = _autocast(x)
    args.image = x
    choice(args.owner, "activation", activation, ACTIVATIONS)
    if x.dim() == 5:
        groups, dim = x.shape[3:]
        args.parameter("weight", weight, (groups, dim, 3, 3), "(G, D, 3, 3)")
        args.parameter("bias", bias, (groups, dim), "(G, D)", optional=True)
    else:
        groups, dim = 1, x.shape[3]
        if isinstance(weight, Tensor) and weight.dim() == 4:
            args.parameter("weight", weight, (dim, 1, 3, 3), "(C, 1, 3, 3)")
        else:
            args.parameter("weight", weight, (dim, 3, 3), "(C, 3, 3)")
        args.parameter("bias", bias, (dim,), "(C,)", optional=True)
    if not use_native(x, op):
        return reference.depthwise_conv3x3(x, weight, bias, activation=activation)
    image = x if x.dim() == 5 else x.unsqueeze(3)
    y = call(
        "depthwise_conv3x3",
        image,
        weight.reshape(groups, dim, 3, 3),
        None if bias is None else bias.reshape(groups, dim),
        ACTIVATIONS.index(activation),
    )
    return y if x.dim() == 5 else y.squeeze(3)


def layer_norm_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """LayerNorm over the channels of an image and the mean of the result over the image, in one read.

    Args:
        x: (batch, H, W, C); float32, float16, bfloat16 or float64.
        weight, bias: (C,), dtype of ``x`` or float32.
        eps: added to the variance.

    Returns:
        The normalised image like ``x``, and its mean over H and W, (batch, C) in float32 (float64 for float64), taken
        before rounding to the dtype of ``x``.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
    """
    op = "layer_norm_pool"
    args = Arguments(op, "x", x, (4,), "(batch, H, W, C)")
    (x,) = _autocast(x)
    args.image = x
    args.parameter("weight", weight, x.shape[-1:], "(C,)")
    args.parameter("bias", bias, x.shape[-1:], "(C,)")
    args.eps("eps", eps)
    if not use_native(x, op):
        return reference.layer_norm_pool(x, weight, bias, eps)
    return call("layer_norm_pool", x, weight, bias, float(eps))


def modulated_layer_norm(
    o: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gate: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over all channels of ``o * scale * x * gate``: how the released layer merges its groups.

    Args:
        o: the groups' outputs, (batch, H, W, G, D) with G * D = C, or (batch, H, W, C); strided views are read in
            place.
        x: the layer's normalised input, (batch, H, W, C), of the same dtype.
        scale: ``skip_scale``, (1,).
        weight, bias: (C,), dtype of ``x`` or float32.
        gate: channel affinity, (batch, C), dtype of ``x`` or float32.
        eps: added to the variance.

    Returns:
        Like ``x``.

    Raises:
        TypeError: an argument is no dense tensor, or has the wrong type or dtype.
        ValueError: a shape, device or value is wrong.
    """
    op = "modulated_layer_norm"
    args = Arguments(op, "x", x, (4,), "(batch, H, W, C)")
    args.tensor("o", o)
    x, o = _autocast(x, o)
    args.image = x
    channels = x.shape[-1]
    if o.dim() == 5:
        if o.shape[3] * o.shape[4] != channels:
            raise ValueError(f"{op}: o must be (batch, H, W, G, D) with G * D = {channels}, got {tuple(o.shape)}")
        args.like_image("o", o, (*x.shape[:3], *o.shape[3:]), _IMAGE)
    else:
        args.like_image("o", o, x.shape, "(batch, H, W, C)")
    args.parameter("scale", scale, (1,), "(1,)")
    args.parameter("weight", weight, (channels,), "(C,)")
    args.parameter("bias", bias, (channels,), "(C,)")
    args.parameter("gate", gate, (x.shape[0], channels), "(batch, C)", optional=True)
    args.eps("eps", eps)
    if not use_native(x, op):
        return reference.modulated_layer_norm(o, x, scale, weight, bias, gate=gate, eps=eps)
    grouped = o if o.dim() == 5 else o.unsqueeze(3)
    return call("modulated_layer_norm", grouped, x, scale, gate, weight, bias, float(eps))
