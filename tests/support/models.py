# SPDX-License-Identifier: Apache-2.0
"""What the tests of the models share."""

import json

import numpy as np
import timm
import torch

from groupmamba.models import GroupMamba, groupmamba_base, groupmamba_small, groupmamba_tiny
from support.golden import GOLDEN, weights

MODELS = {"tiny": groupmamba_tiny, "small": groupmamba_small, "base": groupmamba_base}
SMALL = {"stem_dim": 8, "dims": (16, 24, 32, 40), "depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 2, 2)}


def released_state_dict(kind):
    """Float64 weights under the names of the authors' code."""
    shapes = json.loads((GOLDEN / "state_dict_manifest.json").read_text())[f"groupmamba_{kind}"]
    return {name: torch.from_numpy(np.asarray(weights.fill(name, tuple(shape)))) for name, shape in shapes.items()}


def small(**options):
    """A quick model, in evaluation mode."""
    torch.manual_seed(0)
    return GroupMamba(**{"num_classes": 10, **SMALL, **options}).eval()


def tiny(**options):
    """A quick model, by its name in timm."""
    return timm.create_model("groupmamba_tiny", **{**SMALL, **options})
