# SPDX-License-Identifier: Apache-2.0
"""GroupMamba: the modulated group Mamba layer and its parts. Needs torch alone; extras are named where needed."""

from groupmamba.checkpoints import convert_released_state_dict
from groupmamba.cuda_graphs import CudaGraphs, use_cuda_graphs
from groupmamba.layers import ChannelAffinity, GroupedMamba2d, VSSSBlock, no_weight_decay, why_not_fused
from groupmamba.training.distillation import DistillationLoss
from groupmamba_ext._version import __version__

__all__ = [
    "ChannelAffinity",
    "CudaGraphs",
    "DistillationLoss",
    "GroupedMamba2d",
    "VSSSBlock",
    "__version__",
    "convert_released_state_dict",
    "no_weight_decay",
    "use_cuda_graphs",
    "why_not_fused",
]
