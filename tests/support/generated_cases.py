# SPDX-License-Identifier: Apache-2.0
"""Inputs of every op and of the layers drawn at random.

A case is a dictionary of plain values, printed as one line of JSON that replays it. It says shapes (with 0 and 1, odd
widths), dtypes of images and parameters, how each tensor lies in memory, the sizes of its values, which tokens are
masked and which gradients are asked for; numbers come from its seed.
"""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

import groupmamba_ext as ext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

SCALES = (1e-6, 1e-3, 0.1, 1.0, 1.0, 1.0, 5.0, 50.0)
LAYOUTS = ("plain", "plain", "padded", "offset", "rows", "columns", "groups", "images", "expanded", "shared")
OPS = (
    "grouped_selective_scan",
    "cross_selective_scan",
    "depthwise_conv3x3",
    "layer_norm_pool",
    "modulated_layer_norm",
)
MODULES = ("layer", "feed_forward")
SCAN_IMAGES = ("u", "dt", "B", "C", "z")
SHARES = {"z": "u", "C": "B", "o": "x"}  # tensors that may be another one of the same shape


# what is drawn ------------------------------------------------------------------------------------


def _sizes():
    small = st.integers(1, 9)
    return st.one_of(small, small, small, st.integers(10, 40), st.sampled_from([0, 1, 1]))


def _widths():
    return st.one_of(st.integers(1, 24), st.sampled_from([1, 3, 7, 8, 16, 31, 32, 33, 64, 87, 106, 128, 129, 140]))


@st.composite
def cases(draw, name: str):
    """A case of the op ``name``, of `OPS` or `MODULES`."""
    height, width = draw(_sizes()), draw(_sizes())
    if height * width > 400:
        width = max(400 // height, 1)
    case = {
        "op": name,
        "seed": draw(st.integers(0, 2**31 - 1)),
        "dtype": draw(st.sampled_from(["float32", "float32", "bfloat16", "float16", "float64"])),
        "batch": draw(st.sampled_from([1, 1, 2, 2, 3, 0])),
        "height": height,
        "width": width,
        **draw(_OPTIONS[name]),
    }
    if name == "depthwise_conv3x3" and draw(st.sampled_from([False] * 7 + [True])):
        # As many as go to tensor cores on a GPU that has them: small images of whole octets of channels.
        case["batch"], case["height"] = draw(st.integers(132, 150)), min(height, 4)
        case["width"] = draw(st.sampled_from([9, 12, 13, 14, 16, 27, 30]))
        case["dim"] = draw(st.sampled_from([16, 32, 64, 72, 88, 128]))
    if case["dtype"] == "float64":
        case["mixed"] = False
    _well_conditioned(case)
    return case


def _well_conditioned(case: dict) -> None:
    """Norms are over 1 or at least 3 channels. Of two a norm makes about -1 and 1 whatever they are, and their gradient
    is what is left of numbers a thousand times as large; those stand in test_norms.py, with a larger eps."""
    if case["op"] == "depthwise_conv3x3" or case["op"] == "cross_selective_scan":
        return
    if case["op"] in ("feed_forward", "layer_norm_pool") or case.get("variant") == "paper":
        case["dim"] = max(
            case["dim"], 3
        )  # of one channel torch's own norm on the CPU makes not 0, but a rounding of it
    if case["op"] in MODULES and case["dim"] * case["groups"] <= 2:
        case["groups"] = 3
    if case["dim"] == 2:
        case["dim"] = 3
    if case["op"] == "layer" and case["dim"] == 1:
        case["expand"] = 1.0


def _tensors(names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict:
    """What is drawn for the tensors of an op."""
    images = [name for name in names if name in (*SCAN_IMAGES, "x", "o")]
    return {
        "mixed": st.booleans(),  # parameters in float32, whatever the images are
        "scales": st.one_of(st.just({}), st.fixed_dictionaries({name: st.sampled_from(SCALES) for name in names})),
        "layouts": st.fixed_dictionaries({name: st.sampled_from(LAYOUTS) for name in images}),
        "parameter_layout": st.sampled_from(["plain", "plain", "offset", "last", "expanded"]),
        "absent": st.sets(st.sampled_from(optional)).map(sorted) if optional else st.just([]),
        "frozen": st.one_of(st.just([]), st.sets(st.sampled_from(names)).map(sorted)),
        "output_gradient": st.sampled_from(["plain", "expanded", "padded"]),
    }


_DIRECTIONS = st.sampled_from(ext.DIRECTIONS)
_SCAN = {
    "dim": _widths(),
    "states": st.sampled_from([1, 1, 1, 2, 3, 4, 5, 16, 17]),
    "rank": st.sampled_from([None, 1, 2, 3, 6, 9]),
    "softplus": st.sampled_from([True, True, True, False]),
    "masked": st.sampled_from([0, 0, 0, 1, 3, 1000]),  # tokens whose step is softplus(-inf)
}
_NORM = {"eps": st.sampled_from([1e-5, 1e-6, 1e-2])}
_GROUPED = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z", "norm_weight", "norm_bias", "gate")
_LAYER = {
    "groups": st.sampled_from([1, 2, 3, 4, 4, 4, 5, 8]),
    "dim": st.one_of(st.integers(1, 12), st.sampled_from([16, 31, 32, 87])),  # of a group
    "layout": st.sampled_from(["contiguous", "channels_last", "image", "padded", "offset", "expanded", "transposed"]),
    "residual": st.booleans(),
    "frozen": st.sampled_from([[], [], ["x"], ["parameters"]]),
}
_OPTIONS = {
    "grouped_selective_scan": st.fixed_dictionaries(
        {
            "directions": st.lists(_DIRECTIONS, min_size=1, max_size=5),
            **_SCAN,
            **_NORM,
            **_tensors(_GROUPED, ("D", "dt_bias", "z", "norm", "norm_bias", "gate")),
        }
    ),
    "cross_selective_scan": st.fixed_dictionaries(
        {
            "directions": st.lists(_DIRECTIONS, min_size=1, max_size=5),
            "groups": st.sampled_from([None, 1, 2, 3]),  # None: without their dimension
            **_SCAN,
            **_tensors(("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias"), ("D", "dt_bias")),
        }
    ),
    "depthwise_conv3x3": st.fixed_dictionaries(
        {
            "groups": st.sampled_from([None, 1, 2, 4]),
            "dim": _widths(),
            "activation": st.sampled_from([None, "silu", "gelu"]),
            **_tensors(("x", "weight", "bias"), ("bias",)),
        }
    ),
    "layer_norm_pool": st.fixed_dictionaries({"dim": _widths(), **_NORM, **_tensors(("x", "weight", "bias"))}),
    "modulated_layer_norm": st.fixed_dictionaries(
        {
            "groups": st.sampled_from([None, 1, 2, 4]),
            "dim": _widths(),
            **_NORM,
            **_tensors(("o", "x", "scale", "weight", "bias", "gate"), ("gate",)),
        }
    ),
    "layer": st.fixed_dictionaries(
        {
            **_LAYER,
            "variant": st.sampled_from(["released", "released", "fused", "paper"]),
            "scan": st.sampled_from(["grouped", "grouped", "cross"]),
            "affinity": st.booleans(),
            "states": st.sampled_from([1, 1, 1, 2, 4]),
            "conv": st.sampled_from([3, 3, 1]),
            "expand": st.sampled_from([1.0, 1.0, 2.0]),
            "gate_source": st.sampled_from(["input", "input", "output"]),
            "directions": st.lists(_DIRECTIONS, min_size=8, max_size=8),
        }
    ),
    "feed_forward": st.fixed_dictionaries({**_LAYER, "ratio": st.sampled_from([1, 2, 4, 8])}),
}


# inputs -------------------------------------------------------------------------------------------


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``t`` in memory as ``layout`` says; what lies between them is NaN."""

    def buffer(*shape):
        return torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)

    if t.dim() < 3 and layout in ("rows", "columns", "groups", "images"):
        return t
    if layout == "padded":
        out = buffer(*t.shape[:-1], t.shape[-1] + 3)[..., 1 : t.shape[-1] + 1]
    elif layout == "offset":
        out = buffer(t.numel() + 1)[1:].view(t.shape)
    elif layout == "rows":  # every second one
        out = buffer(t.shape[0], 2 * t.shape[1], *t.shape[2:])[:, ::2]
    elif layout == "columns":  # stored column by column
        out = buffer(t.shape[0], t.shape[2], t.shape[1], *t.shape[3:]).transpose(1, 2)
    elif layout == "groups":  # what stands before the channels outermost
        out = buffer(t.shape[-2], *t.shape[:-2], t.shape[-1]).movedim(0, -2)
    elif layout == "images":  # channels outermost but for the batch
        out = buffer(t.shape[0], *t.shape[3:], *t.shape[1:3]).movedim((-2, -1), (1, 2))
    elif layout == "last":  # the last dimension outermost
        out = buffer(t.shape[-1], *t.shape[:-1]).movedim(0, -1)
    elif layout == "expanded":  # one number for all of a dimension
        return t[:1].expand(t.shape) if len(t) else t
    else:
        return t
    return out.copy_(t)


def _inputs(case: dict, shapes: dict[str, tuple], means: dict[str, tuple]) -> dict[str, torch.Tensor | None]:
    """Tensors of ``shapes`` on the CPU; ``means`` has (mean, scale) of those that are not standard normal."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype = DTYPES[case["dtype"]]
    tensors: dict[str, torch.Tensor | None] = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        if name in case["absent"]:
            tensors[name] = None
            continue
        mean, scale = means.get(name, (0.0, 1.0))
        values = (mean + scale * values) * case["scales"].get(name, 1.0)
        if name == "A":
            values = -values.abs().clamp(min=1e-7)
        image = name in case["layouts"]
        stored = values.to(dtype if image or not case["mixed"] else torch.float32)
        other = tensors.get(SHARES.get(name, ""))
        layout = case["layouts"][name] if image else case["parameter_layout"]
        if layout == "shared":
            fits = other is not None and other.shape == stored.shape
            tensors[name] = other.detach() if fits else stored
        else:
            tensors[name] = laid_out(stored, layout)
    return tensors


def _scan_case(case: dict, scans: tuple[int, ...], u_shape: tuple[int, ...]) -> tuple[dict, dict]:
    """Tensors and options that both scans take, for ``scans`` (G,), (K,) or (G, K)."""
    image, dim, rank = (case["batch"], case["height"], case["width"]), case["dim"], case["rank"]
    states = case["states"]
    shapes = {
        "u": u_shape,
        "dt": (*image, *scans, dim if rank is None else rank),
        "A": (*scans, dim, states),
        "B": (*image, *scans, states),
        "C": (*image, *scans, states),
        "D": (*scans, dim),
        "dt_bias": (*scans, dim),
    }
    if rank is not None:
        shapes["dt_weight"] = (*scans, dim, rank)
    means = {"A": (1.0, 0.4), "D": (1.0, 0.2), "dt_bias": (-2.0, 1.0), "dt_weight": (0.0, (rank or 1) ** -0.5)}
    return shapes, means


def _masked(case: dict, tensors: dict) -> None:
    """Steps as the options need them: positive without softplus, -inf where tokens are masked."""
    dt, weight = tensors["dt"], tensors.get("dt_weight")
    if not case["softplus"]:  # a negative step makes states grow without bound
        tensors["dt"] = dt.abs()
        for name in ("dt_weight", "dt_bias"):
            if tensors.get(name) is not None:
                tensors[name] = tensors[name].abs()
        return
    tokens = case["height"] * case["width"]
    if case["masked"] == 0 or tokens == 0:
        return
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    chosen = torch.randperm(tokens, generator=generator)[: case["masked"]]
    dt = dt.clone()
    dt[:, chosen // case["width"], chosen % case["width"]] = -torch.inf
    tensors["dt"] = dt
    if weight is not None:  # 0 times -inf would be NaN, in the reference as well: also the gradient of the weight
        tensors["dt_weight"] = weight.abs().clamp(min=2.0**-14)
        case["frozen"] = sorted({*case["frozen"], "dt_weight"})


def build(case: dict) -> tuple[dict, dict]:
    """Tensors and options of an op's case."""
    name, image, dim = case["op"], (case["batch"], case["height"], case["width"]), case["dim"]
    groups = case.get("groups")
    grouped = (groups, dim) if groups else (dim,)
    if name == "grouped_selective_scan":
        count = len(case["directions"])
        case["absent"] = sorted({*case["absent"], *(["norm_weight", "norm_bias"] if "norm" in case["absent"] else [])})
        shapes, means = _scan_case(case, (count,), (*image, count, dim))
        shapes |= {"z": (*image, count, dim), "norm_weight": (count, dim), "norm_bias": (count, dim)}
        shapes |= {"gate": (case["batch"], count, dim)}
        means |= {"norm_weight": (1.0, 0.2), "norm_bias": (0.0, 0.2), "gate": (0.5, 0.2)}
        options = {"directions": case["directions"], "softplus": case["softplus"], "norm_eps": case["eps"]}
    elif name == "cross_selective_scan":
        scans = (*((groups,) if groups else ()), len(case["directions"]))
        shapes, means = _scan_case(case, scans, (*image, *grouped))
        options = {"directions": case["directions"], "softplus": case["softplus"]}
    elif name == "depthwise_conv3x3":
        shapes, means = {"x": (*image, *grouped), "weight": (*grouped, 3, 3), "bias": grouped}, {}
        options = {"activation": case["activation"]}
    elif name == "layer_norm_pool":
        shapes, means = {"x": (*image, dim), "weight": (dim,), "bias": (dim,)}, {"weight": (1.0, 0.2)}
        options = {"eps": case["eps"]}
    else:
        channels = math.prod(grouped)
        shapes = {"x": (*image, channels), "o": (*image, *grouped), "scale": (1,), "weight": (channels,)}
        shapes |= {"bias": (channels,), "gate": (case["batch"], channels)}
        means = {"scale": (1.0, 0.1), "weight": (1.0, 0.2), "gate": (0.5, 0.2)}
        options = {"eps": case["eps"]}
    tensors = _inputs(case, shapes, means)
    if "dt" in tensors:
        _masked(case, tensors)
    return tensors, options
