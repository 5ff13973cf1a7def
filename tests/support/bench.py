# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmark share: its modules, a quick run on the CPU, and a whole model in little."""

from pathlib import Path

import torch

from groupmamba import GroupedMamba2d
from groupmamba_ext.backend import current_backend

ROOT = Path(__file__).resolve().parents[2]
import run as bench  # noqa: E402
import table  # noqa: E402, F401
from suite import measure, model_entries  # noqa: E402

CPU = torch.device("cpu")
measure.CALIBRATION_BYTES["cpu"], measure.GEMM_SIDE["cpu"] = 1 << 20, 64  # of every run: seconds on a busy machine


def quick(*arguments):
    """The status of a quick run on the CPU."""
    return bench.main(["--device", "cpu", "--quick", *map(str, arguments)])


class TinyNet(torch.nn.Module):
    """A whole model in little, with this project's layer in it.

    Args:
        scale: of the logits in evaluation, but for those by the reference.
        slope: of the gradient, but for that by the reference.
        idle: with a parameter that gets no gradient.
    """

    def __init__(self, scale=1.0, slope=1.0, idle=False):
        super().__init__()
        self.stem, self.layer = torch.nn.Conv2d(3, 16, 8, 8), GroupedMamba2d(16)
        self.head = torch.nn.Linear(16, 10)
        self.scale, self.slope = scale, slope
        if idle:
            self.idle = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        y = self.head(self.layer(self.stem(x)).mean((2, 3)))
        if current_backend() == "reference":
            return (y, y) if self.training else y
        if not self.training:
            return y * self.scale
        y = y * self.slope - (y * (self.slope - 1)).detach()
        return y, y


def tiny_models(monkeypatch, **options):
    """Puts `TinyNet` in the place of this project's models, and one small model of timm in that of its peers."""
    monkeypatch.setattr(model_entries, "ours", lambda name, **others: TinyNet(**options))
    monkeypatch.setattr(model_entries, "TIMM", ("test_convnext",))
