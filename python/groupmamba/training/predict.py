# SPDX-License-Identifier: Apache-2.0
"""``groupmamba predict``: classes of images, objects in them, or classes of their pixels, as the checkpoint has it.

Of a classifier the picture shows for each image Grad-CAM (Selvaraju et al., ICCV 2017) on the model's last map, and
what each group of the last layer but one stage draws on: its input times the gradient of the class's logit by that
input, through the scan alone, summed over the group's channels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba.training.command import check_packages
from groupmamba.training.option_table import SHARE, keyword, path_text
from groupmamba_ext._command import CommandError, UsageError, check_out

if TYPE_CHECKING:
    from groupmamba.training.card import Card

BAR, TOP, ROWS = 24, 5, 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``groupmamba predict``."""
    parser.add_argument("images", type=path_text, nargs="+", metavar="IMAGE", help="files of images")
    parser.add_argument(
        "--weights", type=path_text, required=True, metavar="FILE", help="a checkpoint, or the folder of a run"
    )
    parser.add_argument("--model", metavar="NAME", help="for a checkpoint that does not say which model it is")
    parser.add_argument(
        "--model-kwargs", type=keyword, nargs="*", metavar="NAME=VALUE", help="more arguments of that model"
    )
    parser.add_argument("--threshold", type=SHARE, help="of detectors: lowest score that is shown; default: 0.5")
    parser.add_argument("--out", default="groupmamba_prediction.png", metavar="PNG", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where one can be used")


def main(args: argparse.Namespace) -> int:
    """Prints what is found and draws the picture; 0.

    Raises:
        UsageError, CommandError: what was asked for can't be done.
    """
    check_packages()
    from groupmamba.training.card import check_classifier, find_weights, model_of
    from groupmamba.training.data import validation_transform
    from groupmamba.training.setup import choose_device

    check_out(Path(args.out))
    model, card = model_of(find_weights(args.weights), args.model, model_kwargs=dict(args.model_kwargs or ()))
    if args.threshold is not None and card.task != "detection":
        raise UsageError(f"--threshold is for detection, and --weights {args.weights} is for {card.task}")
    pictures = [_open(path) for path in args.images]
    device = torch.device(choose_device(args.device, card.model))
    model.to(device).to(memory_format=torch.channels_last)
    if card.task != "classification":
        return _dense(args, model, card, pictures, device)
    check_classifier(model, card.model, card.img_size, card.num_classes)
    transform = validation_transform(card.img_size, card)
    rows = []
    for path, picture in zip(args.images, pictures, strict=True):
        image = transform(picture)[None].to(device).to(memory_format=torch.channels_last)
        logits, maps = explain(model, image)
        shares = logits.softmax(0).topk(min(TOP, len(logits)))
        print(path)
        for share, index in zip(shares.values.tolist(), shares.indices.tolist(), strict=True):
            print(f"  {_name(card, index):<24} {100 * share:5.1f}%  {_bar(share)}")
        best = int(shares.indices[0])
        rows.append((path, _shown(image, card), f"{_name(card, best)}, {100 * shares.values[0].item():.1f}%", maps))
    if _draw(rows[:ROWS], Path(args.out)):
        more = f" (the first {ROWS} images)" if len(rows) > ROWS else ""
        print(f"{args.out}{more}")
    return 0


def _dense(
    args: argparse.Namespace, model: nn.Module, card: Card, pictures: Sequence[Any], device: torch.device
) -> int:
    """Detectors and segmenters: beside each image what is found in it."""
    from torchvision.transforms.v2 import functional

    from groupmamba.training.dense import task_arguments
    from groupmamba.training.distributed import Processes
    from groupmamba.training.output import Screen
    from groupmamba.training.setup import amp_dtype
    from groupmamba.training.task import task_of

    kind = task_of(card.task)
    check_packages(kind.command.needed)
    task = kind(task_arguments(kind, card, {"data": ""}), Processes(), device, Screen(True))
    task.card = card
    rows = []
    for path, picture in zip(args.images, pictures, strict=True):
        image = functional.pil_to_tensor(picture)
        drawn, lines = task.drawn(model, image.to(device), amp_dtype(device, None, None), args.threshold)
        print(path)
        for line in lines:
            print(f"  {line}")
        rows.append((path, image.permute(1, 2, 0), drawn.permute(1, 2, 0)))
    if _draw_pairs(rows[:ROWS], Path(args.out)):
        more = f" (the first {ROWS} images)" if len(rows) > ROWS else ""
        print(f"{args.out}{more}")
    return 0


def _draw_pairs(rows: Sequence[tuple[str, Tensor, Tensor]], out: Path) -> bool:
    """Images beside what was found in them; False where matplotlib is missing."""
    figure = _figure(8, 4 * len(rows))
    if figure is None:
        return False
    for axes, (path, *pair) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        for axis, values in zip(axes, pair, strict=True):
            axis.set(xticks=[], yticks=[], frame_on=False)
            axis.imshow(values.cpu().numpy())
        axes[0].set_title(Path(path).name, fontsize=8)
    figure.savefig(out, format="png", dpi=120)
    return True


def _figure(width: float, height: float) -> Any:
    """None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("without a picture: matplotlib can't be imported (pip install 'groupmamba[train]')", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _open(path: str) -> Any:
    from groupmamba.training.pictures import read_picture, why_unreadable

    try:
        return read_picture(path)
    except Exception as error:  # Pillow's decoders raise exceptions of many kinds on bytes that are no image
        raise CommandError(f"{path} can't be read as an image: {why_unreadable(error)}") from error


def _name(card: Card, index: int) -> str:
    return f"class {index}" if card.classes is None else card.classes[index]


def _bar(share: float) -> str:
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * round(BAR * share)
    return "█" * round(BAR * share)


def explain(model: nn.Module, image: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Logits of one image, and maps in [0, 1] of what speaks for the most likely class, each with its title.

    Args:
        model: in evaluation mode.
        image: (1, channels, H, W).

    Returns:
        (classes,) logits and (h, w) maps on the CPU; no maps for models that are not this project's.
    """
    from groupmamba.models import GroupMamba

    if not isinstance(model, GroupMamba):
        with torch.no_grad():
            return model(image)[0].float().cpu(), []
    kept: dict[str, Tensor] = {}

    def alone(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept["scan"] = inputs[0].detach().requires_grad_()
        # What reaches the logits otherwise than through the scan keeps its own gradient.
        return (inputs[0] + (kept["scan"] - kept["scan"].detach()), *inputs[1:])

    def last(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        kept["map"] = output

    stage: Any = model.stages[max(len(model.stages) - 2, 0)]
    layer = stage.blocks[-1].attn
    hooks = [model.stage_maps[-1].register_forward_hook(last)]
    if layer.variant != "paper":
        hooks.append(layer.mamba.register_forward_pre_hook(alone))
    try:
        with torch.enable_grad():
            logits = model(image.requires_grad_())[0].float()
            wanted = [kept[name] for name in ("map", "scan") if name in kept]
            gradients = torch.autograd.grad(logits.max(), wanted)
    finally:
        for hook in hooks:
            hook.remove()
    weights = gradients[0].mean((2, 3), keepdim=True)
    maps = [("Grad-CAM", _scaled((weights * kept["map"]).sum(1)[0].relu()))]
    if "scan" in kept:
        draws = (kept["scan"] * gradients[1]).sum(-1)[0].abs()  # (h, w, groups)
        for group in range(draws.shape[-1]):
            direction = f", {layer.directions[group]}" if layer.scan == "grouped" else ""
            maps.append((f"group {group + 1}{direction}", _scaled(draws[..., group])))
    return logits.detach().cpu(), maps


def _scaled(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    return values / values.max().clamp(min=1e-30)


def _shown(image: Tensor, card: Card) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    return (image[0].detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def _draw(rows: Sequence[tuple[str, Tensor, str, list[tuple[str, Tensor]]]], out: Path) -> bool:
    """False where matplotlib is missing."""
    columns = 1 + max(len(maps) for *_, maps in rows)
    figure = _figure(2.2 * columns, 2.5 * len(rows))
    if figure is None:
        return False
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (path, image, title, maps) in zip(grid, rows, strict=True):
        for axis in axes:
            axis.set(xticks=[], yticks=[], frame_on=False)
        axes[0].imshow(image.numpy())
        axes[0].set_title(f"{Path(path).name}\n{title}", fontsize=8)
        for axis, (name, values) in zip(axes[1:], maps, strict=False):
            axis.imshow(image.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
            fine = F.interpolate(values[None, None], image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
            axis.imshow(fine.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            axis.set_title(name, fontsize=8)
    figure.savefig(out, format="png", dpi=120)
    return True
