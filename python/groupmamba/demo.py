# SPDX-License-Identifier: Apache-2.0
"""``groupmamba demo``: a photograph through the layer, forward and backward, checked, timed and drawn."""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import groupmamba_ext as ext
from groupmamba.layers import GroupedMamba2d
from groupmamba_ext._load import check_device_supported

DIM = 64
STRIDE = 4
WINDOW = 8
CROP = (12, 16)
TOLERANCE = 1e-4  # float32 against the float64 reference, relative
MODULES = ("matplotlib", "PIL", "sklearn", "tqdm")


@dataclass
class Timing:
    """One row of the printed table."""

    what: str
    device: str
    size: str
    milliseconds: float
    whole_image: bool


@dataclass
class Picture:
    """What the drawing shows; images are (H, W, ...) on the CPU, at the resolution of the tokens or the photograph."""

    photo: Tensor  # (rows, columns, 3) in [0, 1]
    directions: tuple[str, ...]
    responses: Tensor  # (H, W, G, 3) in [0, 1]
    output: Tensor  # (H, W, 3) in [0, 1]
    reach: Tensor  # (H, W, G), gradient norms
    marked: tuple[int, int]
    gates: Tensor  # (G, D)
    notes: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``groupmamba demo``."""
    parser.add_argument("image", nargs="?", type=Path, help="a photograph (default: scikit-learn's china.jpg)")
    parser.add_argument("--out", type=Path, default=Path("groupmamba_demo.png"), help="the PNG (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: the CPU, and the GPU if there is one)")
    parser.add_argument("--size", type=int, default=512, help="longer side of the image in pixels (default: 512)")


def require_extras() -> None:
    """ModuleNotFoundError that names the cure where a package of the demo is missing."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"groupmamba demo needs {error.name}, which is not installed: pip install 'groupmamba[demo]'",
                name=error.name,
            ) from error


def load_photo(path: Path | None, size: int) -> Tensor:
    """The photograph, (rows, columns, 3) in [0, 1], its longer side about ``size`` and both multiples of the stride."""
    import numpy as np
    from PIL import Image, ImageOps

    if size < STRIDE * max(CROP):
        raise ValueError(f"--size must be at least {STRIDE * max(CROP)} pixels, got {size}")
    if path is None:
        from sklearn.datasets import load_sample_image

        photo = Image.fromarray(load_sample_image("china.jpg"))
    else:
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = size / max(photo.size)
    width, height = (max(round(side * scale / STRIDE), 1) * STRIDE for side in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels / 255)


def embed(photo: Tensor) -> Tensor:
    """Features of overlapping 8x8 windows, (1, DIM, H, W): what a trained stem would feed the layer, without training.

    The lowest cosine coefficients of brightness (32) and of two colour differences (16 each), scaled to equal
    deviations, weakened towards high frequencies, and mixed by a fixed random rotation, so that every group sees
    colours and textures.
    """
    cosines = torch.cos(torch.arange(WINDOW)[:, None] * (torch.arange(WINDOW) + 0.5) * math.pi / WINDOW)
    order = sorted(((i, j) for i in range(WINDOW) for j in range(WINDOW)), key=lambda ij: (sum(ij), ij))
    basis = torch.stack([torch.outer(cosines[i], cosines[j]) for i, j in order]).unsqueeze(1)
    colours = torch.tensor([[0.3, 0.6, 0.1], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]])
    planes = ((photo - 0.5) @ colours.T).permute(2, 0, 1).unsqueeze(1)
    planes = F.pad(planes, (WINDOW // 4,) * 4, mode="reflect")
    coefficients = F.conv2d(planes, basis, stride=STRIDE)  # (3, 64, H, W)
    features = torch.cat([coefficients[0, :32], coefficients[1, :16], coefficients[2, :16]])
    frequencies = torch.tensor([sum(ij) for count in (32, 16, 16) for ij in order[:count]])
    features = features / (features.std((1, 2), keepdim=True) + 1e-6) / (1.0 + frequencies)[:, None, None]
    rotation, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)))
    return torch.einsum("dc,chw->dhw", rotation, features).unsqueeze(0).to(memory_format=torch.channels_last)


def random_layer() -> GroupedMamba2d:
    """A layer with fixed random weights of about unit gain and long memories.

    At the small gains and short memories that training starts from, what the scans carry hardly shows.
    """
    torch.manual_seed(0)
    layer = GroupedMamba2d(DIM, d_state=8)
    core = layer.mamba
    with torch.no_grad():
        for weight in (core.in_proj_weight, core.out_proj_weight, layer.proj.weight, layer.affinity.fc2.weight):
            weight.mul_(weight.shape[-1] ** -0.5 / 0.02)
        layer.affinity.fc1.weight.mul_(100)
        core.x_proj_weight.mul_(3)
        core.dt_weight.mul_(0.3)
        core.dt_bias.sub_(1.5)
        core.D.mul_(0.3)
    return layer


def forward_backward(layer: GroupedMamba2d, x: Tensor) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients, for the output itself as output gradient."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(y.detach())
    return {"output": y.detach(), "input gradient": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def check(layer: GroupedMamba2d, crop: Tensor) -> tuple[str, float]:
    """The quantity with the worst relative error of the compiled ops against the float64 reference, and that error.

    Without skip_scale, whose gradient cancels up to rounding, since a norm follows it.
    """
    actual = forward_backward(layer, crop)
    with ext.backend("reference"):
        expected = forward_backward(copy.deepcopy(layer).cpu().double(), crop.cpu().double())
    errors = {}
    for name, value in actual.items():
        if name != "skip_scale":
            error = ((value.cpu().double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)).item()
            errors[name] = error if math.isfinite(error) else math.inf
    worst = max(errors, key=errors.get)
    return worst, errors[worst]


def stopwatch(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of ``run``, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure(layer: GroupedMamba2d, x: Tensor, crop: Tensor, step: Callable[[str], None]) -> list[Timing]:
    """Times of the whole image (two rows), and of the crop with the compiled ops and with the reference (two rows)."""
    device = x.device.type
    rows = []

    def add(what: str, image: Tensor, run: Callable[[], object], repeats: int) -> None:
        step(f"{device}: {what}")
        size = " x ".join(map(str, image.shape[1:]))
        rows.append(Timing(what, device, size, stopwatch(run, image.device, repeats), image is x))

    with torch.no_grad():
        add("forward", x, lambda: layer(x), 5)
    add("forward + backward", x, lambda: forward_backward(layer, x), 5)
    add("forward + backward, crop", crop, lambda: forward_backward(layer, crop), 5)
    with ext.backend("reference"):
        add("the crop in plain PyTorch", crop, lambda: forward_backward(layer, crop), 1)
    return rows


def principal_colours(features: Tensor) -> Tensor:
    """The first three principal components of (H, W, C) features as red, green and blue, (H, W, 3) in [0, 1]."""
    rows = features.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)
    top = axes[:, -3:].flip(1)
    top = top * top.sum(0).sign()  # the sign of an eigenvector is arbitrary
    colours = rows @ top
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    return ((colours - low) / (high - low + 1e-12)).clamp(0, 1).view(*features.shape[:2], 3)


def inspect(layer: GroupedMamba2d, x: Tensor, photo: Tensor, notes: list[str]) -> Picture:
    """The layer's inner values on the image, and how strongly each input token reaches one output token."""
    tokens = x.permute(0, 2, 3, 1)
    with torch.no_grad():
        xn, pooled = ext.layer_norm_pool(tokens, layer.norm.weight, layer.norm.bias, layer.norm.eps)
        gates = layer.affinity.from_pooled(pooled)[0]
        output = layer(x)[0].permute(1, 2, 0)
    height, width = xn.shape[1:3]
    marked = (int(0.55 * height), int(0.5 * width))
    groups = xn.unflatten(-1, (len(layer.directions), -1)).requires_grad_()
    responses = layer.mamba(groups)
    responses[0, marked[0], marked[1]].sum().backward()
    reach = groups.grad[0].norm(dim=-1)
    responses = responses.detach()[0].cpu()
    return Picture(
        photo=photo,
        directions=layer.directions,
        responses=torch.stack([principal_colours(group) for group in responses.unbind(2)], 2),
        output=principal_colours(output.cpu()),
        reach=reach.cpu(),
        marked=marked,
        gates=gates.cpu().unflatten(0, (len(layer.directions), -1)),
        notes=notes,
    )


def devices(name: str | None) -> list[torch.device]:
    """The devices to run on. ValueError for one that is not there, RuntimeError for one that the build has no code for.

    Without a name: the CPU, and the GPU if the build can use it.
    """
    gpu = torch.cuda.is_available()
    if name is None:
        places = [torch.device("cpu")]
        if gpu:
            try:
                check_device_supported(torch.cuda.current_device())
                places.append(torch.device("cuda"))
            except RuntimeError as error:
                print(f"without the GPU: {error}", file=sys.stderr)
        return places
    if name != "cpu" and not (name == "cuda" and gpu):
        raise ValueError(f"--device must be cpu, or cuda on a machine with a GPU, got {name!r}")
    if name == "cuda":
        check_device_supported(torch.cuda.current_device())
    return [torch.device(name)]


def print_table(rows: list[Timing]) -> None:
    """The timings, one row each."""
    print(f"{'what':<28}{'device':<8}{'channels x H x W':<18}{'time':>12}")
    for row in rows:
        print(f"{row.what:<28}{row.device:<8}{row.size:<18}{row.milliseconds:>9.2f} ms")


def prepare(args: argparse.Namespace) -> tuple[Tensor, list[torch.device]]:
    """The photograph and the devices: everything that can be wrong with what the user gave or installed.

    Raises:
        ModuleNotFoundError: an extra is missing.
        OSError: the image cannot be read.
        RuntimeError: the compiled ops are missing, or not for this GPU.
        ValueError: an argument has a wrong value.
    """
    require_extras()
    ext.build_info()
    if not args.out.parent.is_dir():
        raise ValueError(f"--out must be in an existing folder, got {args.out}")
    places = devices(args.device)
    return load_photo(args.image, args.size), places


def run(photo: Tensor, places: list[torch.device], out: Path) -> int:
    """Runs the demo; 0 if the compiled ops agree with the reference, else 1."""
    from tqdm import tqdm

    from groupmamba.demo_picture import draw

    timings, checks, worst = [], [], 0.0
    layout = "{desc}{bar:24} {n_fmt}/{total_fmt} {elapsed}"
    with ext.backend("native"), tqdm(total=5 * len(places) + 2, bar_format=layout) as bar:

        def step(text: str) -> None:
            bar.set_description_str(f"{text:<34}")
            bar.update()

        features = embed(photo)
        for device in places:
            layer, x = random_layer().to(device), features.to(device)
            crop = x[:, :, : CROP[0], : CROP[1]].contiguous(memory_format=torch.channels_last)
            rows = measure(layer, x, crop, step)
            step(f"{device.type}: check against the reference")
            name, error = check(layer, crop)
            timings += rows
            worst = max(worst, error)
            checks.append(f"{device.type}: relative error {error:.0e}, {name}")
        step("look inside the layer")
        notes = [f"{row.device}: {row.what} {row.milliseconds:.1f} ms" for row in timings if row.whole_image]
        picture = inspect(layer, x, photo, notes + checks)
        step("draw")
        draw(picture, out)
    print_table(timings)
    print("against the reference in float64, on the crop:", *checks, f"picture: {out}", sep="\n")
    if worst >= TOLERANCE:
        print(f"FAILED: the compiled ops differ from the reference by more than {TOLERANCE:.0e}")
        return 1
    return 0
