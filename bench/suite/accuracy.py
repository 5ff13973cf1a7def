# SPDX-License-Identifier: Apache-2.0
"""Published top-1 accuracies on ImageNet-1K of the models that are compared; nothing here is measured by this project.

Each figure belongs to named weights. Those of timm's models are timm's own measurement of the weights that it serves,
``results/results-imagenet.csv``, at the image size that the benchmark uses unless
another is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from suite.model_entries import COMPILED, RELEASED

TIMM = "timm, results-imagenet.csv, commit aa4b5850"
AUTHORS = "the README of GroupMamba, commit c1800ed2"
VMAMBA = "VMamba's README, commit 2ed52ead"


@dataclass(frozen=True)
class Top1:
    """One figure.

    Attributes:
        percent: of the validation images.
        weights: whose it is.
        source: where it is published.
        further: whether images beyond ImageNet-1K took part, in training or as a distilling teacher's.
        side: of the evaluated images.
    """

    percent: float
    weights: str
    source: str
    further: bool = False
    side: int = 224


def _timm(plain: tuple[float, str] | None, further: tuple[float, str] | None = None, side: int = 224) -> list[Top1]:
    found = [(plain, False), (further, True)]
    return [Top1(*figure, TIMM, more, side) for figure, more in found if figure is not None]


TOP1: dict[str, list[Top1]] = {
    "groupmamba_tiny": [Top1(83.3, "the authors', distilled", AUTHORS)],
    "groupmamba_small": [Top1(83.9, "the authors', distilled", AUTHORS)],
    "groupmamba_base": [Top1(84.5, "the authors', distilled", AUTHORS)],
    "swin_tiny_patch4_window7_224": _timm((81.388, "ms_in1k")),
    "convnext_tiny": _timm((82.066, "fb_in1k"), (84.192, "in12k_ft_in1k")),
    "caformer_s18": _timm((83.664, "sail_in1k"), (84.092, "sail_in22k_ft_in1k")),
    "hiera_small_224": _timm((83.888, "mae_in1k_ft_in1k")),
    "hgnetv2_b4": _timm(None, (83.700, "ssld_stage2_ft_in1k")),
    "deit3_small_patch16_224": _timm((81.382, "fb_in1k"), (83.082, "fb_in22k_ft_in1k")),
    "tiny_vit_11m_224": _timm((81.538, "in1k"), (83.232, "dist_in22k_ft_in1k")),
    "tiny_vit_21m_224": _timm((83.268, "in1k"), (85.088, "dist_in22k_ft_in1k")),
    "repvit_m2_3": _timm((83.746, "dist_450e_in1k")),
    "fastvit_sa36": _timm((84.028, "apple_dist_in1k"), side=256),
    "vmamba_tiny_s1l8": [Top1(82.6, "vssm1_tiny_0230s", VMAMBA)],
    "vmamba_small_s2l15": [Top1(83.6, "vssm_small_0229", VMAMBA)],
    "vmamba_base_s2l15": [Top1(83.9, "vssm_base_0229", VMAMBA)],
}
FURTHER = "†"


def figures(name: str) -> list[Top1]:
    """Those of a model of the benchmark, compiled or the authors' own code; none where none is published for it."""
    return TOP1.get(name.removesuffix(COMPILED).removeprefix(RELEASED), [])


def cell(name: str) -> str:
    """For a table: ``82.1; 84.2†``, the second with further images; empty where there is none."""
    return "; ".join(f"{t.percent:.1f}{FURTHER if t.further else ''}" for t in figures(name))


def sources(names: list[str]) -> list[str]:
    """One line a model: each figure, the weights that it belongs to, and where it is published."""
    lines = []
    for name in dict.fromkeys(n for n in names if figures(n)):
        found = figures(name)
        size = "" if found[0].side == 224 else f", at {found[0].side} x {found[0].side}"
        text = ", ".join(f"{t.percent:g} with {t.weights}{FURTHER if t.further else ''}" for t in found)
        lines.append(f"{name}: {text} ({found[0].source}{size})")
    return lines
