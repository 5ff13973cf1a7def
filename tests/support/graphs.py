# SPDX-License-Identifier: Apache-2.0
"""Modules with CUDA graphs beside the same without, and graphs without a GPU."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from groupmamba import use_cuda_graphs
from groupmamba.cuda_graphs import arguments, module

SIZES = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "stem_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


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


@pytest.fixture(autouse=True)
def emulated(request, monkeypatch):
    """For tests on the CPU; on a GPU cuDNN's kernels that repeat bit for bit."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        emulate(monkeypatch)


def small(device, **options):
    torch.manual_seed(0)
    from groupmamba.models import groupmamba_tiny

    return groupmamba_tiny(num_classes=3, **SIZES, **options).to(device)


def images(*shape, device, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def state_of_numbers(device):
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


def step(model, x, amp=None):
    """Loss and gradients of a call in training, which are then None again."""
    with torch.autocast(x.device.type, amp, enabled=amp is not None):
        loss = sum(y.float().square().sum() for y in [model(x)])
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), found


def twins(device, **options):
    model = small(device, **options)
    twin = copy.deepcopy(model)
    return model, twin, use_cuda_graphs(model)


def recorded_twins(device):
    """The same, and an image of which the model has a graph of training."""
    model, twin, graphs = twins(device)
    x = images(2, 3, 32, 32, device=device)
    for _ in range(3):
        step(model, x)
    return model, twin, graphs, x


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].stride() == b[name].stride() or a[name].numel() == 1, name
        assert torch.equal(a[name], b[name]), name
