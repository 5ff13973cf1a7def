# SPDX-License-Identifier: Apache-2.0
"""GroupMamba-T, -S and -B, registered with timm. Needs the extra ``models`` (timm)."""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError("groupmamba.models needs timm: pip install 'groupmamba[models]'") from error

from groupmamba.models.groupmamba import GroupMamba, groupmamba_base, groupmamba_small, groupmamba_tiny

__all__ = ["GroupMamba", "groupmamba_base", "groupmamba_small", "groupmamba_tiny"]
