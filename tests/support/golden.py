# SPDX-License-Identifier: Apache-2.0
"""The released model's figures in tests/golden, and the rule that its weights follow."""

import importlib.util
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def _weights():
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


weights = _weights()
