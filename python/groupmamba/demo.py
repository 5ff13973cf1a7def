# SPDX-License-Identifier: Apache-2.0
"""``groupmamba demo``: a photograph through the layer, forward and backward, checked, timed and drawn."""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import groupmamba_ext as ext
from groupmamba.layers import GroupedMamba2d
from groupmamba.model_info import median_seconds, whole_number
from groupmamba_ext._command import CommandError, UsageError, gpu_usable, one_line, require_gpu
from groupmamba_ext._load import load_error

if TYPE_CHECKING:
    from groupmamba.demo_photo import Photo

DIM = 64
STRIDE = 4
WINDOW = 8
CROP = (12, 16)
TOLERANCE = 1e-4  # float32 against the float64 reference, relative
LARGEST_SIZE = 2048  # 512 x 512 tokens: a demo of 2 GB; an image in the picture has 352 pixels
BAR = "{desc}{bar:24} {n_fmt}/{total_fmt} {elapsed}"
SECONDS = 0.2  # of measuring for each row of the table
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
    parser.add_argument(
        "image", nargs="?", type=Path, metavar="IMAGE", help="a photograph (default: scikit-learn's china.jpg)"
    )
    parser.add_argument("--out", type=Path, default=Path("groupmamba_demo.png"), help="the PNG (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, and the GPU where one can be used")
    parser.add_argument(
        "--size",
        type=whole_number(STRIDE * max(CROP), LARGEST_SIZE, " (which takes 2 GB)"),
        default=512,
        help=f"longer side of the image in pixels, up to {LARGEST_SIZE} (default: %(default)s)",
    )


def require_extras() -> None:
    """CommandError that names the cure where a package of the demo is missing or cannot be imported."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise CommandError(
                f"it needs {error.name}, which is not installed: pip install 'groupmamba[demo]'"
            ) from error
        except ImportError as error:
            raise CommandError(f"{name} cannot be imported: {one_line(error)}") from error


def check_out(out: Path) -> None:
    """CommandError where the picture cannot be written to ``out``, before any work."""
    if out.exists() and not out.is_file():
        raise CommandError(f"--out must be a file, got {'the folder ' if out.is_dir() else ''}{out}")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out must end in .png, as the picture is a PNG file, got {out}")
    if not out.parent.is_dir():
        raise CommandError(f"--out must be in an existing folder, got {out}")
    try:
        if out.exists():
            with out.open("ab"):  # changes nothing
                return
        with tempfile.TemporaryFile(dir=out.parent):
            return
    except OSError as error:
        raise CommandError(f"--out cannot be written: {out}: {error.strerror}") from error


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
    core, affinity = layer.mamba, layer.affinity
    assert affinity is not None and core.out_proj_weight is not None
    with torch.no_grad():
        for weight in (core.in_proj_weight, core.out_proj_weight, layer.proj.weight, affinity.fc2.weight):
            weight.mul_(weight.shape[-1] ** -0.5 / 0.02)
        affinity.fc1.weight.mul_(100)
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
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def measure(layer: GroupedMamba2d, x: Tensor, crop: Tensor, step: Callable[[str], None]) -> list[Timing]:
    """Times of the whole image (two rows), and of the crop with the compiled ops and with the reference (two rows)."""
    device = x.device.type
    rows = []

    def add(what: str, image: Tensor, run: Callable[[], object]) -> None:
        step(f"{device}: {what}")
        size = " x ".join(map(str, image.shape[1:]))
        rows.append(Timing(what, device, size, 1e3 * median_seconds(run, SECONDS), image is x))

    with torch.no_grad():
        add("forward", x, lambda: layer(x))
    add("forward + backward", x, lambda: forward_backward(layer, x))
    add("forward + backward, crop", crop, lambda: forward_backward(layer, crop))
    with ext.backend("reference"):
        add("the crop in plain PyTorch", crop, lambda: forward_backward(layer, crop))
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
    affinity = layer.affinity
    assert affinity is not None
    with torch.no_grad():
        xn, pooled = ext.layer_norm_pool(tokens, layer.norm.weight, layer.norm.bias, layer.norm.eps)
        gates = affinity.from_pooled(pooled)[0]
        output = layer(x)[0].permute(1, 2, 0)
    height, width = xn.shape[1:3]
    marked = (int(0.55 * height), int(0.5 * width))
    groups = xn.unflatten(-1, (layer.groups, -1)).requires_grad_()
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
        gates=gates.cpu().unflatten(0, (layer.groups, -1)),
        notes=notes,
    )


def devices(name: str | None) -> list[torch.device]:
    """The devices to run on; without a name the CPU, and the GPU if there is one that the build can use.

    Raises:
        CommandError: a GPU was asked for and cannot be used.
    """
    if name == "cuda":
        require_gpu()
    if name is not None:
        return [torch.device(name)]
    return [torch.device("cpu"), *([torch.device("cuda")] if gpu_usable() else [])]


def print_table(rows: list[Timing]) -> None:
    """The timings, one row each."""
    print(f"{'what':<28}{'device':<8}{'channels x H x W':<18}{'time':>12}")
    for row in rows:
        print(f"{row.what:<28}{row.device:<8}{row.size:<18}{row.milliseconds:>9.2f} ms")


def run(photo: Photo, places: list[torch.device], out: Path) -> int:
    """Runs the demo; 0 if the compiled ops agree with the reference, else 1."""
    from tqdm import tqdm

    from groupmamba.demo_picture import draw

    for note in photo.notes:
        print(note)
    timings, checks, worst = [], [], 0.0
    with ext.backend("native"), tqdm(total=5 * len(places) + 2, bar_format=BAR, disable=None) as bar:

        def step(text: str) -> None:
            bar.set_description_str(f"{text:<34}")
            bar.update()

        features = embed(photo.pixels)
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
        picture = inspect(layer, x, photo.pixels, photo.notes + notes + checks)
        step("draw")
        draw(picture, out)
    print_table(timings)
    print(f"against the reference in float64, on the crop (tolerance {TOLERANCE:.0e}):", *checks, sep="\n")
    print(f"picture: {out}")
    if worst >= TOLERANCE:
        print("FAILED: the compiled ops differ from the reference by more than the tolerance; groupmamba selftest says")
        print("which; please report it with the output of groupmamba info")
        return 1
    return 0


def main(args: argparse.Namespace) -> int:
    """Checks all that can be wrong with what the user gave or installed, then runs the demo.

    Raises:
        UsageError: an argument has a wrong value.
        CommandError: an extra or the compiled ops are missing, the GPU cannot be used, the image cannot be read, or
            the picture could not be written.
    """
    check_out(args.out)
    require_extras()
    problem = load_error()
    if problem is not None:
        raise CommandError(problem)
    places = devices(args.device)
    from groupmamba.demo_photo import load_photo

    return run(load_photo(args.image, args.size, STRIDE), places, args.out)
