# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of modules without a GPU."""

import threading
from contextlib import contextmanager

import torch
from torch import nn

from groupmamba.cuda_graphs import arguments, module


class Emulated:
    """A recorder for the CPU: a replay runs the function again, and puts what it returns where it first was."""

    def __init__(self, device):
        self.calls, self.homes, self.lock = 0, {}, threading.RLock()
        self.buffers, self.alive, self.failed = [], [], False

    @contextmanager
    def aside(self, buffers):
        self.buffers = buffers
        state, before = torch.get_rng_state(), [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            torch.set_rng_state(state)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.data.copy_(value)  # unseen by backward passes

    def record(self, function):
        with self.aside(self.buffers):
            results = [result.view_as(result) for result in function()]  # an input may be a result
        kept = [result.detach().clone() for result in results]
        self.alive += results  # whose ids are not used again
        self.homes.update({id(result): home for result, home in zip(results, kept, strict=True)})

        def replay():
            with arguments.recording(), torch.set_grad_enabled(self.grad):
                for home, result in zip(kept, function(), strict=True):
                    home.copy_(result.detach())

        self.grad = torch.is_grad_enabled()
        return replay, results

    def borrowed(self, tensor):
        return self.homes.get(id(tensor), tensor.detach())

    @contextmanager
    def turn(self):
        with self.lock:
            yield

    def finish(self):
        pass


def emulate(monkeypatch) -> None:
    """Lets `use_cuda_graphs` record calls on the CPU."""
    monkeypatch.setattr(module, "Recorder", Emulated)
    monkeypatch.setattr(arguments, "fits", lambda tensor: type(tensor) in (torch.Tensor, nn.Parameter))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
