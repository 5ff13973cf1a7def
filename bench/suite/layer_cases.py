# SPDX-License-Identifier: Apache-2.0
"""The cases of `GroupedMamba2d` and of a block's other half, and their equations in plain PyTorch as ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.token_norm import TokenNorm
from suite import flops, truth
from suite.problem import Case, Problem, Shape
from suite.shapes import FEED_FORWARD_RATIOS, GROUPS, STAGES, growth_shapes, square, stage_shapes

LAYER_PASSES = ("forward", "forward+backward")
SAMPLE_TOKENS = 1 << 18  # of the images that are compared with the truth
SAMPLE_IMAGES = 8
STATES = 16  # Mamba's own number, beside this model's one
ONE_STATE, MORE_STATES = "GroupedMamba2d", f"GroupedMamba2d(d_state={STATES})"
NOISE = 0.05  # added to every parameter, so that no term of the layer is zero or symmetric


def released_layer(x: Tensor, *, directions: Sequence[str], **p: Tensor) -> Tensor:
    """`GroupedMamba2d(variant="released")` from its equations, on its named parameters ``p``."""
    image = x.permute(0, 2, 3, 1)
    channels = image.shape[-1]

    def norm(t: Tensor) -> Tensor:
        return F.layer_norm(t, (channels,), p["norm.weight"], p["norm.bias"], 1e-5)

    xn = norm(image)
    inner, states = p["mamba.A_log"].shape[1:]
    rank = p["mamba.dt_weight"].shape[2]
    groups = xn.unflatten(-1, (GROUPS, -1))
    u, z = torch.einsum("bhwgd,ged->bhwge", groups, p["mamba.in_proj_weight"]).split(inner, -1)
    kernel = p["mamba.conv_weight"].reshape(GROUPS * inner, 1, 3, 3)
    u = F.conv2d(
        u.flatten(-2).permute(0, 3, 1, 2), kernel, p["mamba.conv_bias"].flatten(), padding=1, groups=GROUPS * inner
    )
    u = F.silu(u).permute(0, 2, 3, 1).unflatten(-1, (GROUPS, inner))
    features = torch.einsum("bhwge,gfe->bhwgf", u, p["mamba.x_proj_weight"])
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    u, z, features = u.to(wide), z.to(wide), features.to(wide)
    dt, B, C = features.split((rank, states, states), -1)
    y = truth.grouped_selective_scan(
        u,
        dt,
        -torch.exp(p["mamba.A_log"]),
        B,
        C,
        p["mamba.D"],
        dt_weight=p["mamba.dt_weight"],
        dt_bias=p["mamba.dt_bias"],
        z=z,
        norm_weight=p["mamba.out_norm_weight"],
        norm_bias=p["mamba.out_norm_bias"],
        directions=directions,
    )
    o = torch.einsum("bhwge,gde->bhwgd", y, p["mamba.out_proj_weight"]).flatten(-2)
    product = o * p["skip_scale"] * xn
    if "affinity.fc1.weight" in p:
        hidden = F.relu(F.linear(xn.mean((1, 2)), p["affinity.fc1.weight"], p["affinity.fc1.bias"]))
        gate = torch.sigmoid(F.linear(hidden, p["affinity.fc2.weight"], p["affinity.fc2.bias"]))
        product = product * gate[:, None, None]
    return F.linear(norm(product), p["proj.weight"], p["proj.bias"]).permute(0, 3, 1, 2)


BLOCK_EPS = 1e-6  # of a block's second norm


class FeedForwardHalf(nn.Module):
    """The second half of a block, ``x + mlp(norm(x))``, on (batch, C, H, W)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.norm, self.mlp = TokenNorm(channels, eps=BLOCK_EPS), ConvFeedForward(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.permute(0, 2, 3, 1), self.norm, residual=True).permute(0, 3, 1, 2)


def feed_forward_half(x: Tensor, **p: Tensor) -> Tensor:
    """`FeedForwardHalf` from its equations, on its named parameters ``p``."""
    image = x.permute(0, 2, 3, 1)
    xn = F.layer_norm(image, image.shape[-1:], p["norm.weight"], p["norm.bias"], BLOCK_EPS)
    hidden = F.linear(xn, p["mlp.fc1.weight"], p["mlp.fc1.bias"]).permute(0, 3, 1, 2)
    kernel = p["mlp.dwconv.weight"]
    hidden = F.gelu(F.conv2d(hidden, kernel, p["mlp.dwconv.bias"], padding=1, groups=len(kernel)))
    return x + F.linear(hidden.permute(0, 2, 3, 1), p["mlp.fc2.weight"], p["mlp.fc2.bias"]).permute(0, 3, 1, 2)


def by_reference(layer: nn.Module) -> Callable[..., Tensor]:
    """Any layer through `ext.backend("reference")`, token by token, on the parameters that it is given."""

    def function(x: Tensor, **parameters: Tensor) -> Tensor:
        with ext.backend("reference"):
            return torch.func.functional_call(layer, parameters, (x,))

    return function


def make_layer(channels: int, device: torch.device, **options) -> GroupedMamba2d:
    """A layer on ``device``, the same in every run."""
    torch.manual_seed(0)
    layer = GroupedMamba2d(channels, **options)
    perturb(layer)
    return layer.to(device)


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    """Moves every parameter a little off its initial value."""
    for parameter in module.parameters():
        parameter.add_(NOISE * torch.randn_like(parameter))


def image_input(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(batch, C, H, W) in ``torch.channels_last``, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(shape.batch, shape.height, shape.width, shape.channels, device=device)
    return x.normal_(generator=generator).to(dtype).permute(0, 3, 1, 2)


def layer_problem(shape: Shape, dtype: torch.dtype, options: dict, device: torch.device) -> Problem:
    """A layer on one batch; below float32 under autocast, with float32 parameters."""
    layer = make_layer(shape.channels, device, **options)
    grouped = layer.scan == "grouped"
    return Problem(
        {"x": image_input(shape, dtype, device)},
        lambda x: layer(x),
        partial(released_layer, directions=layer.directions) if grouped else by_reference(layer),
        parameters=dict(layer.named_parameters()),
        autocast=None if dtype == torch.float32 else dtype,
        flops=flops.layer(shape, options.get("d_state", 1)) if grouped else {},
        sample=_sample(shape),
    )


def _sample(shape: Shape) -> int:
    return min(SAMPLE_IMAGES, max(1, SAMPLE_TOKENS // (shape.height * shape.width)))


def _feed_forward(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    hidden = shape.channels * FEED_FORWARD_RATIOS[shape.channels]
    torch.manual_seed(0)
    half = FeedForwardHalf(shape.channels, hidden)
    perturb(half)
    half.to(device)
    return Problem(
        {"x": image_input(shape, dtype, device)},
        lambda x: half(x),
        feed_forward_half,
        parameters=dict(half.named_parameters()),
        autocast=None if dtype == torch.float32 else dtype,
        flops=flops.feed_forward(shape, hidden),
        sample=_sample(shape),
    )


def feed_forward_cases(
    device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Sequence[int] | None
) -> Iterator[Case]:
    """The second half of a block: LayerNorm, feed-forward network and addition, hidden channels as GroupMamba-T's."""
    for dtype in dtypes:
        for shape in stage_shapes(device, quick, batches):
            prepare = partial(_feed_forward, shape, dtype)
            yield Case("ffn", "x + ConvFeedForward(norm(x))", shape, dtype, "channels_last", prepare, LAYER_PASSES)


def layer_cases(
    device: str, dtypes: Sequence[torch.dtype], quick: bool, batches: Sequence[int] | None
) -> Iterator[Case]:
    """The released variant of `GroupedMamba2d`: one direction a group and channel affinity; with more states, too."""

    def case(shape: Shape, dtype: torch.dtype, series: str = "stages") -> Case:
        prepare = partial(layer_problem, shape, dtype, {})
        return Case("layer", ONE_STATE, shape, dtype, "channels_last", prepare, LAYER_PASSES, series)

    def states_case(shape: Shape, dtype: torch.dtype) -> Case:
        prepare = partial(layer_problem, shape, dtype, {"d_state": STATES})
        return Case("layer", MORE_STATES, shape, dtype, "channels_last", prepare, LAYER_PASSES, "states")

    for dtype in dtypes:
        yield from (case(shape, dtype) for shape in stage_shapes(device, quick, batches))
        yield from (states_case(shape, dtype) for shape in stage_shapes(device, quick, batches))
        if device == "cuda" and not quick and batches is None:
            yield from (case(square(batch, STAGES[0]), dtype, "batch") for batch in (16, 1))
            yield from (case(shape, dtype, "growth") for shape in growth_shapes())


def compare_states(rows: Sequence[dict]) -> None:
    """Gives rows with more states ``over``: their time over that of the same call with one, graph and eager."""

    def place(row: dict) -> tuple:
        return tuple(row[k] for k in ("shape", "batch", "dtype", "pass"))

    single = {place(row): row for row in rows if row["label"] == ONE_STATE and row["us"] is not None}
    for row in rows:
        one = single.get(place(row))
        if row["label"] != MORE_STATES or row["us"] is None or one is None:
            continue
        graphs = row["graph_us"] is not None and one["graph_us"] is not None
        graph = row["graph_us"] / one["graph_us"] if graphs else None
        row["over"] = {"graph": graph, "eager": row["eager_us"] / one["eager_us"]}
