# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel once, forward and backward, on small ragged shapes, without a reference: for the sanitizers.

`python tools/sanitize.py gpu` runs it in slices under each of them.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d
from groupmamba.layers.drop_path import DropPathMask
from groupmamba_ext import _load
from groupmamba_ext.ops.batch_norm_fold import batch_norm_fold
from groupmamba_ext.ops.batch_norm_relu import batch_norm_relu
from groupmamba_ext.ops.narrow_conv import narrow_conv, narrow_conv_relu
from groupmamba_ext.ops.pixels_to_channels import pixels_to_channels
from groupmamba_ext.ops.token_norm import token_norm
from support.common import group_major, padded_channels
from support.inputs import (
    ONE_KERNEL,
    conv_inputs,
    convolution,
    cross_inputs,
    feed_forward,
    modulated_inputs,
    pool_inputs,
)
from support.inputs import batch_norm_inputs as norm_inputs
from support.scan import IMAGES, filling_batch
from support.scan import inputs as scan_inputs

SCANS = [  # dim, rank, states, h, w: the portable kernels, aligned and not
    (3, 1, 1, 5, 7), (16, None, 1, 9, 11), (87, 6, 2, 7, 9), (20, 2, 3, 11, 13), (128, 8, 2, 6, 9), (3, 1, 1, 43, 43),
    # the TMA kernels: whole tiles, ragged columns, runs of columns, one token; rows of channels copied
    (16, 1, 1, 56, 56), (32, 2, 1, 14, 16), (88, 6, 1, 14, 14), (64, 6, 1, 56, 2), (128, 14, 1, 56, 14),
    (13, 1, 1, 60, 50), (20, 2, 1, 9, 11), (87, 6, 1, 14, 14), (16, 1, 1, 60, 50), (24, 2, 1, 29, 31),
    (112, 7, 1, 7, 7), (48, 3, 1, 1, 1), (16, 1, 1, 230, 5),
    # planes of more tiles than a segment, shared like all those above of more than one tile
    (16, 1, 1, 30, 600), (128, 14, 1, 33, 29),
]  # fmt: skip
MANY_STATES = [  # the kernels for several states, which ask for many planes
    (16, 1, 16, 9, 13), (6, None, 64, 5, 7), (87, 6, 17, 9, 11), (112, 7, 16, 7, 7), (128, 8, 16, 6, 9),
    (1, 1, 5, 3, 3), (32, 2, 40, 9, 14),
]  # fmt: skip
MANY_IMAGES = [(24, 2, 1, 15, 16), (112, 7, 1, 7, 7)]  # planes that are not shared
CROSS = [  # dim, rank, states, h, w
    (3, 1, 1, 5, 7), (16, 1, 1, 56, 56), (40, 2, 3, 29, 31), (87, 6, 1, 7, 9), (16, None, 1, 9, 11), (32, 2, 2, 90, 91),
    (132, 3, 1, 6, 5), (96, 6, 1, 9, 17), (192, 6, 1, 14, 14),
    (16, 1, 1, 30, 300),
    # steps by tensor cores: one to four tiles of features, slices, channels that no lane has, runs of columns
    (112, 28, 1, 7, 7), (228, 15, 1, 9, 5), (100, 7, 1, 29, 31),
]  # fmt: skip

# batch, channels of a group, h, w: by tensor cores in 16 bits, of 8, 4 and 2 octets
CONVOLUTIONS_OF_MANY_IMAGES = [(47, 88, 3, 13), (46, 32, 2, 27), (50, 16, 4, 50)]
MANY_IMAGES_OF_A_NETWORK = (140, 200, 264, (3, 13))  # batch, channels, hidden channels, h and w

# channels, taps, padding, batch, h, w
NARROW_CONVOLUTIONS = [
    (32, 3, 1, 2, 7, 40), (32, 3, 0, 1, 9, 135), (16, 4, 0, 3, 9, 20), (16, 4, 0, 1, 6, 140),
    (32, 3, 1, 140, 11, 9),
]  # fmt: skip

# dim, h, w: groups of 16, 32, 11, 87, 112 channels, and of 1 in the portable scan, padded to 8
LAYERS = [(64, 9, 14), (128, 9, 7), (44, 7, 5), (348, 6, 7), (448, 1, 1), (4, 5, 6)]
MANY_TOKENS = [(64, 91, 91), (348, 91, 91)]  # enough of them for the products that keep a weight in shared memory


def run_layers(dtype: torch.dtype, dim: int, h: int, w: int) -> None:
    """The ops of whole layers, whose images are padded, and their packing and sums of parameters."""
    x = torch.randn(2, dim, h, w, device="cuda").to(dtype).to(memory_format=torch.channels_last)
    for variant in ("released", "fused"):
        layer = GroupedMamba2d(dim, variant=variant).to("cuda", dtype, memory_format=torch.channels_last)
        run(lambda x, layer=layer: layer(x, residual=True), {"x": x})
    drop_path = DropPathMask(torch.tensor([1.0, 0.0], device="cuda"), 2.0)
    layer = GroupedMamba2d(dim).to("cuda", dtype)
    run(lambda x: layer(x, residual=True, drop_path=drop_path), {"x": x})
    modules = feed_forward(dim, 2 * dim + 2).to("cuda", dtype)
    mlp, norm = modules["mlp"], modules["norm"]
    for mask in (None, drop_path):
        run(lambda x, mask=mask: mlp(x, norm, residual=True, drop_path=mask), {"x": x.permute(0, 2, 3, 1)})


def run_feed_forward(dtype: torch.dtype, batch: int, dim: int, hidden: int, shape: tuple[int, int]) -> None:
    """The feed-forward network as one kernel, where there is one."""
    modules = feed_forward(dim, hidden).to("cuda", dtype)
    x = torch.randn(batch, *shape, dim, device="cuda").to(dtype)
    drop_path = DropPathMask(torch.arange(batch, device="cuda") % 2.0, 2.0)
    for mask in (None, drop_path):
        run(lambda x, mask=mask: modules["mlp"](x, modules["norm"], residual=True, drop_path=mask), {"x": x})


def run_feed_forward_kernel(dtype: torch.dtype, batch: int, dim: int, hidden: int, shape: tuple[int, int]) -> None:
    """That kernel alone: without gradients there is no product of cuBLAS beside it."""
    modules = feed_forward(dim, hidden).to("cuda", dtype)
    x = torch.randn(batch, *shape, dim, device="cuda").to(dtype)
    drop_path = DropPathMask(torch.arange(batch, device="cuda") % 2.0, 2.0)
    with torch.no_grad():
        for mask in (None, drop_path):
            modules["mlp"](x, modules["norm"], residual=True, drop_path=mask)
    torch.cuda.synchronize()


def run(function, tensors: dict, **options) -> None:
    with torch.no_grad():
        function(**tensors, **options)
    leaves = {k: None if v is None else v.detach().requires_grad_() for k, v in tensors.items()}
    out = function(**leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [torch.ones_like(o) for o in out])  # no kernel of torch's reads the results
    torch.cuda.synchronize()


class Case(NamedTuple):
    """What a sanitizer looks at.

    Args:
        name: of the case.
        call: runs it.
        products: it calls cuBLAS, at whose kernels for 16 bits racecheck ends with an error of its own, and whose
            results initcheck takes for memory that nothing wrote, since TMA stored them.
        tma: kernels read what the scan's own kernels stored by TMA. What initcheck does not see there, NaN in free
            memory shows: tests/ops/test_unwritten_memory.py.
    """

    name: str
    call: Callable[[], None]
    products: bool = False
    tma: bool = False

    def is_left_out(self, tool: str) -> bool:
        """Whether this sanitizer can't judge it."""
        return (self.products and tool in ("racecheck", "initcheck")) or (self.tma and tool == "initcheck")


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Those for images of one dtype."""
    name = str(dtype).removeprefix("torch.")
    narrow = dtype.itemsize == 2
    for shape in SCANS:
        dim, rank, states = shape[:3]
        tma = narrow and dim > 8 and dim % 8 != 0 and rank is not None and states == 1  # results are copied
        for layout in (None, group_major, padded_channels):
            yield Case(
                f"scan {shape} {name} {layout.__name__ if layout else ''}",
                functools.partial(scan, dtype, layout, *shape),
                tma=tma,
            )
    for shape in MANY_STATES:
        for layout in (None, group_major, padded_channels):
            batch = filling_batch("cuda", shape[0])
            yield Case(
                f"scan of several states {shape} {name} {layout.__name__ if layout else ''}",
                functools.partial(scan, dtype, layout, *shape, batch=batch),
            )
    for shape in ((40, 2, 16, 9, 11), (132, 3, 5, 6, 5)):
        yield Case(
            f"cross scan of several states {shape} {name}", functools.partial(cross_scan, dtype, *shape, batch=60)
        )
    for shape in MANY_IMAGES:
        yield Case(f"scan of many images {shape} {name}", functools.partial(scan, dtype, None, *shape, batch=128))
    for shape in CROSS:
        tma = narrow and shape[0] > 8 and shape[1] is not None and shape[2] == 1
        yield Case(f"cross scan {shape} {name}", functools.partial(cross_scan, dtype, *shape), tma=tma)
    for channels, h, w in ((1, 3, 5), (16, 7, 7), (87, 14, 9), (130, 5, 33)):
        yield Case(f"convolution {channels, h, w} {name}", functools.partial(convolutions, dtype, channels, h, w))
    for batch, channels, h, w in CONVOLUTIONS_OF_MANY_IMAGES:
        call = functools.partial(convolutions, dtype, channels, h, w, batch=batch)
        yield Case(f"convolution of many images {channels, h, w} {name}", call)
    for groups, dim in ((1, 5), (4, 16), (4, 87), (4, 112), (3, 400), (4, 513)):
        yield Case(f"norms {groups, dim} {name}", functools.partial(norms, dtype, groups, dim))
    for channels in (5, 96, 512):
        yield Case(f"token norm {channels} {name}", functools.partial(token_norms, dtype, channels))
    for shape in ((2, 8, 1, 1), (2, 32, 19, 21), (1, 264, 5, 7), (1, 2048, 3, 2)):
        yield Case(f"batch norm {shape} {name}", functools.partial(batch_norm, dtype, *shape))
    for shape in LAYERS + (MANY_TOKENS if dtype == torch.bfloat16 else []):
        yield Case(f"layers {shape} {name}", functools.partial(run_layers, dtype, *shape), products=narrow)
    yield Case(f"wide layer {name}", functools.partial(wide_layer, dtype), products=narrow)
    for case in ONE_KERNEL:
        call = functools.partial(run_feed_forward, dtype, *case)
        yield Case(f"feed-forward {case} {name}", call, products=narrow)
    call = functools.partial(run_feed_forward, dtype, *MANY_IMAGES_OF_A_NETWORK)
    yield Case(f"feed-forward {MANY_IMAGES_OF_A_NETWORK} {name}", call, products=narrow)


def all_cases() -> list[Case]:
    """Of both dtypes, and of the kernels that float32 has not."""
    found = [case for dtype in (torch.bfloat16, torch.float32) for case in cases(dtype)]
    for case in ONE_KERNEL:
        call = functools.partial(run_feed_forward_kernel, torch.bfloat16, *case)
        found.append(Case(f"feed-forward kernel {case} bfloat16", call))
    _load.load_ops()
    for shape in NARROW_CONVOLUTIONS if _load.has_sm90a(torch.device("cuda", 0)) else ():
        call = functools.partial(narrow_convolution, torch.bfloat16, *shape)
        found.append(Case(f"narrow convolution {shape} bfloat16", call))
    return found


def scan(dtype, layout, dim, rank, states, h, w, batch=1) -> None:
    tensors = scan_inputs("cuda", dtype, batch=batch, h=h, w=w, dim=dim, n=states, rank=rank)
    if layout is not None:
        tensors = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    run(ext.grouped_selective_scan, tensors)


def cross_scan(dtype, dim, rank, states, h, w, batch=1) -> None:
    tensors = cross_inputs("cuda", dtype, batch=batch, h=h, w=w, dim=dim, n=states, rank=rank)
    run(ext.cross_selective_scan, tensors)
    run(ext.cross_selective_scan, {k: padded_channels(v) if k in IMAGES else v for k, v in tensors.items()})


def convolutions(dtype, channels, h, w, batch=2) -> None:
    for activation in (None, "silu", "gelu"):
        tensors = conv_inputs("cuda", dtype, batch=batch, groups=3, channels=channels, h=h, w=w)
        run(ext.depthwise_conv3x3, tensors, activation=activation)
        tensors["x"] = group_major(tensors["x"])
        run(ext.depthwise_conv3x3, tensors, activation=activation)


def norms(dtype, groups, dim) -> None:
    run(ext.layer_norm_pool, pool_inputs("cuda", dtype, channels=groups * dim))
    tensors = modulated_inputs("cuda", dtype, groups=groups, dim=dim)
    run(ext.modulated_layer_norm, tensors)
    tensors["o"] = group_major(tensors["o"])
    run(ext.modulated_layer_norm, tensors)


def token_norms(dtype, channels) -> None:
    x, x_bias = torch.randn(2, 3, 7, channels, device="cuda").to(dtype), torch.randn(channels, device="cuda")
    weight, bias = torch.randn(2, channels, device="cuda").unbind()
    tensors = {"x": x, "weight": weight, "bias": bias, "x_bias": x_bias}
    run(functools.partial(token_norm, eps=1e-5), tensors)


def batch_norm(dtype, batch, channels, h, w) -> None:
    run(lambda **t: batch_norm_relu(**t, eps=1e-5)[0], norm_inputs(batch, channels, h, w, dtype))
    _, weight, norm = convolution(channels, 3, 3, dtype, torch.float32, torch.channels_last)
    for blocks in (False, True):
        batch_norm_fold(weight.to(dtype), weight, norm, 1e-5, blocks=blocks)
    for c in (1, 3):
        image = torch.randn(batch, c, h, w, device="cuda").to(dtype)
        for into in (torch.float16, torch.bfloat16):
            pixels_to_channels(image, 7, into)


def narrow_convolution(dtype, channels, taps, padding, batch, h, w) -> None:
    x = torch.randn(batch, h, w, channels, device="cuda").to(dtype).permute(0, 3, 1, 2)
    weight = torch.randn(32, channels, taps, taps, device="cuda")
    learnt = {"weight": weight} if channels == 16 else {"weight": weight, "x": x}
    run(lambda weight, x=x: narrow_conv(x, weight, padding), learnt)
    narrow_conv_relu(x, weight, weight[:, 0, 0, 0].contiguous(), padding)


def wide_layer(dtype) -> None:
    """Shared planes behind a norm of rows in memory."""
    layer = GroupedMamba2d(1280, expand=0.25).to("cuda", dtype)
    run(layer, {"x": torch.randn(1, 1280, 30, 30, device="cuda").to(dtype)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", action="store_true", help="print how many cases there are")
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    parser.add_argument("--end", type=int, help="the case to stop before (default: none)")
    parser.add_argument("--tool", default="", help="leave out what this sanitizer can't judge")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="none begins after so long")
    options = parser.parse_args()
    found = all_cases()
    if options.count:
        print(len(found))
        return
    end = len(found) if options.end is None else options.end
    start, number = time.monotonic(), options.first
    while number < end and (number == options.first or time.monotonic() - start < options.seconds):
        case = found[number]
        left_out = case.is_left_out(options.tool)
        print(f"case {number}: {case.name}{', left out' if left_out else ''}", flush=True)
        torch.manual_seed(number)  # the same numbers, wherever a slice begins
        if not left_out:
            case.call()
        number += 1
    print(f"ran cases {options.first} to {number} of {len(found)}")


if __name__ == "__main__":
    main()
