# SPDX-License-Identifier: Apache-2.0
"""The choice of implementation: who sees it, and that compiled functions follow it."""

import asyncio
import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch

import groupmamba_ext as ext
from groupmamba_ext.backend import current_backend
from support.scan import inputs


def in_thread(function):
    """What ``function()`` returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_other_threads_keep_their_own():
    with ext.backend("reference"):
        assert in_thread(current_backend) == "auto"
        assert current_backend() == "reference"

    entered, leave = threading.Event(), threading.Event()

    def other():
        with ext.backend("native"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    assert current_backend() == "auto"
    with ext.backend("reference"):
        leave.set()
        thread.join()
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_tasks_keep_their_own():
    seen = []

    async def task(name, other):
        with ext.backend(name):
            await asyncio.sleep(0)
            seen.append((name, current_backend()))
            await other.wait() if name == "native" else other.set()
        seen.append((name, current_backend()))

    async def both():
        event = asyncio.Event()
        await asyncio.gather(task("native", event), task("reference", event))
        assert await asyncio.to_thread(current_backend) == "auto"
        with ext.backend("reference"):
            assert await asyncio.to_thread(current_backend) == "reference"  # a thread that works for this task

    asyncio.run(both())
    assert sorted(seen) == [("native", "auto"), ("native", "native"), ("reference", "auto"), ("reference", "reference")]


def test_context_runs_elsewhere():
    with ext.backend("reference"):
        context = contextvars.copy_context()
    assert in_thread(lambda: context.run(current_backend)) == "reference"
    assert current_backend() == "auto"


def test_environment_sets_the_default_of_all_threads():
    code = (
        "import threading\n"
        "from groupmamba_ext.backend import backend, current_backend\n"
        "say = lambda: print(current_backend())\n"
        "say()\n"
        "with backend('native'):\n"
        "    thread = threading.Thread(target=say); thread.start(); thread.join()\n"
        "say()\n"
    )
    environment = {**os.environ, "GROUPMAMBA_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["reference"] * 3


def marked_reference(monkeypatch):
    """The convolution whose reference can be told from the compiled op."""
    plain = ext.reference.depthwise_conv3x3
    monkeypatch.setattr(ext.reference, "depthwise_conv3x3", lambda *a, **k: plain(*a, **k) + 1)
    torch._dynamo.reset()
    x, weight = torch.randn(1, 4, 5, 8), torch.randn(8, 3, 3)
    y = ext.depthwise_conv3x3(x, weight)

    def is_reference(function):
        offset = (function(x, weight) - y).mean().item()
        assert abs(offset - round(offset)) < 1e-4
        return round(offset) == 1

    return is_reference


def test_compiled_functions_follow(monkeypatch):
    is_reference = marked_reference(monkeypatch)
    compiled = torch.compile(lambda x, w: ext.depthwise_conv3x3(x, w), backend="eager", fullgraph=True)
    for _ in range(2):
        assert not is_reference(compiled)
        with ext.backend("reference"):
            assert is_reference(compiled)
            assert not in_thread(lambda: is_reference(compiled))
            with ext.backend("native"):
                assert not is_reference(compiled)
            assert is_reference(compiled)


def test_compiled_block(monkeypatch):
    """A block inside a compiled function."""
    is_reference = marked_reference(monkeypatch)

    def inner(x, w):
        with ext.backend("reference"):
            y = ext.depthwise_conv3x3(x, w)
        return y + 10 * ext.depthwise_conv3x3(x, w)

    compiled = torch.compile(inner, backend="eager", fullgraph=True)
    x, weight = torch.randn(1, 4, 5, 8), torch.randn(8, 3, 3)
    with ext.backend("native"):
        y = ext.depthwise_conv3x3(x, weight)
    assert torch.allclose(compiled(x, weight), 11 * y + 1, atol=1e-4)
    assert current_backend() == "auto" and not is_reference(ext.depthwise_conv3x3)


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch.compile guards on context variables from 2.14 on")
def test_compiled_functions_follow_a_context(monkeypatch):
    is_reference = marked_reference(monkeypatch)
    compiled = torch.compile(lambda x, w: ext.depthwise_conv3x3(x, w), backend="eager", fullgraph=True)
    with ext.backend("reference"):
        context = contextvars.copy_context()
    assert not is_reference(compiled)
    assert in_thread(lambda: context.run(is_reference, compiled))


def test_backward_does_not_ask(device):
    """A gradient comes from what computed the result, in whatever thread and block it runs."""
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=3, w=4).items()}
    leaves = list(tensors.values())

    def result(name):
        with ext.backend(name):
            return ext.grouped_selective_scan(**tensors)

    for name, other in (("native", "reference"), ("reference", "native")):
        y = result(name)
        expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)

        def elsewhere(y=y, other=other):
            with ext.backend(other):
                return torch.autograd.grad(y.sum(), leaves, retain_graph=True)

        for gradients in (elsewhere(), in_thread(elsewhere)):
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
