# SPDX-License-Identifier: Apache-2.0
"""Runs the same training again and again, killed by SIGKILL at one moment after the other; see test_train_resume.py.

Arguments: the moments, then ``--``, then those of ``groupmamba``. A moment is ``NAME:N``, the N-th call of one of
`PLACES` in its process. After the last one the run goes on to its end.
"""

import os
import signal
import sys

from groupmamba import cli
from groupmamba.training import checkpoint, classification, output, step

PLACES = {
    "step": (step.Step, "body"),  # inside an epoch
    "average": (step.ModelEmaV3, "update"),  # inside a step: the optimizer has moved, the average has not
    "flush": (checkpoint.os, "fsync"),  # inside writing: bytes are in a file that has no name yet
    "rename": (checkpoint.os, "rename"),  # inside writing, and inside removing
    "remove": (checkpoint.shutil, "rmtree"),
    "link": (checkpoint.os, "replace"),
    "row": (output.Table, "add"),
    "validation": (classification, "accuracies"),
}


def kill_at(moment):
    name, count = moment.split(":")
    owner, attribute = PLACES[name]
    original, left = getattr(owner, attribute), [int(count)]

    def counted(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, attribute, counted)


def main():
    split = sys.argv.index("--")
    for moment in [*sys.argv[1:split], None]:
        child = os.fork()
        if child == 0:
            if moment is not None:
                kill_at(moment)
            os._exit(cli.main(sys.argv[split + 1 :]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != (0 if moment is None else -signal.SIGKILL):
            sys.exit(f"{moment or 'the last run'}: status {status}")


if __name__ == "__main__":
    main()
