# SPDX-License-Identifier: Apache-2.0
"""The commands that train, from their arguments to their exit status."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib.util import find_spec

from groupmamba.training import options
from groupmamba.training.option_table import Command
from groupmamba_ext._command import CommandError, is_out_of_memory, one_line

NEEDED = ("timm", "torchvision", "tqdm", "yaml", "safetensors")


def check_packages(more: Iterable[str] = ()) -> None:
    """CommandError that names the extra where a package is missing, of those of all tasks and ``more``."""
    missing = [name for name in (*NEEDED, *more) if find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} can't be imported: pip install 'groupmamba[train]'")


def main(args: argparse.Namespace, command: Command) -> int:
    """Trains by the options of ``command``; the exit status.

    Raises:
        UsageError, CommandError: what was asked for can't be done. Of several processes one speaks.
    """
    check_packages(command.needed)
    from groupmamba.training.distributed import PeerLost, found_processes, process_group
    from groupmamba.training.loop import NotFinite, Training
    from groupmamba.training.output import Screen
    from groupmamba.training.setup import choose_device
    from groupmamba.training.task import task_of

    processes = found_processes()
    screen = Screen(processes.first)
    try:
        given = options.given(args, command)
        known = options.complete({"data": "", **given}, command=command)
        kind = choose_device(known.device, known.model)
    except CommandError as error:
        return _once_a_host(error, processes.local_rank)
    try:
        with process_group(processes, kind):
            try:
                training = Training(task_of(command.task), given, processes, screen)
            except CommandError as error:
                return _once_a_host(error, processes.local_rank)
            return training.fit()
    except (NotFinite, PeerLost) as error:
        return _once_a_host(error, processes.rank)
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and not is_out_of_memory(error):
            raise CommandError(f"a process that loads images has ended: {one_line(error)}") from error
        raise


def _once_a_host(error: CommandError, rank: int) -> int:
    if rank == 0:
        raise error
    return error.status
