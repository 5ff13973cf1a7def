# SPDX-License-Identifier: Apache-2.0
"""Inputs of grouped_selective_scan and its comparison with the float64 reference."""

import torch

import groupmamba_ext as ext
from support.common import check

IMAGES = ("u", "dt", "B", "C", "z")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = ("lr", "rl", "tb", "bt")
ORDER = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z", "norm_weight", "norm_bias", "gate")


def inputs(
    device, dtype=torch.float32, *, batch=2, h=5, w=7, groups=4, dim=16, n=1, rank=1, param=torch.float32, drop=()
):
    def image(*last, scale=1.0):
        return (scale * torch.randn(batch, h, w, groups, *last, dtype=torch.float64)).to(device, dtype)

    param = torch.float64 if dtype == torch.float64 else torch.float32

    def parameter(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(*shape, dtype=torch.float64)).to(device, param)

    tensors = {
        "u": image(dim),
        "dt": image(dim if rank is None else rank),
        "A": -(0.2 + torch.rand(groups, dim, n, dtype=torch.float64) * 2).to(device, param),
        "B": image(n),
        "C": image(n),
        "D": parameter(groups, dim, mean=1.0, scale=0.2),
        "dt_weight": None if rank is None else parameter(groups, dim, rank, scale=rank**-0.5),
        "dt_bias": parameter(groups, dim, mean=-2.0),
        "z": image(dim),
        "norm_weight": parameter(groups, dim, mean=1.0, scale=0.2),
        "norm_bias": parameter(groups, dim, scale=0.2),
        "gate": torch.rand(batch, groups, dim, dtype=torch.float64).to(device, param),
    }
    return {k: None if k in drop else v for k, v in tensors.items()}


def filling_batch(device, dim):
    """On a GPU images whose planes of ``dim`` channels occupy it, as the kernels for several states ask for."""
    return 800 // dim + 60 if torch.device(device).type == "cuda" else 2


def compare(tensors, directions=MIXED, **options):
    # A norm over a handful of channels is ill-conditioned where they agree; a larger eps makes errors comparable again.
    options = {"directions": directions, "norm_eps": 0.1 if tensors["u"].shape[-1] <= 8 else 1e-5, **options}
    return check(ext.grouped_selective_scan, ext.reference.grouped_selective_scan, tensors, options)
