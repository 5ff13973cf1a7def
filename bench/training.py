#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What training loses between the bare step of a model and images of a folder, on one GPU or many.

    python bench/training.py                                  # steps on images that lie on the GPU
    python bench/training.py --pictures 16384 --workers 16    # and from JPEG files: loader alone, step alone, both
    torchrun --nproc-per-node 2 bench/training.py             # steps with gradients averaged over two GPUs

Every row of a run is timed in turn with the others, several rounds, and has the median. See bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from groupmamba.training import classification, options, setup  # noqa: E402
from groupmamba.training.card import create_model  # noqa: E402
from groupmamba.training.distillation import DistillationLoss  # noqa: E402
from groupmamba.training.distributed import Processes, found_processes, process_group  # noqa: E402
from groupmamba.training.graph import capture, settle  # noqa: E402
from groupmamba.training.loop import Training  # noqa: E402
from groupmamba.training.output import Screen  # noqa: E402
from groupmamba.training.recipe import TEACHER  # noqa: E402
from groupmamba.training.seeds import seeded  # noqa: E402
from groupmamba.training.step import Schedule, Step, make_optimizer  # noqa: E402
from groupmamba.training.teacher import Teacher  # noqa: E402
from groupmamba_ext._command import CommandError, UsageError  # noqa: E402
from suite import report  # noqa: E402
from suite.arguments import OneLineParser, positive, writable  # noqa: E402
from suite.model_calls import Step as BareStep  # noqa: E402

CLASSES = 1000
STEPS_AN_EPOCH = 1250  # of the schedule: ImageNet-1K at a batch of 1,024
PICTURE = (500, 375)  # the usual size of ImageNet's files, which are some 110 kB
FILES = 2048  # different ones; more are links to them


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="bench/training.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["groupmamba_tiny"], metavar="NAME")
    parser.add_argument("--batch-size", type=positive, default=128, help="images a step of each GPU (default: 128)")
    parser.add_argument("--img-size", type=positive, default=224, help="pixels of a side (default: 224)")
    parser.add_argument("--steps", type=positive, default=30, help="of each of the rounds (default: 30)")
    parser.add_argument("--rounds", type=positive, default=5, help="whose median counts (default: 5)")
    parser.add_argument("--no-kd", action="store_true", help=f"leave out the rows with a teacher, {TEACHER}")
    parser.add_argument("--no-eager", action="store_true", help="leave out the steps launched kernel by kernel")
    parser.add_argument("--fsdp", action="store_true", help="plain steps by FSDP2 and others, under torchrun")
    parser.add_argument("--pictures", type=positive, metavar="N", help="train from N JPEG files, too")
    parser.add_argument("--workers", type=positive, default=4, help="processes that load them (default: 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--profile", type=writable, metavar="PNG", help="draw when kernels and NCCL run in a step of the first model"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the results")
    parser.add_argument("--append", action="store_true", help="keep the runs that FILE already holds")
    return parser.parse_args(argv)


class Bare:
    """Forward, cross-entropy, backward and fused AdamW: the benchmark's own step, in a graph where there is a GPU."""

    def __init__(self, model: torch.nn.Module, images: Tensor, amp: torch.dtype | None):
        self.step = BareStep(model, model, images, torch.float32 if amp is None else amp)
        self.graph: torch.cuda.CUDAGraph | None = None
        if images.is_cuda:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step(0)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.step(0)

    def __call__(self, i: int) -> None:
        if self.graph is None:
            self.step(0)
        else:
            self.graph.replay()


class Recipe:
    """A step of ``groupmamba train`` by its defaults: mixing, stochastic depth, the recipe's loss, clipping, AdamW with
    the step's rate, moving average; with a teacher on request. Images are on the device."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        processes: Processes,
        images: Tensor,
        *,
        kd: bool,
        graph: bool,
        averaged: bool = True,
    ):
        torch.manual_seed(0)
        device = images.device
        self.options = options.complete({"data": "", "model": name, "batch_size": args.batch_size, "no_kd": not kd})
        model = create_model(name, num_classes=CLASSES, drop_path_rate=self.options.drop_path)
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(kd)
        model.to(device).to(memory_format=torch.channels_last)
        self.amp = setup.amp_dtype(device, None, None)
        self.mixup = classification.mixup(self.options, CLASSES)
        labels = classification.label_loss(self.options, True)
        criterion = DistillationLoss(labels, _teacher(device) if kd else None, kind="hard" if kd else "none")
        rates = setup.run_rates(self.options, args.batch_size * processes.world)
        optimizer = make_optimizer(model, self.options, rates.lr)
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, self.options.model_ema_decay)
        group = processes if averaged else Processes()
        stream = torch.cuda.Stream(device) if graph and group.world > 1 else None
        self.step = Step(
            model, criterion, optimizer, ema=ema, clip=self.options.clip_grad, amp=self.amp,
            rank=processes.rank, replicas=setup.distribute(model, self.options, group, stream), stream=stream,
        )  # fmt: skip
        self.step.train(False)
        plan = classification.Classification(self.options, processes, device, Screen(False)).plan(STEPS_AN_EPOCH)
        self.schedule = Schedule(self.options.sched, optimizer, rates, plan)
        self.images, self.labels = images, torch.arange(len(images), device=device) % CLASSES
        settle(self.step, [self.mixed(0)])
        if graph:
            problem = capture(self.step, *self.mixed(0))
            if problem is not None:
                raise SystemExit(f"bench/training.py: {name}: {problem}")

    def mixed(self, i: int) -> tuple[Tensor, Tensor]:
        with seeded(0, "mixup", i):
            return self.mixup(self.images, self.labels)

    def __call__(self, i: int) -> None:
        self.schedule.set(i)
        self.loss = self.step(i, [self.mixed(i)])


def _teacher(device: torch.device) -> Teacher:
    model = create_model(TEACHER.partition(".")[0], num_classes=CLASSES)
    same = ((0.5,) * 3, (0.5,) * 3)
    return Teacher(model, *same, *same).to(device).to(memory_format=torch.channels_last)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


AVERAGING = ("replicas", "DistributedDataParallel", "FSDP2")


class Plain:
    """Forward, cross-entropy, backward, clipping, fused AdamW, as called, by one of `AVERAGING`."""

    def __init__(self, name: str, args: argparse.Namespace, processes: Processes, images: Tensor, by: str):
        torch.manual_seed(0)
        self.images, self.labels = images, torch.arange(len(images), device=images.device) % CLASSES
        self.amp = setup.amp_dtype(images.device, None, None)
        recipe = options.complete({"data": ""})
        model: Any = create_model(name, num_classes=CLASSES, drop_path_rate=recipe.drop_path)
        model.to(images.device).train()
        self.replicas = None
        if by == "FSDP2":  # which takes contiguous weights alone
            for stage in model.stages:
                for block in stage.blocks:
                    fully_shard(block)
            fully_shard(model)
        else:
            model.to(memory_format=torch.channels_last)
        if by == "replicas":
            self.replicas = setup.distribute(model, recipe, processes, None)
        elif by == "DistributedDataParallel":
            model = DistributedDataParallel(model, [images.device.index] if images.is_cuda else None)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=images.is_cuda)

    def __call__(self, i: int) -> None:
        with torch.autocast(self.images.device.type, self.amp, enabled=self.amp is not None):
            loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
        if self.replicas is not None:
            self.replicas.begin()
        loss.backward()
        if self.replicas is not None:
            self.replicas.finish()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def rates_of(
    calls: dict[str, Callable[[int], None]], images: int, steps: int, rounds: int, processes: Processes
) -> dict[str, Any]:
    """Images a second of all processes together: for each call the median of rounds in turn, and all of them."""
    device = torch.device("cuda", processes.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    found: dict[str, list[float]] = {name: [] for name in calls}
    done = 0
    for turn in range(rounds + 1):
        for name, call in calls.items():
            wait(device)
            processes.barrier()
            began = time.perf_counter()
            for i in range(steps):
                call(done + i)
            wait(device)
            processes.barrier()
            if turn:  # the first warms up
                found[name].append(images * steps / (time.perf_counter() - began))
        done += steps
    return {name: {"img_per_s": statistics.median(values), "rounds": values} for name, values in found.items()}


def steps(name: str, args: argparse.Namespace, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Rows of steps on images that lie on the device."""
    torch.manual_seed(1 + processes.rank)
    images = torch.randn(args.batch_size, args.img_size, args.img_size, 3, device=device).permute(0, 3, 1, 2)
    amp = setup.amp_dtype(device, None, None)
    calls: dict[str, Any] = {}
    memory: dict[str, float] = {}
    graph = device.type == "cuda"

    def add(title: str, make: Callable[[], Any]) -> None:
        if graph:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        calls[title] = make()
        calls[title](0)
        wait(device)
        if graph:
            memory[title] = (torch.cuda.max_memory_allocated() - before) / 1e9

    bare = create_model(name, num_classes=CLASSES).to(device).to(memory_format=torch.channels_last).train()
    if processes.world == 1:
        add("bare step", lambda: Bare(bare, images, amp))
    for kd in (False,) if args.no_kd else (False, True):
        for launched in ("graph",) if args.no_eager else ("graph", "as called"):
            if launched == "graph" and not graph:
                continue
            title = f"step{' with teacher' if kd else ''}, {launched}"
            add(title, lambda k=kd, g=launched == "graph": Recipe(name, args, processes, images, kd=k, graph=g))
    if processes.world > 1 and graph:  # what the GPUs do at the same time, each by itself
        for launched in ("graph",) if args.no_eager else ("graph", "as called"):
            add(
                f"step, {launched}, not averaged",
                lambda g=launched == "graph": Recipe(name, args, processes, images, kd=False, graph=g, averaged=False),
            )
    if args.fsdp:
        for by in AVERAGING:
            add(f"plain step by {by}", lambda b=by: Plain(name, args, processes, images, b))
    graphed = calls.get("step, graph")
    if args.profile and graphed is not None and name == args.models[0]:
        draw_profile(graphed, args.profile, f"{name}, a step of {args.batch_size} images on each GPU", processes)
    rows = rates_of(calls, args.batch_size * processes.world, args.steps, args.rounds, processes)
    for call in calls.values():
        if isinstance(call, Recipe):
            call.step.close()
    for title, gigabytes in memory.items():
        rows[title]["gigabytes"] = gigabytes
    for whole in ("bare step", "step, graph, not averaged"):
        if whole in rows:
            for row in rows.values():
                row[f"of {whole}"] = row["img_per_s"] / rows[whole]["img_per_s"]
    return rows


def draw_profile(call: Callable[[int], None], file: Path, title: str, processes: Processes) -> None:
    """One step as a picture: when NCCL's kernels run on the first GPU and when all others do."""
    from matplotlib.figure import Figure

    for i in range(3):
        call(i)
    wait(torch.device("cuda", processes.local_rank))
    processes.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(3)
        wait(torch.device("cuda", processes.local_rank))
    if not processes.first:
        return
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    kernels = [e for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    first = min(e["ts"] for e in kernels)
    rows: dict[str, list[tuple[float, float]]] = {"NCCL": [], "other kernels": []}
    for event in kernels:
        rows["NCCL" if "nccl" in event["name"].lower() else "other kernels"].append(
            ((event["ts"] - first) / 1e3, event["dur"] / 1e3)
        )
    covered = sum(_covered(span, rows["other kernels"]) for span in rows["NCCL"])
    whole = sum(length for _, length in rows["NCCL"])
    figure = Figure(figsize=(9, 2), layout="constrained")
    axes = figure.subplots()
    for i, (row, color) in enumerate(zip(rows, ("tab:orange", "tab:blue"), strict=True)):
        axes.broken_barh(rows[row], (i - 0.35, 0.7), color=color)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("milliseconds")
    axes.set_title(
        f"{title}: NCCL {whole:.1f} ms, {100 * covered / max(whole, 1e-9):.0f}% beside other kernels", size=10
    )
    figure.savefig(file, dpi=120)


def _covered(span: tuple[float, float], others: Sequence[tuple[float, float]]) -> float:
    """Of a (start, length) the part during which one of ``others`` runs."""
    end, found, reached = span[0] + span[1], 0.0, span[0]
    for start, length in sorted(others):
        low, high = max(start, reached), min(start + length, end)
        if high > low:
            found, reached = found + high - low, high
    return found


def draw_picture(path: Path, seed: int) -> None:
    """A JPEG file of some 110 kB: smooth colours with fine noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        PICTURE, Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, dtype=np.float32) + rng.normal(0, 14, (PICTURE[1], PICTURE[0], 3))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)


def draw_folder(root: Path, pictures: int) -> None:
    """DATA/train and DATA/validation of ten classes."""
    for split in ("train", "validation"):
        for label in range(10):
            (root / split / f"{label}").mkdir(parents=True)
    different = [root / "train" / f"{i % 10}" / f"{i}.jpg" for i in range(min(pictures, FILES))]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw_picture, different, range(len(different)), chunksize=16))
    for i in range(len(different), pictures):
        os.link(different[i % len(different)], root / "train" / f"{i % 10}" / f"{i}.jpg")
    for label in range(10):
        os.link(different[label], root / "validation" / f"{label}" / "0.jpg")


def from_files(name: str, args: argparse.Namespace, root: Path, device: torch.device) -> dict[str, Any]:
    """Images a second of the loader alone, of the step alone and of both, by `groupmamba train` itself."""
    given = {
        "data": str(root), "output": str(root / "run"), "model": name, "batch_size": args.batch_size,
        "img_size": args.img_size, "workers": args.workers, "epochs": 20, "device": device.type, "no_kd": True,
        "resume": "none",
    }  # fmt: skip
    training = Training(classification.Classification, given, Processes(), Screen(False))
    training.train_epoch(0)  # captures the graph and starts the workers
    images = training.steps * args.batch_size
    found: dict[str, list[float]] = {"loader alone": [], "step alone": [], "both": []}
    for epoch in range(1, 4):
        training.position["batch"] = 0
        training.data.order.begin(epoch)
        began = time.perf_counter()
        for batch in training.on_device(iter(training.data.batches)):
            last = batch
        wait(device)
        found["loader alone"].append(images / (time.perf_counter() - began))
        began = time.perf_counter()
        for i in range(args.steps):
            training.schedule.set(i)
            training.step(i, [training.task.mixed(last, i, 0)])
        wait(device)
        found["step alone"].append(args.batch_size * args.steps / (time.perf_counter() - began))
        began = time.perf_counter()
        training.train_epoch(epoch)
        wait(device)
        found["both"].append(images / (time.perf_counter() - began))
    rows: dict[str, Any] = {
        title: {"img_per_s": statistics.median(values), "rounds": values} for title, values in found.items()
    }
    training.step.close()
    smaller = min(rows["loader alone"]["img_per_s"], rows["step alone"]["img_per_s"])
    rows["both"]["of the smaller"] = rows["both"]["img_per_s"] / smaller
    return rows


def show(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        more = "".join(f", {value:.3f} {key}" for key, value in row.items() if key not in ("img_per_s", "rounds"))
        spread = 100 * (max(row["rounds"]) / min(row["rounds"]) - 1)
        print(f"  {name:<28} {row['img_per_s']:9,.0f} img/s (rounds within {spread:.1f}%){more}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    processes = found_processes()
    device = processes.device(args.device)
    run: dict[str, Any] = {"training": {}, "gpus": processes.world, "batch": args.batch_size}
    with process_group(processes, args.device):
        if args.fsdp and processes.world == 1:
            raise UsageError("--fsdp needs several processes: torchrun --nproc-per-node N bench/training.py --fsdp")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        run.update(report.environment(device, "bench/training.py"))
        for name in args.models:
            rows = steps(name, args, processes, device)
            run["training"][name] = {"steps": rows}
            if processes.first:
                show(f"{name}, batch {args.batch_size} x {processes.world}, {args.img_size} x {args.img_size}", rows)
            if args.pictures and processes.world == 1:
                with tempfile.TemporaryDirectory() as folder:
                    draw_folder(Path(folder), args.pictures)
                    rows = from_files(name, args, Path(folder), device)
                run["training"][name]["files"] = {"pictures": args.pictures, "workers": args.workers, **rows}
                show(f"{name}, from {args.pictures:,} JPEG files, {args.workers} workers", rows)
    if args.json is not None and processes.first:
        earlier = json.loads(args.json.read_text()) if args.append and args.json.exists() else []
        args.json.write_text(json.dumps([*earlier, run], indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as problem:
        print(f"bench/training.py: error: {problem}", file=sys.stderr)
        sys.exit(problem.status)
