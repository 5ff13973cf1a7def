# SPDX-License-Identifier: Apache-2.0
"""Training of GroupMamba models: the distillation loss."""

from groupmamba.training.distillation import DistillationLoss

__all__ = ["DistillationLoss"]
