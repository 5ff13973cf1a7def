# SPDX-License-Identifier: Apache-2.0
"""The comparison of a generated case with the float64 reference.

The tolerance is measured for each case: how far the results of the reference move when every input, and the output's
gradient, moves by one unit in its last place at random; to that come one unit in the last place of the result, and as
many roundings of the arithmetic as sum up at random over the image. A result may be off by `LIMIT` times that.

What moves with the inputs leaves out two things, and for cases that are off by more the tolerance is measured again:

- Few draws say little where one number decides a whole slice of a result, as a token does in the gradient of a weight
  if it is the only one: all of them may be near 0 by chance. `MORE` draws are not.
- Intermediates are rounded too. What cancels later, as a norm's gradient does along its input, or 1 + erf far below 0,
  keeps the rounding and loses the rest, whatever the inputs do; and of what is 0 but for roundings nothing else is
  left. So the reference computes these draws in the type that the ops compute in, see `_Rounded`.
"""

from __future__ import annotations

import copy
import json
import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.token_norm import TokenNorm
from support.generated_cases import DTYPES, OPS, build, laid_out

DRAWS = 3  # of movements by one unit in the last place
MORE = 24  # of movements of inputs and intermediates, where the first are too small
LIMIT = 16.0


def _moved(t: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Float64 values one unit in the last place of ``dtype`` off, up or down at random."""
    sign = torch.randint(0, 2, t.shape, generator=generator, dtype=torch.int8).double() * 2 - 1
    info = torch.finfo(dtype)
    step = sign * torch.maximum(t.abs() * info.eps, torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64))
    return torch.where(t.isfinite(), t + step, t)


class _Rounded(TorchFunctionMode):
    """Rounds what torch computes in one step as an implementation may: one plus a number near -1 or 0 to one unit in
    the last place of 1, a norm's mean to one of its own. The other roundings are those of the type.

    Args:
        coarse: also in the softplus, and in its derivative, as the ops do in 16 bits on CUDA.
    """

    def __init__(self, generator: torch.Generator, coarse: bool):
        super().__init__()
        self.generator, self.coarse = generator, coarse

    def _unit(self, t: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, t.shape, generator=self.generator, dtype=torch.int8).to(t.dtype) * 2 - 1
        return sign * torch.finfo(t.dtype).eps

    def _rounded_mean(self, x, shape, weight=None, bias=None, eps=1e-5) -> torch.Tensor:
        variance, mean = torch.var_mean(x.detach(), dim=list(range(-len(shape), 0)), correction=0, keepdim=True)
        moved = self._unit(x) * mean * torch.rsqrt(variance + eps)
        return moved if weight is None else moved * weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.gelu:  # x times 1 + erf
            return out + args[0] * self._unit(out)
        if func is F.layer_norm:
            return out + self._rounded_mean(*args, **(kwargs or {}))
        if func is torch.logaddexp and self.coarse:
            noise = self._unit(out) + self._unit(out) * (args[0] - args[0].detach())  # of the value, of the derivative
            return torch.where(args[0].isfinite(), out + noise, out)
        return out


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
        placed = [laid_out(g.to(o.device, o.dtype), layout or "plain") for g, o in zip(given, outputs, strict=True)]
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
    got: torch.Tensor,
    truth: torch.Tensor,
    movements: list[torch.Tensor],
    tokens: int,
    size: float = 0.0,
    part: torch.Tensor | None = None,
) -> float:
    """The largest error in units of the case's own tolerance, over the norms of `_norms`.

    Args:
        tokens: of an image, how many steps a scan takes and how many terms a sum has.
        size: of the numbers that were added up to ``got``, where that is larger than ``got``.
        part: the largest of several that were stored in the type of ``got`` and then added up to it.
    """
    dtype, info = got.dtype, torch.finfo(got.dtype)
    got = got.detach().double().cpu()
    largest = truth.abs() if part is None else truth.abs().maximum(part)
    fits = largest < 0.5 * info.max  # larger ones may be infinite, and NaN where they are a sum of such parts
    if (fits & ~got.isfinite()).any():
        return math.inf
    difference = torch.where(fits, got - truth, 0.0)
    truth = torch.where(fits, truth, 0.0)
    movements = [torch.where(fits, m, 0.0) for m in movements]
    # Below the smallest normal number the unit in the last place no longer shrinks, and exponentials become 0 before
    # what they are multiplied by makes their product larger again.
    tiny = info.smallest_normal * (info.eps if dtype == torch.float16 else 2.0**16)
    # The result's own rounding, and that of states and sums, one after the other in float32 or float64.
    rounding = info.eps + math.sqrt(tokens) * min(info.eps, torch.finfo(torch.float32).eps)
    worst = 0.0
    for error, norm, *moved in zip(_norms(difference), _norms(truth), *map(_norms, movements), strict=True):
        count = max(truth.numel() // max(len(error), 1), 1)
        movement = torch.stack(moved).square().mean(0).sqrt()
        scale = movement + rounding * norm.clamp(min=size) + tiny * math.sqrt(count)
        worst = max(worst, (error / scale).nan_to_num(math.inf).max().item() if len(error) else 0.0)
    return worst


def _relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    difference = torch.where(truth.abs() < 0.5 * torch.finfo(got.dtype).max, got.detach().double().cpu() - truth, 0.0)
    return (difference.norm() / truth.norm()).item() if truth.norm() > 0 else difference.norm().item()


def _compare(
    case: dict, native, reference, tensors: dict, stored: dict, linear=None, largest_parts=None
) -> dict[str, float]:
    """Ratios of `_ratio` by the result's name; AssertionError where one is above the limit or a dtype is wrong.

    Args:
        native, reference: from the dictionary of tensors to the output.
        tensors: float64, on the CPU, in the dense order.
        stored: the same values as the op gets them.
        linear: the reference without its activation, where that has a tail.
        largest_parts: from the output's gradient to what `_ratio` calls ``part``, by the result's name.
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
    for name, expected in truth.items():
        got = actual[name]
        assert got.shape == expected.shape, f"{name} is {tuple(got.shape)}, not {tuple(expected.shape)}"
        source = stored.get(name[1:]) if name.startswith("d") else None
        assert source is None or got.dtype == source.dtype, f"{name} has {got.dtype}, its input {source.dtype}"

    infinite = largest_parts is not None and any(not t.isfinite().all() for t in actual.values())
    parts = largest_parts(wide) if infinite else {}

    def ratio(name: str) -> float:
        # A norm follows the scale, so its gradient is a sum that cancels: it is compared with what such a sum is by
        # chance.
        chance = before[name].norm().item() if before else 0.0
        if name.endswith("scale"):
            sizes = [
                g.norm() * truth[o].norm() / math.sqrt(max(g.numel(), 1)) for g, o in zip(wide, truth, strict=False)
            ]
            chance = max(sizes).item() / tensors[name[1:]].abs().item()
        moved, tokens = [m[name] for m in movements], case["height"] * case["width"]
        return (
            _ratio(actual[name], truth[name], moved, tokens, chance, parts.get(name)) if actual[name].numel() else 0.0
        )

    ratios = {name: ratio(name) for name in truth}
    if any(LIMIT < r < math.inf for r in ratios.values()):
        movements += _rounded_movements(reference, tensors, stored, wanted, wide, shapes, truth, case["seed"] + 3)
        ratios = {name: ratio(name) for name in truth}
    for name, off in ratios.items():
        error = _relative(actual[name], truth[name]) if off > LIMIT else 0.0
        assert off <= LIMIT, (
            f"{name} is off by {off:.3g} times what one unit in the last place of the inputs moves (allowed: "
            f"{LIMIT:g}); relative error {error:.3g}"
        )
    return ratios


def _rounded_movements(
    reference, tensors: dict, stored: dict, wanted: list[str], wide: list[torch.Tensor], shapes, truth: dict, seed: int
) -> list[dict]:
    """`MORE` movements of the results where inputs and intermediates move, as `_compare` has them.

    Of float64 they are those of float32, made smaller: the reference's own roundings, which are the same in each draw,
    would stand on both sides of the difference.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, work = shapes[0].dtype, torch.float32
    coarse = dtype.itemsize == 2 and shapes[0].is_cuda
    types = {
        n: None if t is None else torch.float32 if t.dtype == torch.float64 else t.dtype for n, t in stored.items()
    }
    unit = torch.finfo(dtype).eps / torch.finfo(work).eps if dtype == torch.float64 else 1.0
    movements = []
    for _ in range(MORE):
        near = {n: None if t is None else _moved(t, types[n], generator).to(work) for n, t in tensors.items()}
        grads = [
            _moved(g, work if dtype == torch.float64 else o.dtype, generator).to(work)
            for g, o in zip(wide, shapes, strict=True)
        ]
        with _Rounded(generator, coarse):
            moved = _run(reference, near, wanted, grads)
        differences = {n: unit * (moved[n].detach().double() - t) for n, t in truth.items()}
        # What overflows on the way in float32 says nothing.
        movements.append({n: torch.where(d.isfinite(), d, 0.0) for n, d in differences.items()})
    return movements


def _op_case(case: dict, device: str) -> dict[str, float]:
    tensors, options = build(case)
    storages: dict[int, torch.Tensor] = {}
    stored = {name: None if t is None else _placed(t, device, storages) for name, t in tensors.items()}
    wide = {name: None if t is None else t.double().contiguous() for name, t in tensors.items()}
    native, reference = getattr(ext, case["op"]), getattr(ext.reference, case["op"])
    linear = None
    if options.get("activation") == "gelu":
        linear = lambda t: reference(**t)  # noqa: E731
    parts = None
    if case["op"] == "cross_selective_scan" and device == "cuda":
        parts = lambda given: _largest_of_directions(case, wide, options, given)  # noqa: E731
    return _compare(
        case, lambda t: native(**t, **options), lambda t: reference(**t, **options), wide, stored, linear, parts
    )


def _largest_of_directions(case: dict, tensors: dict, options: dict, given: list[torch.Tensor]) -> dict:
    """The largest number that a direction adds to each element of the output and of du.

    On CUDA the directions of a cross scan are stored one by one before they are added up. In float16 one of them may
    be infinite where the sum is not.
    """
    scans, largest = 1 if case["groups"] else 0, {}
    wanted = [] if "u" in case["frozen"] else ["u"]
    for k, direction in enumerate(options["directions"]):
        one = {
            n: t if t is None or n == "u" else t.narrow(scans + (3 if n in ("dt", "B", "C") else 0), k, 1)
            for n, t in tensors.items()
        }
        run = lambda t, way=direction: ext.reference.cross_selective_scan(**t, **{**options, "directions": [way]})  # noqa: E731
        for name, t in _run(run, one, wanted, given).items():
            part = t.detach().abs()
            largest[name] = largest[name].maximum(part) if name in largest else part
    return largest


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
        x = laid_out(x, layout)
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
