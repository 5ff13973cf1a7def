# SPDX-License-Identifier: Apache-2.0
"""Random draws that follow from what they are for, never from what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """A seed of 63 bits that follows from ``key``."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Python's, numpy's and torch's global CPU generators seeded by ``key``; afterwards as before."""
    seed = seed_of(*key)
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_device(device: torch.device, *key: int | str) -> None:
    """Seeds torch's generator of ``device``, and the CPU's, for one step; nothing waits for the device."""
    seed = seed_of(*key)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
