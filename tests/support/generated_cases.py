# SPDX-License-Identifier: Apache-2.0
"""Inputs of every op and of the layers drawn at random, and their comparison with the float64 reference.

A case is a dictionary of plain values, printed as one line of JSON that replays it. It says shapes (with 0 and 1, odd
widths), dtypes of images and parameters, how each tensor lies in memory, the sizes of its values, which tokens are
masked and which gradients are asked for; numbers come from its seed.

The tolerance is measured for each case: how far the results of the reference move when every input, and the output's
gradient, moves by one unit in its last place at random; to that come one unit in the last place of the result, and as
many roundings of the arithmetic as sum up at random over the image. A result may be off by `LIMIT` times that.
"""

from __future__ import annotations

import copy
import json
import math

import torch
from hypothesis import strategies as st

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.token_norm import TokenNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DRAWS = 3  # of movements by one unit in the last place
LIMIT = 16.0

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


def _laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
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
            tensors[name] = _laid_out(stored, layout)
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


def _build(case: dict) -> tuple[dict, dict]:
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


# comparison ---------------------------------------------------------------------------------------


def _moved(t: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Float64 values one unit in the last place of ``dtype`` off, up or down at random."""
    sign = torch.randint(0, 2, t.shape, generator=generator, dtype=torch.int8).double() * 2 - 1
    info = torch.finfo(dtype)
    step = sign * torch.maximum(t.abs() * info.eps, torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64))
    return torch.where(t.isfinite(), t + step, t)


def _run(function, tensors: dict, wanted: list[str], given: list[torch.Tensor], *, layout: str | None = None) -> dict:
    """Outputs and the gradients that are wanted, by name. Parameters of a module are asked in place.

    Without ``layout`` (the reference) inputs that an empty image does not use have a gradient of 0.
    """
    leaves = {n: t if t is None or isinstance(t, torch.nn.Parameter) else t.detach() for n, t in tensors.items()}
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(name in wanted)
    out = function(leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    results = {f"out{i}" if i else "out": o for i, o in enumerate(outputs)}
    if wanted:
        asked = [leaves[name] for name in wanted]
        placed = [_laid_out(g.to(o.device, o.dtype), layout or "plain") for g, o in zip(given, outputs, strict=True)]
        if layout is None:
            zero = sum(leaf.nan_to_num(0.0, 0.0, 0.0).sum() * 0 for leaf in asked)
            outputs = [o + zero for o in outputs]
        grads = torch.autograd.grad(
            outputs, asked, placed, allow_unused=layout is None, materialize_grads=layout is None
        )
        results |= {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return results


def _norms(t: torch.Tensor) -> list[torch.Tensor]:
    """Norms of all of a tensor, and of its slices along each dimension that hold at least 8 numbers."""
    squares = t.square()
    sums = [squares.sum()[None]]
    for dim in range(t.dim()):
        if t.numel() // max(t.shape[dim], 1) >= 8:
            sums.append(squares.sum([d for d in range(t.dim()) if d != dim]))
    return [s.sqrt() for s in sums]


def _ratio(
    got: torch.Tensor, truth: torch.Tensor, movements: list[torch.Tensor], tokens: int, size: float = 0.0
) -> float:
    """The largest error in units of the case's own tolerance, over the norms of `_norms`.

    Args:
        tokens: of an image, how many steps a scan takes and how many terms a sum has.
        size: of the numbers that were added up to ``got``, where that is larger than ``got``.
    """
    info = torch.finfo(got.dtype)
    got = got.detach().double().cpu()
    fits = truth.abs() < 0.5 * info.max  # larger ones may be infinite
    nan = got.isnan() | (fits & ~got.isfinite())
    if nan.any():
        return math.inf
    difference = torch.where(fits, got - truth, 0.0)
    truth = torch.where(fits, truth, 0.0)
    movements = [torch.where(fits, m, 0.0) for m in movements]
    # Below the smallest normal number the unit in the last place no longer shrinks, and exponentials become 0 before
    # what they are multiplied by makes their product larger again.
    tiny = info.smallest_normal * (info.eps if got.dtype == torch.float16 else 2.0**16)
    # The result's own rounding, and that of states and sums, one after the other in float32 or float64.
    rounding = info.eps + math.sqrt(tokens) * min(info.eps, torch.finfo(torch.float32).eps)
    worst = 0.0
    for error, norm, *moved in zip(_norms(difference), _norms(truth), *map(_norms, movements), strict=True):
        count = max(truth.numel() // max(len(error), 1), 1)
        movement = torch.stack(moved).square().mean(0).sqrt()
        scale = movement + rounding * norm.clamp(min=size) + tiny * math.sqrt(count)
        worst = max(worst, (error / scale).max().item() if len(error) else 0.0)
    return worst


def _relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    difference = torch.where(truth.abs() < 0.5 * torch.finfo(got.dtype).max, got.detach().double().cpu() - truth, 0.0)
    return (difference.norm() / truth.norm()).item() if truth.norm() > 0 else difference.norm().item()


def _compare(case: dict, native, reference, tensors: dict, stored: dict, linear=None) -> dict[str, float]:
    """Ratios of `_ratio` by the result's name; AssertionError where one is above the limit or a dtype is wrong.

    Args:
        native, reference: from the dictionary of tensors to the output.
        tensors: float64, on the CPU, in the dense order.
        stored: the same values as the op gets them.
        linear: the reference without its activation, where that has a tail.
    """
    wanted = [name for name, t in stored.items() if t is not None and name not in case["frozen"]]
    generator = torch.Generator().manual_seed(case["seed"] + 2)
    with torch.no_grad():
        shapes = native(stored)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    given = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in shapes]
    wide = [g.double() for g in given]
    truth = {name: t.detach() for name, t in _run(reference, tensors, wanted, wide).items()}
    assert all(t.isfinite().all() for t in truth.values()), "the reference is not finite: the case is ill-made"
    movements = []
    for _ in range(DRAWS):
        near = {n: None if t is None else _moved(t, stored[n].dtype, generator) for n, t in tensors.items()}
        grads = [_moved(g, o.dtype, generator) for g, o in zip(wide, shapes, strict=True)]
        moved = _run(reference, near, wanted, grads)
        movements.append({name: moved[name].detach() - t for name, t in truth.items()})
    layout = case.get("output_gradient", "plain")
    if layout == "expanded":  # the same gradient for all of the first dimension
        given = [g[:1].expand(g.shape) if len(g) else g for g in given]
        wide = [g.double() for g in given]
        truth |= {n: t.detach() for n, t in _run(reference, tensors, wanted, wide).items() if n.startswith("d")}
    actual = _run(native, stored, wanted, given, layout=layout)
    assert actual.keys() == truth.keys()
    # 1 + erf cancels far below 0, here as in torch's own: such results are compared with what went in.
    before = {} if linear is None else _run(linear, tensors, wanted, wide)
    ratios, limit = {}, LIMIT
    for name, expected in truth.items():
        got = actual[name]
        assert got.shape == expected.shape, f"{name} is {tuple(got.shape)}, not {tuple(expected.shape)}"
        source = stored.get(name[1:]) if name.startswith("d") else None
        assert source is None or got.dtype == source.dtype, f"{name} has {got.dtype}, its input {source.dtype}"
        # A norm follows the scale, so its gradient is a sum that cancels: it is compared with what such a sum is by
        # chance.
        chance = before[name].norm().item() if before else 0.0
        if name.endswith("scale"):
            sizes = [
                g.norm() * truth[o].norm() / math.sqrt(max(g.numel(), 1)) for g, o in zip(wide, truth, strict=False)
            ]
            chance = max(sizes).item() / tensors[name[1:]].abs().item()
        moved, tokens = [m[name] for m in movements], case["height"] * case["width"]
        ratios[name] = _ratio(got, expected, moved, tokens, chance) if got.numel() else 0.0
        error = _relative(got, expected) if got.numel() else 0.0
        assert ratios[name] <= limit, (
            f"{name} is off by {ratios[name]:.3g} times what one unit in the last place of the inputs moves (allowed: "
            f"{limit:g}); relative error {error:.3g}"
        )
    return ratios


def _op_case(case: dict, device: str) -> dict[str, float]:
    tensors, options = _build(case)
    storages: dict[int, torch.Tensor] = {}
    stored = {name: None if t is None else _placed(t, device, storages) for name, t in tensors.items()}
    wide = {name: None if t is None else t.double().contiguous() for name, t in tensors.items()}
    native, reference = getattr(ext, case["op"]), getattr(ext.reference, case["op"])
    linear = None
    if options.get("activation") == "gelu":
        linear = lambda t: reference(**t)  # noqa: E731
    return _compare(case, lambda t: native(**t, **options), lambda t: reference(**t, **options), wide, stored, linear)


def _placed(t: torch.Tensor, device: str, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """``t`` on ``device`` with the same strides and offset, what lies between, and what it shares with others."""
    if device == "cpu":
        return t
    key = t.untyped_storage().data_ptr()
    if key not in storages:
        storages[key] = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return storages[key].as_strided(t.shape, t.stride(), t.storage_offset())


def _module_case(case: dict, device: str) -> dict[str, float]:
    """The layer or the feed-forward network, with its parameters among the inputs."""
    torch.manual_seed(case["seed"])
    dtype, net = DTYPES[case["dtype"]], Layer(case).double()
    with torch.no_grad():
        for parameter in net.parameters():  # away from initial zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype))
    shape = (case["batch"], case["groups"] * case["dim"], case["height"], case["width"])
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    layout = case["layout"]
    if layout == "image":
        x = x[0] if case["batch"] else x
    elif layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout != "contiguous":
        x = _laid_out(x, layout)
    names = [name for name, _ in net.named_parameters()]
    wide = {"x": x.double().contiguous(), **{name: p.detach() for name, p in net.named_parameters()}}
    low = copy.deepcopy(net).to(device, dtype)
    stored = {"x": _placed(x, device, {}), **dict(low.named_parameters())}
    case = {**case, "frozen": names if "parameters" in case["frozen"] else case["frozen"]}

    def reference(tensors):
        parameters = {name: tensors[name] for name in names}
        with ext.backend("reference"):
            return torch.func.functional_call(net, parameters, (tensors["x"], case["residual"]))

    return _compare(case, lambda t: low(t["x"], case["residual"]), reference, wide, stored)


class Layer(torch.nn.Module):
    """The layer, or the feed-forward network behind its norm, on (batch, dim, H, W) or (dim, H, W)."""

    def __init__(self, case: dict):
        super().__init__()
        dim, self.is_layer = case["groups"] * case["dim"], case["op"] == "layer"
        if self.is_layer:
            directions, cross = case["directions"], case["scan"] == "cross"
            self.layer = GroupedMamba2d(
                dim, variant=case["variant"], scan=case["scan"], affinity=case["affinity"], d_state=case["states"],
                d_conv=case["conv"], expand=case["expand"], reduction=4, groups=case["groups"],
                directions=directions[:4] if cross else directions[: case["groups"]],
                gate_source=case["gate_source"] if case["affinity"] else "input",
            )  # fmt: skip
        else:
            self.norm, self.mlp = TokenNorm(dim, eps=1e-5), ConvFeedForward(dim, case["ratio"] * dim)

    def forward(self, x: torch.Tensor, residual: bool) -> torch.Tensor:
        if self.is_layer:
            return self.layer(x, residual=residual)
        image = x if x.dim() == 4 else x[None]
        return self.mlp(image.permute(0, 2, 3, 1), self.norm, residual=residual)


def check(case: dict, device: str) -> dict[str, float]:
    """Runs a case: the error of each result, in units of the case's own tolerance.

    Raises:
        AssertionError: a result is off by more than allowed, not finite, or of another shape or dtype.
    """
    case = json.loads(json.dumps(case))  # a copy, as a replayed one is
    if device == "cuda" and case["dtype"] == "float64":  # which CUDA has through the reference alone
        case["dtype"] = "float16"
    run = _op_case if case["op"] in OPS else _module_case
    return run(case, device)
