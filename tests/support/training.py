# SPDX-License-Identifier: Apache-2.0
"""Small folders of pictures, a small model, and runs of ``groupmamba train`` on them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from groupmamba import cli

COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
KWARGS = ("depths=(1,1,1,1)", "dims=(16,16,32,32)", "stem_dim=8", "mlp_ratios=(2,2,2,2)")
SMALL = ["--device", "cpu", "--img-size", "32", "-b", "8", "-j", "0", "--log-interval", "1", "--model-kwargs", *KWARGS]
PLAIN = ["--no-aug", "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--smoothing", "0"]


def make_pictures(root: Path, train: int = 14, validation: int = 5, names=("blue", "green", "red")) -> Path:
    """DATA/train and DATA/validation: noise around one colour a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for name, color in zip(names, COLORS, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(color) + rng.normal(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def train(data: Path, run: Path, *options: str) -> int:
    """The exit status of a run of the small model in this process."""
    return command("train", str(data), "--output", str(run), *SMALL, *options)


def command(*argv: str) -> int:
    """The exit status of a command in this process."""
    try:
        return cli.main(list(argv))
    except SystemExit as stop:
        return stop.code


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def losses(run: Path) -> list[str]:
    """Of each step, with all digits."""
    found = rows(run / "steps.csv")
    assert [int(row["step"]) for row in found] == list(range(len(found)))
    return [row["loss"] for row in found]


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: these sources, one thread."""
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def torchrun(processes: int, argv: list[str]) -> subprocess.Popen:
    """``groupmamba`` started in so many processes of this host."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node"]
    command = [*launcher, str(processes), "-m", "groupmamba", *argv]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(process: subprocess.Popen) -> list[int]:
    """Of its main thread, the oldest first."""
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
