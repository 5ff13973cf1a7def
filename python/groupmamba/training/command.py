# SPDX-License-Identifier: Apache-2.0
"""``groupmamba train``, from its arguments to its exit status."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from groupmamba.training import options
from groupmamba_ext._command import CommandError, is_out_of_memory, one_line

NEEDED = ("timm", "torchvision", "tqdm", "yaml", "safetensors")


def check_packages() -> None:
    """CommandError that names the extra where a package is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} can't be imported: pip install 'groupmamba[train]'")


def main(args: argparse.Namespace) -> int:
    """Trains; the exit status.

    Raises:
        UsageError, CommandError: what was asked for can't be done. Of several processes one speaks.
    """
    check_packages()
    from groupmamba.training.distributed import PeerLost, found_processes, process_group
    from groupmamba.training.loop import NotFinite, Training
    from groupmamba.training.output import Screen
    from groupmamba.training.recipe import DEFAULTS
    from groupmamba.training.setup import choose_device

    processes = found_processes()
    screen = Screen(processes.first)
    try:
        given = options.given(args)
        options.complete({"data": "", **given})
        kind = choose_device(given.get("device"), given.get("model", str(DEFAULTS["model"])))
    except CommandError as error:
        return _once_a_host(error, processes.local_rank)
    try:
        with process_group(processes, kind):
            try:
                training = Training(given, processes, screen)
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
