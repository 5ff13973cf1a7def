# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groupmamba_ext._command import CommandError

TIMEOUT = timedelta(minutes=30)  # of waiting for a process that validates or writes alone
_NOTHING = object()
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOST = re.compile(r"Connection (closed|reset|refused)|gloo|NCCL|Broken pipe|remote process|Timed out waiting", re.I)


class Processes(NamedTuple):
    """This process among those of the run; ``world`` of 1 means that there is no other and no process group."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        return torch.device("cpu") if kind == "cpu" else torch.device("cuda", self.local_rank)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def union(self, values: set[int]) -> set[int]:
        """The members of the processes' sets."""
        if self.world == 1:
            return values
        found: list[set[int]] = [set() for _ in range(self.world)]
        dist.all_gather_object(found, values)
        return set().union(*found)

    def interleaved(self, values: list) -> list:
        """The processes' lists as one: their first members, their second ones, ..., as images are dealt out to them."""
        if self.world == 1:
            return values
        found: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, values)
        rows = zip_longest(*found, fillvalue=_NOTHING)
        return [value for row in rows for value in row if value is not _NOTHING]

    def agree(self, value: int) -> bool:
        """Whether all processes have the same value."""
        if self.world == 1:
            return True
        found: list[int] = [0] * self.world
        dist.all_gather_object(found, value)
        return len(set(found)) == 1

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def found_processes() -> Processes:
    """What torchrun says in the environment; one process without it.

    Raises:
        CommandError: some of its variables are missing or aren't numbers.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Processes()
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise CommandError(f"RANK and WORLD_SIZE are set without {', '.join(missing)}: start it by torchrun")
    try:
        rank, world, local = (int(os.environ[name]) for name in _VARIABLES[:3])
    except ValueError as error:
        raise CommandError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
    return Processes(rank, world, local)


@contextmanager
def process_group(processes: Processes, kind: str) -> Iterator[None]:
    """The group of ``processes``: NCCL for GPUs, gloo for CPUs.

    A process that is lost ends the others by one message of the first.

    Raises:
        CommandError: another process was lost.
    """
    if processes.world == 1:
        yield
        return
    if kind == "cuda":
        torch.cuda.set_device(processes.local_rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _LOST.search(str(error)):
            raise
        raise PeerLost("another process of this run has ended; see its message above, or torchrun's below") from error
    finally:
        # Destroying NCCL's group waits for processes that are gone.
        if kind == "cpu":
            dist.destroy_process_group()
        else:
            _destroy_if_alive()


class PeerLost(CommandError):
    """Another process of the run was lost."""


def _destroy_if_alive() -> None:
    if sys.exc_info()[0] is None:
        dist.destroy_process_group()
