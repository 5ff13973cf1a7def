# SPDX-License-Identifier: Apache-2.0
"""The modulated group Mamba layer and its parts."""

from groupmamba.layers.channel_affinity import ChannelAffinity
from groupmamba.layers.grouped_mamba import GroupedMamba2d
from groupmamba.layers.plain import why_not_fused
from groupmamba.layers.vsss import VSSSBlock
from groupmamba.layers.weight_decay import no_weight_decay

__all__ = ["ChannelAffinity", "GroupedMamba2d", "VSSSBlock", "no_weight_decay", "why_not_fused"]
