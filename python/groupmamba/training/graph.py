# SPDX-License-Identifier: Apache-2.0
"""A step of training as one CUDA graph, or its passes as graphs: one launch for the host in place of some 1,000."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from groupmamba.cuda_graphs import use_cuda_graphs
from groupmamba.cuda_graphs.recorder import capturing
from groupmamba.training.step import GRAPHED, Pieces, Step
from groupmamba_ext._command import is_out_of_memory, one_line

WARM_UP = 3


def why_not(args: argparse.Namespace, device: torch.device, amp: torch.dtype | None) -> str | None:
    """Why a step can't be a graph; None where it can."""
    if args.no_cuda_graph:
        return "--no-cuda-graph"
    if device.type != "cuda":
        return "there is no GPU"
    if amp == torch.float16:
        return "float16's scaler reads back to the host"
    if args.opt.lower() not in GRAPHED:
        return f"--opt {args.opt}; those of {', '.join(GRAPHED)} have a state that a graph can begin with"
    return f"--grad-accum-steps {args.grad_accum_steps}" if args.grad_accum_steps > 1 else None


def graph_passes(model: nn.Module, part: str, args: argparse.Namespace, world: int) -> str | None:
    """Makes the passes of ``part`` of a model CUDA graphs, where a step can't be one on a GPU; what is then said, or
    None where they can't either."""
    # While one process records a pass, others would wait for the sums of synchronised norms in vain.
    alone = world == 1 or not args.sync_bn
    if args.no_cuda_graph or args.grad_checkpointing or not alone:
        return None
    use_cuda_graphs(model.get_submodule(part))
    return f"the {part or 'model'}'s passes are CUDA graphs"


class Snapshot:
    """All that a step changes: parameters, statistics, the optimizer's state, the moving average."""

    def __init__(self, step: Step):
        self.step = step
        self.values = [(tensor, tensor.detach().clone()) for tensor in self._tensors()]
        self.had_state = bool(step.optimizer.state)
        self.scaler = None if step.scaler is None else step.scaler.state_dict()

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.step.model.parameters()
        yield from self.step.model.buffers()
        if self.step.ema is not None:
            yield from self.step.ema.module.state_dict().values()
        for state in self.step.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the values back, in place: a graph keeps the addresses. State that was not there becomes zeros, with
        which the optimizers of `GRAPHED` begin."""
        for tensor, value in self.values:
            tensor.copy_(value)
        if self.step.scaler is not None and self.scaler is not None:
            self.step.scaler.load_state_dict(self.scaler)
        if not self.had_state:
            for state in self.step.optimizer.state.values():
                for value in state.values():
                    value.zero_()


def settle(step: Step, pieces: Pieces) -> None:
    """Takes a step, undoes it, and lets gradients of several processes be averaged in the order in which they came."""
    if step.replicas is None:
        return
    before = Snapshot(step)
    generator = torch.cuda.get_rng_state(step.device) if step.device.type == "cuda" else None
    stream = step.stream
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(step.device))
    with torch.cuda.stream(stream):
        step.body(pieces)
    if stream is not None:
        torch.cuda.current_stream(step.device).wait_stream(stream)
    step.optimizer.zero_grad(set_to_none=True)
    step.replicas.regroup()
    before.restore()
    if generator is not None:
        torch.cuda.set_rng_state(generator, step.device)


class GraphedStep:
    """Captures ``step.body`` for batches of one shape; batches of another run without the graph.

    Warming up takes steps of training, on the batch given. Parameters, statistics, the optimizer's state, the moving
    average and the generators are afterwards as they were before, bit for bit.

    Raises:
        RuntimeError: something in the step can't be captured; all is as before.
    """

    def __init__(self, step: Step, images: Tensor, labels: Tensor):
        self.step = step
        self.images, self.labels = images.clone(memory_format=torch.preserve_format), labels.clone()
        device = step.device
        before = Snapshot(step)
        generator = torch.cuda.get_rng_state(device)
        stream = step.stream or torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step.body([(self.images, self.labels)])
            torch.cuda.current_stream(device).wait_stream(stream)
            step.optimizer.zero_grad(set_to_none=True)
            # The thread that pins batches goes on allocating meanwhile.
            capture = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
            with capturing(device), capture:
                self.loss = step.body([(self.images, self.labels)])
        finally:
            torch.cuda.synchronize(device)
            before.restore()
            torch.cuda.set_rng_state(generator, device)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if images.shape != self.images.shape or labels.shape != self.labels.shape:
            return self.step.body([(images, labels)])
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss

    def close(self) -> None:
        """Gives the graph's memory back; it can't be called any more."""
        torch.cuda.synchronize(self.step.device)
        self.graph.reset()


def capture(step: Step, images: Tensor, labels: Tensor) -> str | None:
    """Makes ``step`` run as a graph from now on; why not, as text, where that fails."""
    try:
        step.graph = GraphedStep(step, images, labels)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return "there is not enough memory for the graph's own"
        return f"the step can't be captured ({one_line(error)[:200]})"
    return None
